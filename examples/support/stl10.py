"""STL-10: the official binary files, checked before use, and their resumable download.

Source: A. Coates, H. Lee, A. Y. Ng, "An Analysis of Single-Layer Networks in Unsupervised Feature
Learning", AISTATS 2011. 5000 labelled pictures to train on, 8000 to test on, 96x96 in colour.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from lean_fx.errors import DataError
from lean_fx.experiment.datasets import Dataset
from lean_fx.experiment.download import Progress, fetch, find_or_download, unpack
from lean_fx.files import make_folder

URL = "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"
ARCHIVE_MD5 = "91f7769df0f17e558f3565bffb0c7dfb"
FILE_MD5: Mapping[str, str] = MappingProxyType(
    {
        "train_X.bin": "918c2871b30a85fa023e0c44e0bee87f",
        "train_y.bin": "5a34089d4802c674881badbb80307741",
        "test_X.bin": "7f263ba9f9e0b06b93213547f721ac82",
        "test_y.bin": "36f9794fa4beb8a2c72628de14fa638e",
    }
)
_FOLDER = "stl10_binary"  # in the archive, too
_NAMES = "class_names.txt"  # small, for people; it has no official MD5 and is not read here


def stl10(
    folder: str | Path,
    download: bool = False,
    *,
    url: str = URL,
    md5: str = ARCHIVE_MD5,
    files: Mapping[str, str] = FILE_MD5,
    progress: Progress | None = None,
) -> Dataset:
    """Load STL-10's labelled pictures as uint8, after a check of every file's MD5.

    Args:
        folder: the folder of ``train_X.bin`` and its three sisters, or the one above it, which
            holds them in ``stl10_binary/``.
        download: fetch the archive (2.6 GB) into ``folder`` if a file is missing. Under torchrun
            the first process does so and the others wait; several machines share ``folder``.
        url: as in :func:`download_stl10`, like the arguments below.
        md5: of the archive.
        files: MD5 of each file.
        progress: called with (bytes there, bytes in all or None) for each piece that arrives.

    Raises:
        DataError: a file is missing or damaged, or the download failed.
        WriteError: ``folder`` cannot be written.
    """
    root = find_or_download(
        lambda: _find(Path(folder), files),
        (lambda: download_stl10(folder, url=url, md5=md5, files=files, progress=progress))
        if download
        else None,
    )
    if root is None:
        raise DataError(
            f"{folder}: has not all of {', '.join(files)}; run again with --download "
            f"(download=True), or unpack {url} there"
        )
    train, test = (
        (_images(root / f"{split}_X.bin", files), _labels(root / f"{split}_y.bin", files))
        for split in ("train", "test")
    )
    return Dataset.of("STL-10", train, test, classes=10)


def download_stl10(
    folder: str | Path,
    *,
    url: str = URL,
    md5: str = ARCHIVE_MD5,
    files: Mapping[str, str] = FILE_MD5,
    progress: Progress | None = None,
) -> Path:
    """Fetch STL-10's archive and unpack its labelled part into ``folder/stl10_binary``.

    What has arrived is kept in ``stl10_binary.tar.gz.part``, and a later call goes on from there.
    The archive is deleted once its files are unpacked and checked.

    Args:
        folder: where to; made if it is missing.
        url: of the archive.
        md5: of the archive.
        files: MD5 of each file that is wanted, by its name in ``stl10_binary/``.
        progress: called with (bytes there, bytes in all or None) for each piece that arrives.

    Returns:
        The folder of the files.

    Raises:
        DataError: the server cannot be reached, the connection broke, or what arrived is damaged.
        WriteError: ``folder`` cannot be written.
    """
    part = make_folder(folder) / f"{_FOLDER}.tar.gz.part"
    fetch(url, part, md5, progress)
    members = {f"{_FOLDER}/{name}": files.get(name) for name in (*files, _NAMES)}
    unpack(part, part.parent, members)  # it ends before the unlabelled pictures, most of it
    part.unlink()
    return part.parent / _FOLDER


def _find(folder: Path, files: Mapping[str, str]) -> Path | None:
    for root in (folder, folder / _FOLDER):
        if all((root / name).is_file() for name in files):
            return root
    return None


def _images(path: Path, files: Mapping[str, str]) -> Tensor:
    # Each channel is stored column by column.
    return _read(path, files).view(-1, 3, 96, 96).transpose(2, 3).contiguous()


def _labels(path: Path, files: Mapping[str, str]) -> Tensor:
    return _read(path, files).long() - 1


def _read(path: Path, files: Mapping[str, str]) -> Tensor:
    content = bytearray(path.read_bytes())
    found = hashlib.md5(content).hexdigest()
    if found != files[path.name]:
        raise DataError(
            f"{path}: is damaged, its {len(content)} bytes have MD5 {found}, not "
            f"{files[path.name]}; delete it and run again with --download (download=True)"
        )
    return torch.frombuffer(content, dtype=torch.uint8)
