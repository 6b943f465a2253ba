"""Spoken digits from small WAV files written here, and their download from an archive here."""

import io
import math
import os
import struct
import tarfile
import wave
from pathlib import Path

import pytest
import torch

from lean_fx.errors import ArgumentError, DataError
from support.log_mel import log_mel
from support.spoken_digits import (
    RECORDINGS,
    URL,
    download_spoken_digits,
    read_wav,
    spoken_digits,
)

REAL = os.environ.get("LEAN_FX_FSDD")
NAMES = ("0_ann_0.wav", "0_ann_5.wav", "3_bob_4.wav", "3_bob_12.wav", "9_bob_49.wav")
INSIDE = "free-spoken-digit-dataset-1.0.10/recordings"


def sound(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3000, 3000, (length,), generator=generator).tolist()


def wav(samples: list[int], channels: int = 1, width: int = 2, rate: int = 8000) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        kind = {1: "B", 2: "h"}[width]
        file.writeframes(struct.pack(f"<{len(samples)}{kind}", *samples))
    return buffer.getvalue()


SOUNDS = {name: sound(seed, 700 * seed + 3000) for seed, name in enumerate(NAMES)}
SOUNDS["9_bob_49.wav"] = sound(9, 9000)  # longer than what is kept
FILES = {name: wav(samples) for name, samples in SOUNDS.items()}


def write_files(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def whole_archive(path: Path) -> Path:
    files = {f"{INSIDE}/{name}": content for name, content in FILES.items()}
    return archive(path, {"free-spoken-digit-dataset-1.0.10/README.md": b"x", **files})


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "inside", ["", "recordings", INSIDE, "free-spoken-digit-dataset/recordings"]
)
def test_recordings_become_frames_split_by_their_index(tmp_path, inside):
    write_files(tmp_path / inside)
    data = spoken_digits(tmp_path, recordings=NAMES)
    assert (data.name, data.classes) == ("spoken digits", 10)
    assert (data.train_y.tolist(), data.test_y.tolist()) == ([0, 3, 9], [0, 3])
    assert (data.train_x.shape, data.test_x.shape) == ((3, 40, 40), (2, 40, 40))
    for frames, name in zip(
        [*data.train_x, *data.test_x],
        ("0_ann_5", "3_bob_12", "9_bob_49", "0_ann_0", "3_bob_4"),
        strict=True,
    ):
        samples = torch.tensor(SOUNDS[f"{name}.wav"][:8056]) / 32768
        filled = torch.cat([samples, torch.zeros(8056 - len(samples))])
        torch.testing.assert_close(frames, log_mel(filled, window=256, hop=200))


def test_the_official_names_are_3000_of_which_a_tenth_is_for_the_test():
    assert len(set(RECORDINGS)) == 3000
    assert sum(int(name[:-4].split("_")[2]) < 5 for name in RECORDINGS) == 300


def test_a_recording_is_read_at_full_scale_1(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav([0, 1, -1, 32767, -32768]))
    expected = [0, 1 / 32768, -1 / 32768, 32767 / 32768, -1]
    assert read_wav(tmp_path / "a.wav").tolist() == expected


WHOLE = wav([5] * 1000)
ENDLESS = struct.pack("<L", 0xFFFFFFF0)  # the size of a chunk


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a WAV file (it ends within its head)"),
        (
            b"ID3 this is no sound",
            "cannot be read as a WAV file (file does not start with RIFF id)",
        ),
        (WHOLE[:30], "cannot be read as a WAV file (it ends within its head)"),
        (WHOLE[:-100], "ends after 950 of 1000 samples"),
        (WHOLE[:-1], "ends after 999 of 1000 samples"),
        (
            WHOLE[:16] + ENDLESS + WHOLE[20:],
            "cannot be read as a WAV file (a chunk is longer than the file)",
        ),
        (WHOLE[:40] + ENDLESS + WHOLE[44:], "ends after 1000 of 2147483640 samples"),
        (wav([]), "holds no samples"),
        (wav([1] * 10, channels=2), "has 2 channels of 16 bit at 8000 Hz, not 1 of 16 bit at 8000"),
        (wav([1] * 10, width=1), "has 1 channels of 8 bit at 8000 Hz, not 1 of 16 bit at 8000 Hz"),
        (
            wav([1] * 10, rate=16000),
            "has 1 channels of 16 bit at 16000 Hz, not 1 of 16 bit at 8000",
        ),
    ],
)
def test_a_file_that_is_no_recording_is_named(tmp_path, content, message):
    path = write_files(tmp_path) / NAMES[2]
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        spoken_digits(tmp_path, recordings=NAMES)
    assert str(error.value).startswith(f"{path}: {message}")
    assert str(error.value).endswith("; delete it and run again with --download (download=True)")
    assert "\n" not in str(error.value)


def test_a_recording_that_is_a_folder_is_named(tmp_path):
    (tmp_path / "a.wav").mkdir()
    with pytest.raises(DataError, match=r"a\.wav: cannot be read as a WAV file \(.*directory"):
        read_wav(tmp_path / "a.wav")


