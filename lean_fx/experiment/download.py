"""Files from an archive on the web: fetched in as many goes as it takes, checked, unpacked."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import shutil
import ssl
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import IO

from lean_fx.errors import ArgumentError, DataError, WriteError
from lean_fx.experiment.processes import is_first_process
from lean_fx.files import make_folder, replacing

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


def find_or_download(
    find: Callable[[], Path | None], download: Callable[[], Path] | None
) -> Path | None:
    """Return where data is, after downloading it if it is not there and may be.

    Under torchrun the first process downloads and the others wait until they find it.

    Args:
        find: gives the folder of the whole data, or None.
        download: brings it and gives its folder; None where that is not allowed.
    """
    root = find()
    if root is not None or download is None:
        return root
    if is_first_process():
        return download()
    # Should the first process fail, torchrun ends this one.
    while (root := find()) is None:
        time.sleep(0.5)
    return root


def fetch(url: str, part: Path, md5: str | None, progress: Progress | None = None) -> None:
    """Fetch a file whole, going on from what an earlier call left at ``part``.

    Args:
        url: of the file.
        part: where it goes; its folder must exist. Whatever arrives stays there, unless the whole
            turns out to be damaged.
        md5: of the file; None for one that has none to compare with, and is a gzip file: its own
            checksum is compared.
        progress: called after each piece that arrives.

    Raises:
        ArgumentError: ``url`` is not an address.
        DataError: the server cannot be reached, the connection broke, or what arrived is damaged.
        WriteError: ``part`` cannot be written.
    """
    _bring(url, part, progress)
    damage = _gzip_damage(part) if md5 is None else _md5_damage(part, md5)
    if damage:
        part.unlink()
        raise DataError(f"{url}: what arrived {damage}; it was deleted, run again to fetch it anew")


def unpack(archive: Path, folder: Path, members: Mapping[str, str | None]) -> None:
    """Write the wanted members of a ``.tar.gz``, each whole and checked or not at all.

    Reading ends with the last of them.

    Args:
        archive: the file.
        folder: where to; a member ``a/b`` becomes ``folder/a/b``.
        members: the MD5 of each by its name in the archive, or None for one that has none.

    Raises:
        DataError: it is not such an archive, lacks a member, or holds one of another MD5.
        WriteError: ``folder`` cannot be written.
    """
    missing = set(members)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = str(PurePosixPath(member.name))
                if member.isfile() and name in missing:
                    _write(tar.extractfile(member), folder / name, members[name])
                    missing.remove(name)
                if not missing:
                    return
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{archive}: cannot be unpacked ({error}); delete it") from error
    raise DataError(f"{archive}: lacks {', '.join(sorted(missing))}; delete it")


def _bring(url: str, part: Path, progress: Progress | None) -> None:
    """Bring ``part`` to its full length; whatever arrives stays there."""
    start = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={start}-"} if start else {}
    try:
        url.encode("ascii")
        request = urllib.request.Request(url, headers=headers)
    except (AttributeError, TypeError, ValueError) as error:  # the first two where it is not text
        raise ArgumentError(
            f"url={url!r} is not an address ({error}); give such as https://example.org/a.tar.gz"
        ) from error
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            # A server that knows no ranges answers 200 and sends the whole.
            start = start if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
            length = response.headers.get("Content-Length")
            total = start + int(length) if length and length.isdecimal() else None
            there = _append(response, part, start, total, progress)
    except urllib.error.HTTPError as error:
        if start and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is left to send; the MD5 tells whether that is true
        raise DataError(f"{url}: the server says {error.code} {error.reason}; try later") from error
    except (*_BROKEN, ValueError) as error:  # a redirect to no address is the latter
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


def _md5_damage(path: Path, md5: str) -> str:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    return "" if found == md5 else f"has MD5 {found}, not {md5}"


def _gzip_damage(path: Path) -> str:
    try:
        with gzip.open(path) as file:
            while file.read(_CHUNK):
                pass  # the checksum is at the end
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        return f"is not a whole gzip file ({error})"
    return ""


def _write(source: IO[bytes] | None, path: Path, md5: str | None) -> None:
    assert source is not None  # of a regular member it never is
    make_folder(path.parent)
    with replacing(path) as part:
        with part.open("wb") as file:
            shutil.copyfileobj(source, file)
        damage = "" if md5 is None else _md5_damage(part, md5)
        if damage:
            raise DataError(f"{path}: the archive's copy {damage}; it was not written")
