"""The Free Spoken Digit Dataset: 3000 recordings of ten English digits by six speakers.

8 kHz, 16 bit, one channel. The recordings of index 0 to 4 of each digit and speaker are the
official test split, so that both splits have the same speakers.

Source: Z. Jackson and others, "Free Spoken Digit Dataset", version 1.0.10, CC BY-SA 4.0,
https://github.com/Jakobovski/free-spoken-digit-dataset, doi 10.5281/zenodo.1342401.
"""

from __future__ import annotations

import re
import wave
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lean_fx.errors import ArgumentError, DataError
from lean_fx.experiment.datasets import Dataset
from lean_fx.experiment.download import Progress, fetch, find_or_download, unpack
from lean_fx.files import as_folder, make_folder
from support.log_mel import log_mel

URL = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.tar.gz"
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
RECORDINGS = tuple(
    f"{digit}_{speaker}_{index}.wav"
    for digit in range(10)
    for speaker in SPEAKERS
    for index in range(50)
)
_NAME = re.compile(r"\d_[^_/]+_\d+\.wav")  # digit, speaker, index
SAMPLE_RATE = 8000
WINDOW, HOP, FRAMES = 256, 200, 40  # a frame of 32 ms each 25 ms; the whole is 1.007 s
_SAMPLES = WINDOW + (FRAMES - 1) * HOP
_FOLDER = "free-spoken-digit-dataset-1.0.10"  # in the archive, too
_CLONE = "free-spoken-digit-dataset"
_REMEDY = "delete it and run again with --download (download=True)"


def spoken_digits(
    folder: str | Path,
    download: bool = False,
    *,
    url: str = URL,
    recordings: Sequence[str] = RECORDINGS,
    progress: Progress | None = None,
) -> Dataset:
    """Load the recordings as log-mel frames: sequences of 40 channels and 40 frames.

    Every recording is cut after 1.007 s, or filled up to that with silence, as most are shorter:
    all sequences have one length, and a net may take the mean over time without a mask. The
    silence counts in mean and standard deviation.

    Args:
        folder: the folder of the recordings, or one above it: that of the unpacked archive or of
            the repository, or the one that holds it.
        download: fetch the archive (16 MB) into ``folder`` if a recording is missing. Under
            torchrun the first process does so and the others wait; several machines share
            ``folder``.
        url: as in :func:`download_spoken_digits`, like the arguments below.
        recordings: names of the files, ``digit_speaker_index.wav``, one or more.
        progress: called with (bytes there, bytes in all or None) for each piece that arrives.

    Raises:
        ArgumentError: ``folder`` is not a path, ``url`` is not an address, or a recording has
            another name.
        DataError: a recording is missing, or is not a WAV file of one channel, 16 bit and 8 kHz
            with at least one sample and as many as it says; or the download failed.
        WriteError: ``folder`` cannot be written.
    """
    given = as_folder(folder)
    _check_names(recordings)

    def bring() -> Path:
        return download_spoken_digits(given, url=url, recordings=recordings, progress=progress)

    root = find_or_download(lambda: _find(given, recordings), bring if download else None)
    if root is None:
        root, missing = _nearest(given, recordings)
        raise DataError(
            f"{root}: lacks {len(missing)} of {len(recordings)} recordings, the first "
            f"{missing[0]}; run again with --download (download=True), or unpack {url} there"
        )
    frames = log_mel(
        torch.stack([_fitted(read_wav(root / name)) for name in recordings]),
        SAMPLE_RATE,
        window=WINDOW,
        hop=HOP,
    )
    parts = [name.removesuffix(".wav").split("_") for name in recordings]
    digits = torch.tensor([int(digit) for digit, _, _ in parts])
    tests = torch.tensor([int(index) < 5 for _, _, index in parts])
    train, test = ((frames[part], digits[part]) for part in (~tests, tests))
    return Dataset.of("spoken digits", train, test, classes=10)


