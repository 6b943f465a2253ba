"""Write files whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lean_fx.errors import ArgumentError, WriteError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_HIDDEN = ".lean_fx"


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path of the same name in a hidden folder; rename it to ``path`` at the end.

    If the block raises or the process is killed, an existing file at ``path`` stays whole. The new
    one has its permissions; behind a symbolic link the file that it points to is replaced. Further
    files that the block writes beside the yielded path are moved first; meanwhile there is no file
    at ``path``, so that no reader sees old and new files together. Hidden folders left beside
    ``path`` by killed processes are removed.

    Args:
        path: the file to make; its folder must exist.

    Raises:
        WriteError: the folder is missing or read-only, or ``path`` is a folder or a device.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with replacing(folder / "a.txt") as part:
        ...     _ = part.write_text("whole")
        >>> [file.name for file in folder.iterdir()]
        ['a.txt']
    """
    target, folder, lock = _begun(Path(path))
    part = folder / target.name
    try:
        yield part
        others = [each for each in folder.iterdir() if each != part]
        if target.exists():
            shutil.copymode(target, part)
        if others:
            target.unlink(missing_ok=True)
        for each in [*others, part]:
            each.replace(target.parent / each.name)
    except OSError as error:
        if isinstance(error, WriteError):
            raise
        raise WriteError(f"{target}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def _begun(target: Path) -> tuple[Path, Path, int | None]:
    """The file to replace, behind links, the hidden folder beside it, and the folder's lock.

    Raises:
        WriteError: there can be no such file, or no folder beside it.
    """
    try:
        if target.is_dir():
            raise WriteError(f"{target}: is a folder; give the name of a file")
        if target.exists() and not target.is_file():
            raise WriteError(
                f"{target}: is not a file but a device or the like; give the name of a file"
            )
        target = target.resolve() if target.is_symlink() else target
        _remove_left_folders(target.parent)
        return target, *_hidden_folder(target)
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(
            f"{target}: cannot be written ({error.strerror}); give a path in a folder that exists "
            "and that you may write to"
        ) from error
    except (ValueError, RuntimeError) as error:  # a null byte, a loop of links
        raise WriteError(f"{str(target)!r}: is not a path ({error}); give another") from error


def _hidden_folder(target: Path) -> tuple[Path, int | None]:
    """A hidden folder beside a file, and a lock by which others see that its maker is alive."""
    while True:
        prefix = f".{target.stem[:32]}."
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix, suffix=_HIDDEN))
        try:
            lock = _lock(folder)
        except BlockingIOError:  # another writer has found it unlocked, and is removing it
            continue
        if folder.exists():
            return folder, lock
        _unlock(lock)  # another writer has removed it


def _remove_left_folders(parent: Path) -> None:
    """Remove the hidden folders of processes that have ended."""
    for folder in parent.glob(f".*{_HIDDEN}"):
        try:
            lock = _lock(folder)
        except BlockingIOError:  # its maker is alive
            continue
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            _unlock(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder until :func:`_unlock`, or the end of the process; None if it cannot be.

    Raises:
        BlockingIOError: another has locked it.
    """
    if fcntl is None:
        return None
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _unlock(handle)
        raise
    except OSError:  # it is gone, or its file system has no locks
        _unlock(handle)
        return None
    return handle


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` whole or not at all, in UTF-8.

    Raises:
        WriteError: as in :func:`replacing`.
    """
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Check that files can be made in a folder, before the long work that makes them.

    Raises:
        WriteError: they cannot.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise WriteError(
            f"{folder}: cannot be written ({error.strerror}); give a folder that you may write to"
        ) from error


def as_folder(path: str | os.PathLike[str]) -> Path:
    """The path of a folder, which need not be there.

    Raises:
        ArgumentError: it is not a path.

    Example:
        >>> as_folder("runs").name
        'runs'
    """
    if not isinstance(path, str | os.PathLike) or "\0" in os.fspath(path):
        raise ArgumentError(f"folder={path!r} is not a path; give the name of a folder")
    return Path(path)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder, and those above it, unless they exist; check that files can be written.

    Raises:
        ArgumentError: it is not a path.
        WriteError: it cannot be made or written to, or a file is in the way.
    """
    folder = as_folder(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(
            f"{folder}: cannot be made ({error.strerror}); give a folder that you may write to"
        ) from error
    check_writable(folder)
    return folder