def test_a_path_that_is_none_is_named():
    with pytest.raises(DataError, match=r"^'a\\x00b': is not a path \(embedded null byte\); give"):
        read_wav("a\0b")


def test_fewer_bits_than_a_sample_has_room_for(tmp_path):
    (tmp_path / "a.wav").write_bytes(WHOLE[:34] + struct.pack("<H", 12) + WHOLE[36:])
    assert read_wav(tmp_path / "a.wav").tolist() == [5 / 32768] * 1000


@pytest.mark.parametrize("recordings", [[], ["x.wav"], ["a_b_0.wav"], ["0_b_c.wav"], [3], None])
def test_recordings_whose_names_say_no_digit(tmp_path, recordings):
    with pytest.raises(ArgumentError, match=r"^spoken_digits: recordings\W.*; give such as 3_theo"):
        spoken_digits(tmp_path, recordings=recordings)


@pytest.mark.parametrize("folder", [None, b"a", 5, "a\0b"])
def test_what_is_no_folder(folder):
    for load in (spoken_digits, download_spoken_digits):
        with pytest.raises(
            ArgumentError, match="^folder=.* is not a path; give the name of a folder"
        ):
            load(folder)


@pytest.mark.parametrize("url", ["nonsense", 5, "http://[::1", ""])
def test_what_is_no_address(tmp_path, url):
    with pytest.raises(ArgumentError, match="^url=.* is not an address .*; give such as https://"):
        spoken_digits(tmp_path, True, url=url)


def test_missing_recordings_say_what_to_do(tmp_path):
    with pytest.raises(DataError) as error:
        spoken_digits(tmp_path / "nowhere")
    assert str(error.value) == (
        f"{tmp_path / 'nowhere'}: lacks 3000 of 3000 recordings, the first 0_george_0.wav; run "
        f"again with --download (download=True), or unpack {URL} there"
    )
    root = write_files(tmp_path / "recordings")
    (root / "3_bob_4.wav").unlink()
    with pytest.raises(
        DataError, match=rf"^{root}: lacks 1 of 5 recordings, the first 3_bob_4\.wav; run again"
    ):
        spoken_digits(tmp_path, recordings=NAMES)


def test_a_download_leaves_the_recordings_and_nothing_else(tmp_path):
    source = whole_archive(tmp_path / "source.tar.gz")
    more = {"url": source.as_uri(), "recordings": NAMES}
    seen = []
    data = spoken_digits(
        tmp_path / "data", True, progress=lambda *there: seen.append(there), **more
    )
    assert names(tmp_path / "data") == sorted(f"{INSIDE}/{name}" for name in NAMES)
    assert seen[-1] == (source.stat().st_size,) * 2
    assert torch.equal(spoken_digits(tmp_path / "data", recordings=NAMES).train_x, data.train_x)
    source.unlink()  # a second call fetches nothing
    assert len(spoken_digits(tmp_path / "data", True, **more).train_y) == 3


@pytest.mark.parametrize("harm", ["cut", "changed", "text"])
def test_a_damaged_archive_is_deleted_and_the_next_call_starts_anew(tmp_path, harm):
    source = whole_archive(tmp_path / "source.tar.gz")
    whole = source.read_bytes()
    half = len(whole) // 2
    source.write_bytes(
        {
            "cut": whole[:half],
            "changed": whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :],
            "text": b"<html>moved</html>",
        }[harm]
    )
    arguments = {"url": source.as_uri(), "recordings": NAMES}
    with pytest.raises(
        DataError, match=r"what arrived is not a whole gzip file \(.*; it was deleted"
    ):
        download_spoken_digits(tmp_path / "data", **arguments)
    assert names(tmp_path / "data") == []
    source.write_bytes(whole)
    root = download_spoken_digits(tmp_path / "data", **arguments)
    assert {path.name: path.read_bytes() for path in root.iterdir()} == FILES


def test_an_archive_that_lacks_a_recording_says_which(tmp_path):
    files = {f"{INSIDE}/{name}": FILES[name] for name in NAMES[1:]}
    source = archive(tmp_path / "source.tar.gz", files)
    with pytest.raises(DataError, match=rf"lacks {INSIDE}/0_ann_0\.wav; delete it$"):
        download_spoken_digits(tmp_path / "data", url=source.as_uri(), recordings=NAMES)


@pytest.mark.skipif(
    not REAL, reason="LEAN_FX_FSDD, a folder with the Free Spoken Digit Dataset, is not set"
)
def test_the_real_recordings_are_read():
    data = spoken_digits(REAL)
    assert data.train_x.shape == (2700, 40, 40)
    assert data.test_x.shape == (300, 40, 40)
    assert data.train_y.bincount().tolist() == [270] * 10
    assert data.test_y.bincount().tolist() == [30] * 10
    assert data.train_x.min() == pytest.approx(math.log(1e-6), rel=1e-6)