def download_spoken_digits(
    folder: str | Path,
    *,
    url: str = URL,
    recordings: Sequence[str] = RECORDINGS,
    progress: Progress | None = None,
) -> Path:
    """Fetch the archive and unpack its recordings into ``folder``.

    What has arrived is kept in a ``.part`` file, from which a later call goes on where the server
    can. The archive is made on demand and has no official MD5: its gzip checksum is compared, and
    each recording when it is read. It is deleted once it is unpacked.

    Args:
        folder: where to; made if it is missing.
        url: of the archive.
        recordings: names of the files that are wanted.
        progress: called with (bytes there, bytes in all or None) for each piece that arrives.

    Returns:
        The folder of the recordings.

    Raises:
        ArgumentError: ``folder`` is not a path, or ``url`` is not an address.
        DataError: the server cannot be reached, the connection broke, or what arrived is damaged
            or lacks a recording.
        WriteError: ``folder`` cannot be written.
    """
    part = make_folder(folder) / f"{_FOLDER}.tar.gz.part"
    fetch(url, part, None, progress)
    unpack(part, part.parent, {f"{_FOLDER}/recordings/{name}": None for name in recordings})
    part.unlink()
    return part.parent / _FOLDER / "recordings"


def read_wav(path: str | Path) -> Tensor:
    """Read a recording of one channel, 16 bit and 8 kHz, full scale 1.

    9 to 15 bit pass for 16, since a WAV file holds them as the high bits of 16.

    Shape:
        - output: ``[samples]``, float32, in [-1, 1[

    Raises:
        DataError: the file cannot be read, is of another kind, empty, or ends too early.
    """
    try:
        with wave.open(str(path), "rb") as file:
            kind = (file.getnchannels(), 8 * file.getsampwidth(), file.getframerate())
            told = file.getnframes()
            content = bytearray(file.readframes(told))
    except (OSError, EOFError, RuntimeError, wave.Error) as error:
        endless = isinstance(error, RuntimeError)  # its text is empty, like EOFError's
        head = "a chunk is longer than the file" if endless else "it ends within its head"
        why = str(error) or head
        raise DataError(f"{path}: cannot be read as a WAV file ({why}); {_REMEDY}") from error
    except ValueError as error:  # a null byte
        raise DataError(f"{str(path)!r}: is not a path ({error}); give another") from error
    if kind != (1, 16, SAMPLE_RATE):
        raise DataError(
            f"{path}: has {kind[0]} channels of {kind[1]} bit at {kind[2]} Hz, not 1 of 16 bit at "
            f"{SAMPLE_RATE} Hz; {_REMEDY}"
        )
    if told == 0:
        raise DataError(f"{path}: holds no samples; {_REMEDY}")
    if len(content) != 2 * told:
        raise DataError(f"{path}: ends after {len(content) // 2} of {told} samples; {_REMEDY}")
    return torch.frombuffer(content, dtype=torch.int16).float() / 2**15


def _check_names(recordings: Sequence[str]) -> None:
    if not isinstance(recordings, tuple | list) or not recordings:
        raise ArgumentError(
            f"spoken_digits: recordings={recordings!r} is not a list of one name or more; give "
            "such as 3_theo_0.wav"
        )
    for name in recordings:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ArgumentError(
                f"spoken_digits: recordings: {name!r} names no digit, speaker and index; give such "
                "as 3_theo_0.wav"
            )


def _fitted(samples: Tensor) -> Tensor:
    return F.pad(samples[:_SAMPLES], (0, max(0, _SAMPLES - len(samples))))


def _roots(folder: Path) -> list[Path]:
    above = [folder, folder / _FOLDER, folder / _CLONE]
    return [folder, *(each / "recordings" for each in above)]


def _find(folder: Path, recordings: Sequence[str]) -> Path | None:
    root, missing = _nearest(folder, recordings)
    return None if missing else root


def _nearest(folder: Path, recordings: Sequence[str]) -> tuple[Path, list[str]]:
    """The folder that lacks the fewest recordings, and which."""
    lacking = {}
    for root in _roots(folder):
        there = {path.name for path in root.glob("*.wav")}
        lacking[root] = [name for name in recordings if name not in there]
    return min(lacking.items(), key=lambda item: len(item[1]))
