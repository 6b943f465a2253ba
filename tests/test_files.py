import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest

from lean_fx.errors import ArgumentError, WriteError
from lean_fx.files import (
    check_writable,
    make_folder,
    replacing,
    write_text,
)

READ_ONLY = Path("/sys/kernel")  # for root too


def test_an_existing_file_stays_whole_when_writing_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_system_is_told_as_ours(tmp_path):
    with (
        pytest.raises(WriteError, match="cannot be written .No space left"),
        replacing(tmp_path / "a"),
    ):
        raise OSError(28, "No space left on device")


def test_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (
        pytest.raises(
            WriteError, match="pipe: is not a file but a device or the like; give the name"
        ),
        replacing(tmp_path / "pipe") as part,
    ):
        part.write_text("text")
    assert (tmp_path / "pipe").is_fifo()


def test_permissions_are_those_of_any_new_file(tmp_path):
    write_text(tmp_path / "a.txt", "text")
    (tmp_path / "b.txt").write_text("text")
    modes = [stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("a.txt", "b.txt")]
    assert modes[0] == modes[1]


def test_permissions_and_links_of_an_existing_file_are_kept(tmp_path):
    (tmp_path / "shared").mkdir()
    file = tmp_path / "shared" / "net.onnx"
    file.write_text("old")
    file.chmod(0o640)
    link = tmp_path / "latest.onnx"
    link.symlink_to(file)
    write_text(link, "new")
    assert link.is_symlink()
    assert file.read_text() == "new"
    assert file.stat().st_mode & 0o777 == 0o640


def test_a_link_to_a_file_that_is_yet_to_be_made(tmp_path):
    link = tmp_path / "latest.onnx"
    link.symlink_to(tmp_path / "net.onnx")
    write_text(link, "new")
    assert (tmp_path / "net.onnx").read_text() == "new"


def test_links_in_a_loop(tmp_path):
    link = tmp_path / "loop"
    link.symlink_to(link)
    with pytest.raises(WriteError, match="loop"):
        write_text(link, "new")


def test_a_folder_that_cannot_be_written(tmp_path):
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WriteError, match="no: cannot be written .No such file or directory.; give"):
        check_writable(tmp_path / "no")


@pytest.mark.skipif(not READ_ONLY.is_dir(), reason="needs a folder that nobody may write to")
def test_a_read_only_folder_is_told_when_it_is_made():
    with pytest.raises(WriteError, match="kernel: cannot be written .*; give a folder that you ma"):
        make_folder(READ_ONLY)


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(WriteError, match="a: cannot be made .File exists.; give a folder that you"):
        make_folder(tmp_path / "a")
    with pytest.raises(WriteError, match="b: cannot be written .Not a directory.; give a path in"):
        write_text(tmp_path / "a" / "b", "text")


@pytest.mark.parametrize("path", [5, None, b"a", "a\0b"])
def test_what_is_no_folder(path):
    with pytest.raises(ArgumentError, match="^folder=.* is not a path; give the name of a folder$"):
        make_folder(path)


def test_files_that_belong_together(tmp_path):
    for text in ("old", "new"):
        with replacing(tmp_path / "a") as part:
            part.write_text(text)
            part.with_name("a.data").write_text(text * 2)
        assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
            "a": text,
            "a.data": text * 2,
        }


def test_no_reader_meets_an_old_file_with_new_companions(tmp_path, monkeypatch):
    write_text(tmp_path / "a", "old")
    moved = []
    replace = Path.replace
    monkeypatch.setattr(
        Path,
        "replace",
        lambda self, to: moved.append((to.name, (tmp_path / "a").exists())) or replace(self, to),
    )
    with replacing(tmp_path / "a") as part:
        part.write_text("new")
        part.with_name("a.data").write_text("new")
    assert moved == [("a.data", False), ("a", False)]


def test_a_hidden_folder_that_another_writer_is_removing_is_left_to_it(tmp_path, monkeypatch):
    make, met = tempfile.mkdtemp, []

    def make_and_meet(*args, **options):
        folder = Path(make(*args, **options))
        if not met:  # another writer meets the first before its maker has locked it
            met.append((folder, os.open(folder, os.O_RDONLY)))
            fcntl.flock(met[0][1], fcntl.LOCK_EX)
        return str(folder)

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_meet)
    with replacing(tmp_path / "a") as part:
        shutil.rmtree(met[0][0])
        os.close(met[0][1])
        part.write_text("whole")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
