"""STL-10's files and their download, against a server on this machine that cuts and damages."""

import hashlib
import io
import os
import tarfile
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from lean_fx.errors import DataError, WriteError
from lean_fx.experiment.download import unpack
from support.stl10 import URL, download_stl10, stl10

REAL = os.environ.get("LEAN_FX_STL10")


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def noise(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 96, 96), generator=generator, dtype=torch.uint8)


TRAIN, TEST = noise(4, seed=0), noise(2, seed=1)
FILES = {
    "train_X.bin": TRAIN.transpose(2, 3).contiguous().numpy().tobytes(),
    "train_y.bin": bytes([1, 10, 3, 2]),
    "test_X.bin": TEST.transpose(2, 3).contiguous().numpy().tobytes(),
    "test_y.bin": bytes([5, 1]),
}
MD5S = {name: md5(content) for name, content in FILES.items()}


def archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"stl10_binary/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


ARCHIVE = archive(
    {**FILES, "class_names.txt": b"airplane\n", "unlabeled_X.bin": noise(1, 2).numpy().tobytes()}
)


@dataclass
class Served:
    """What the server does, and what it was asked."""

    url: str = ""
    content: bytes = ARCHIVE
    ranges: bool = True
    cut_after: int | None = None
    asked: list[str | None] = field(default_factory=list)


@pytest.fixture
def server():
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers["Range"]
            served.asked.append(wanted)
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            if self.path != "/stl10_binary.tar.gz":
                return self.send_error(404)
            if served.ranges and start >= len(served.content):
                return self.send_error(416)
            partial = served.ranges and wanted is not None
            body = served.content[start if partial else 0 :]
            self.send_response(206 if partial else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: served.cut_after])
            return None

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        served.url = f"http://127.0.0.1:{httpd.server_address[1]}/stl10_binary.tar.gz"
        yield served
        httpd.shutdown()
        thread.join()


def fetch(served: Served, folder: Path, **more) -> Path:
    arguments = {"url": served.url, "md5": md5(ARCHIVE), "files": MD5S, **more}
    return download_stl10(folder, **arguments)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def part_of(folder: Path) -> Path:
    return folder / "stl10_binary.tar.gz.part"


UNPACKED = [f"stl10_binary/{name}" for name in sorted([*FILES, "class_names.txt"])]


def write_files(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("inside", ["", "stl10_binary"])
def test_pictures_stand_upright_and_labels_count_from_zero(tmp_path, inside):
    write_files(tmp_path / inside)
    data = stl10(tmp_path, files=MD5S)
    assert torch.equal(data.train_x, TRAIN)
    assert torch.equal(data.test_x, TEST)
    assert data.train_y.tolist() == [0, 9, 2, 1]
    assert data.test_y.tolist() == [4, 0]
    assert (data.name, data.classes, data.train_y.dtype) == ("STL-10", 10, torch.int64)


def test_missing_data_says_what_to_do(tmp_path):
    write_files(tmp_path / "stl10_binary")
    (tmp_path / "stl10_binary" / "test_y.bin").unlink()
    with pytest.raises(DataError) as error:
        stl10(tmp_path, files=MD5S)
    assert str(error.value) == (
        f"{tmp_path}: has not all of train_X.bin, train_y.bin, test_X.bin, test_y.bin; run again "
        f"with --download (download=True), or unpack {URL} there"
    )


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["short", "changed"])
def test_a_damaged_file_is_named_with_its_md5(tmp_path, name, harm):
    write_files(tmp_path)
    content = FILES[name][:-1] if harm == "short" else b"\x07" + FILES[name][1:]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        stl10(tmp_path, files=MD5S)
    assert str(error.value) == (
        f"{tmp_path / name}: is damaged, its {len(content)} bytes have MD5 {md5(content)}, not "
        f"{MD5S[name]}; delete it and run again with --download (download=True)"
    )


def test_a_download_leaves_the_labelled_files_and_nothing_else(tmp_path, server):
    seen = []
    root = fetch(server, tmp_path, progress=lambda there, total: seen.append((there, total)))
    assert root == tmp_path / "stl10_binary"
    assert names(tmp_path) == UNPACKED
    assert all((root / name).read_bytes() == content for name, content in FILES.items())
    assert seen[-1] == (len(ARCHIVE), len(ARCHIVE))
    assert server.asked == [None]


def test_stl10_downloads_only_what_is_missing(tmp_path, server):
    more = {"url": server.url, "md5": md5(ARCHIVE), "files": MD5S}
    for _ in range(2):
        assert torch.equal(stl10(tmp_path, download=True, **more).test_x, TEST)
    assert len(server.asked) == 1


def test_a_cut_connection_keeps_the_part_and_the_next_call_goes_on(tmp_path, server):
    server.cut_after = 1000
    for there in (1000, 2000):
        with pytest.raises(DataError) as error:
            fetch(server, tmp_path)
        assert str(error.value) == (
            f"{server.url}: the connection ended after {there} of {len(ARCHIVE)} bytes; "
            "run again to go on from there"
        )
        assert part_of(tmp_path).read_bytes() == ARCHIVE[:there]
    server.cut_after = None
    fetch(server, tmp_path)
    assert server.asked == [None, "bytes=1000-", "bytes=2000-"]
    assert names(tmp_path) == UNPACKED


