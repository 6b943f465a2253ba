"""STL-10: the official binary files, checked before use, and their resumable download.

Source: A. Coates, H. Lee, A. Y. Ng, "An Analysis of Single-Layer Networks in Unsupervised Feature
Learning", AISTATS 2011. 5000 labelled pictures to train on, 8000 to test on, 96x96 in colour.
"""

from __future__ import annotations

import hashlib
import http.client
import ssl
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import IO

import torch
from torch import Tensor

from lean_fx.errors import DataError, WriteError
from lean_fx.experiment.datasets import Dataset
from lean_fx.files import make_folder, replacing

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
_NAMES = "class_names.txt"  # small, for people; it has no official MD5 and is not read here
_CHUNK = 1 << 20
_BROKEN = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)

Progress = Callable[[int, "int | None"], None]
"""Called with the bytes that are there and those in all, or None where the server hides it."""


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
        download: fetch the archive (2.6 GB) into ``folder`` if a file is missing.
        url: as in :func:`download_stl10`, like the arguments below.
        md5: of the archive.
        files: MD5 of each file.
        progress: told of each piece that arrives.

    Raises:
        DataError: a file is missing or damaged, or the download failed.
        WriteError: ``folder`` cannot be written.
    """
    root = _find(Path(folder), files)
    if root is None and download:
        root = download_stl10(folder, url=url, md5=md5, files=files, progress=progress)
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
    root = make_folder(Path(folder) / "stl10_binary")
    part = Path(folder) / "stl10_binary.tar.gz.part"
    _fetch(url, part, progress)
    found = _md5_of(part)
    if found != md5:
        part.unlink()
        raise DataError(
            f"{url}: what arrived has MD5 {found}, not {md5}; it was deleted, run again to fetch "
            "it anew"
        )
    _unpack(part, root, files)
    part.unlink()
    return root


def _find(folder: Path, files: Mapping[str, str]) -> Path | None:
    for root in (folder, folder / "stl10_binary"):
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


def _fetch(url: str, part: Path, progress: Progress | None) -> None:
    """Bring ``part`` to its full length; whatever arrives stays there."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            # A server that knows no ranges answers 200 and sends the whole.
            start = start if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
            length = response.headers.get("Content-Length")
            total = start + int(length) if length else None
            there = _append(response, part, start, total, progress)
    except urllib.error.HTTPError as error:
        if start and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is left to send; the MD5 tells whether that is true
        raise DataError(f"{url}: the server says {error.code} {error.reason}; try later") from error
    except _BROKEN as error:
        why = str(error) or type(error).__name__
        raise DataError(f"{url}: the connection failed ({why}); run again to go on") from error
    except OSError as error:
        raise WriteError(
            f"{part}: cannot be written ({error.strerror}); run again to go on"
        ) from error
    if total is not None and there < total:
        raise DataError(
            f"{url}: the connection ended after {there} of {total} bytes; run again to go on "
            "from there"
        )


def _append(
    source: IO[bytes], part: Path, start: int, total: int | None, progress: Progress | None
) -> int:
    there = start
    with part.open("ab") as file:
        file.truncate(start)
        while piece := source.read(_CHUNK):
            file.write(piece)
            there += len(piece)
            if progress is not None:
                progress(there, total)
    return there


def _md5_of(path: Path) -> str:
    digest = hashlib.md5()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def _unpack(archive: Path, root: Path, files: Mapping[str, str]) -> None:
    """Write the wanted files, each whole and checked or not at all."""
    missing = {*files, _NAMES}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if member.isfile() and path.parent.name == root.name and path.name in missing:
                    _write(tar.extractfile(member), root / path.name, files.get(path.name))
                    missing.remove(path.name)
                if not missing:
                    return  # before the unlabelled pictures, most of the archive
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{archive}: cannot be unpacked ({error}); delete it") from error
    raise DataError(f"{archive}: lacks {', '.join(sorted(missing))}; delete it")


def _write(source: IO[bytes] | None, path: Path, md5: str | None) -> None:
    assert source is not None  # of a regular member it never is
    digest = hashlib.md5()
    with replacing(path) as part:
        with part.open("wb") as file:
            while piece := source.read(_CHUNK):
                digest.update(piece)
                file.write(piece)
        if md5 is not None and digest.hexdigest() != md5:
            raise DataError(
                f"{path}: the archive's copy has MD5 {digest.hexdigest()}, not {md5}; it was not "
                "written"
            )
