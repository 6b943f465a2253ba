"""Files from an archive on the web: fetched in as many goes as it takes, checked, unpacked."""

from __future__ import annotations

import hashlib
import http.client
import ssl
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import IO

from lean_fx.errors import DataError, WriteError
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


def fetch(url: str, part: Path, md5: str, progress: Progress | None = None) -> None:
    """Fetch a file whole, going on from what an earlier call left at ``part``.

    Args:
        url: of the file.
        part: where it goes; its folder must exist. Whatever arrives stays there, unless the whole
            turns out to be damaged.
        md5: of the file.
        progress: told of each piece that arrives.

    Raises:
        DataError: the server cannot be reached, the connection broke, or what arrived is damaged.
        WriteError: ``part`` cannot be written.
    """
    _bring(url, part, progress)
    found = _md5_of(part)
    if found != md5:
        part.unlink()
        raise DataError(
            f"{url}: what arrived has MD5 {found}, not {md5}; it was deleted, run again to fetch "
            "it anew"
        )


def unpack(archive: Path, folder: Path, members: Mapping[str, str | None]) -> None:
    """Write the wanted members of a ``.tar.gz``, each whole and checked or not at all.

    Reading ends with the last of them.

    Args:
        archive: the file.
        folder: where to; a member ``a/b`` becomes ``folder/a/b``.
        members: the MD5 of each by its name in the archive, or None for one that has none.

    Raises:
        DataError: it is no such archive, lacks a member, or holds one of another MD5.
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


def _write(source: IO[bytes] | None, path: Path, md5: str | None) -> None:
    assert source is not None  # of a regular member it never is
    make_folder(path.parent)
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