def test_a_server_without_ranges_is_read_from_the_start(tmp_path, server):
    server.ranges = False
    part_of(tmp_path).write_bytes(b"x" * 1000)
    seen = []
    fetch(server, tmp_path, progress=lambda there, total: seen.append((there, total)))
    assert server.asked == ["bytes=1000-"]
    assert seen[-1] == (len(ARCHIVE), len(ARCHIVE))
    assert names(tmp_path) == UNPACKED


def test_a_part_that_is_already_whole_is_only_unpacked(tmp_path, server):
    part_of(tmp_path).write_bytes(ARCHIVE)
    fetch(server, tmp_path)
    assert names(tmp_path) == UNPACKED


@pytest.mark.parametrize("start", [0, 500, len(ARCHIVE) + 9])
def test_a_damaged_archive_is_deleted_and_the_next_call_starts_anew(tmp_path, server, start):
    server.content = ARCHIVE[:-1] + b"?"
    part_of(tmp_path).write_bytes(b"x" * start)
    with pytest.raises(DataError, match=rf"not {md5(ARCHIVE)}; it was deleted, run again to fetc"):
        fetch(server, tmp_path)
    assert names(tmp_path) == []
    server.content = ARCHIVE
    fetch(server, tmp_path)
    assert names(tmp_path) == UNPACKED


def test_a_file_that_differs_from_its_md5_is_not_written(tmp_path, server):
    wrong = {**MD5S, "test_X.bin": "0" * 32}
    with pytest.raises(
        DataError, match=rf"test_X.bin: the archive's copy has MD5 .*, not {'0' * 32}"
    ):
        fetch(server, tmp_path, files=wrong)
    assert "stl10_binary/test_X.bin" not in names(tmp_path)


def test_an_archive_that_lacks_a_file_says_which(tmp_path, server):
    server.content = archive({**FILES})
    with pytest.raises(DataError, match=r"\.part: lacks stl10_binary/class_names.txt; delete it$"):
        fetch(server, tmp_path, md5=md5(server.content))


def test_what_is_no_archive_says_so(tmp_path, server):
    server.content = b"<html>moved</html>"
    with pytest.raises(DataError, match=r"\.part: cannot be unpacked \(not a gzip file\); delete"):
        fetch(server, tmp_path, md5=md5(server.content))


def test_a_member_that_points_outside_is_not_followed(tmp_path, server):
    server.content = archive({"../../evil/train_X.bin": b"evil", "class_names.txt": b""})
    with pytest.raises(DataError, match=r"lacks stl10_binary/test_X.bin, .*train_y.bin; delete"):
        fetch(server, tmp_path / "inner", md5=md5(server.content))
    assert names(tmp_path) == [
        "inner/stl10_binary.tar.gz.part",
        "inner/stl10_binary/class_names.txt",
    ]


def test_a_member_is_taken_by_its_whole_name(tmp_path):
    """Not by its last part; a leading ./ is not a part of it."""
    (tmp_path / "a.tar.gz").write_bytes(archive({"./x.bin": b"right", "old/x.bin": b"wrong"}))
    unpack(tmp_path / "a.tar.gz", tmp_path, {"stl10_binary/x.bin": None})
    assert (tmp_path / "stl10_binary" / "x.bin").read_bytes() == b"right"
    with pytest.raises(DataError, match=r"a\.tar\.gz: lacks x\.bin; delete it$"):
        unpack(tmp_path / "a.tar.gz", tmp_path, {"x.bin": None})
    assert names(tmp_path) == ["a.tar.gz", "stl10_binary/x.bin"]


def test_under_torchrun_the_first_process_fetches_and_the_others_wait(
    tmp_path, server, monkeypatch
):
    more = {"url": server.url, "md5": md5(ARCHIVE), "files": MD5S}
    loaded = []
    ranks = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    second = threading.Thread(
        target=lambda: loaded.append(stl10(tmp_path, True, **more)), daemon=True
    )
    second.start()
    second.join(timeout=0.3)
    assert second.is_alive()
    assert server.asked == []
    monkeypatch.setenv("RANK", "0")
    loaded.append(stl10(tmp_path, True, **more))
    second.join(timeout=30)
    assert len(server.asked) == 1
    assert all(torch.equal(data.test_x, TEST) for data in loaded)
    assert len(loaded) == 2


def test_a_wrong_address_gives_the_servers_answer(tmp_path, server):
    with pytest.raises(DataError, match=r"/gone: the server says 404 Not Found; try later$"):
        fetch(server, tmp_path, url=server.url.replace("stl10_binary.tar.gz", "gone"))


def test_a_server_that_is_not_there_is_one_line(tmp_path, server):
    with pytest.raises(DataError, match=r"^http://127.0.0.1:1/a: the connection failed \(.*refus"):
        fetch(server, tmp_path, url="http://127.0.0.1:1/a")


def test_a_part_that_cannot_be_written_is_a_write_error(tmp_path, server):
    part_of(tmp_path).mkdir()
    with pytest.raises(WriteError, match=r"\.part: cannot be written \(Is a directory\)"):
        fetch(server, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="LEAN_FX_STL10, a folder with the official files, is not set")
def test_the_real_files_are_read():
    data = stl10(REAL)
    assert data.train_x.shape == (5000, 3, 96, 96)
    assert data.test_x.shape == (8000, 3, 96, 96)
    assert data.train_y.bincount().tolist() == [500] * 10
    assert data.test_y.bincount().tolist() == [800] * 10
