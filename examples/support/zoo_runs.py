"""The models of the zoo one after another, each in a process of its own, over restarts.

Every model has a file ``models/<name>.json``. One that has ended is not asked again, unless more
rings are wanted than it has, or failures are to be repeated. A process that dies, or takes too
long, becomes a row that says so.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from lean_fx.checks import check_choice, check_int
from lean_fx.errors import ArgumentError
from lean_fx.files import make_folder
from support.zoo_rows import RINGS, Row, read_row, write_row


def row_file(folder: Path, name: str) -> Path:
    """Where the row of a model is.

    Example:
        >>> row_file(Path("runs"), "timm/vit_tiny").as_posix()
        'runs/models/timm.vit_tiny.json'
    """
    return folder / "models" / f"{name.replace('/', '.').replace(':', '.')}.json"


def rings_upto(last: str) -> tuple[str, ...]:
    """The rings up to one of them.

    Raises:
        ArgumentError: there is no such ring.

    Example:
        >>> rings_upto("captured")
        ('baseline', 'captured')
    """
    check_choice("rings", last, RINGS)
    return RINGS[: RINGS.index(last) + 1]


def read_rows(names: Iterable[str], folder: Path) -> list[Row]:
    """The rows that are there already, in the order of the names.

    Raises:
        DataError: a file there is no row.
    """
    files = (row_file(folder, name) for name in names)
    return [read_row(file) for file in files if file.exists()]


def is_finished(row: Row, rings: Sequence[str], again: bool = False) -> bool:
    """Whether a row needs no further run.

    Args:
        row: as it was read.
        rings: that are wanted.
        again: whether what failed is to be run again.
    """
    if not row.ended:
        return False
    failed = row.ended != "done" or any(
        row.rings[ring].status in ("fail", "crash") for ring in rings if ring in row.rings
    )
    if failed and again:
        return False
    return row.ended != "done" or all(ring in row.rings for ring in rings)


def run_zoo(
    names: Iterable[str],
    folder: Path,
    *,
    upto: str = RINGS[-1],
    jobs: int = 1,
    timeout_s: float = 900.0,
    again: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Row]:
    """Ask every model that is not finished.

    Args:
        names: of the models.
        folder: where the rows are, and are written.
        upto: the last ring that is asked.
        jobs: processes at a time, 1 or more; latencies want 1.
        timeout_s: seconds that one model may take.
        again: ask again those that failed.
        progress: called after each model with its name, the models done and all.

    Returns:
        The rows, in the order of the names.

    Raises:
        ArgumentError: a number is out of range, or there is no such ring.
        DataError: a file there is no row.
        WriteError: the folder cannot be written.
    """
    rings = rings_upto(upto)
    check_int("jobs", jobs, 1)
    if not timeout_s >= 1:
        raise ArgumentError(f"timeout={timeout_s!r} is not 1 second or more")
    wanted = list(names)
    make_folder(folder / "models")
    rows = {row.model: row for row in read_rows(wanted, folder)}
    todo = [name for name in wanted if not (name in rows and is_finished(rows[name], rings, again))]
    pool = ThreadPoolExecutor(jobs)
    try:
        asked = {
            pool.submit(ask, name, row_file(folder, name), upto, timeout_s): name for name in todo
        }
        for done, future in enumerate(as_completed(asked), start=1):
            rows[asked[future]] = future.result()
            if progress is not None:
                progress(asked[future], done, len(todo))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [rows[name] for name in wanted]


def ask(name: str, file: Path, upto: str, timeout_s: float) -> Row:
    """Ask one model in a process of its own, whatever becomes of that.

    Returns:
        The row, which is in the file too.
    """
    write_row(Row(name), file)
    end = run_module("support.zoo_rings", [name, str(file), "--upto", upto], timeout_s)
    row = read_row(file)
    interrupted = end == "killed by SIGINT"  # Ctrl-C goes to all processes of a terminal
    if not row.ended and not interrupted:
        row.ended = end or "ended without a word"
        for ring in row.rings.values():
            if ring.status == "running":
                ring.status, ring.reason = "crash", row.ended
        write_row(row, file)
    return row


def run_module(module: str, arguments: Sequence[str], timeout_s: float) -> str:
    """Run a module of the examples in a process of its own, on one thread.

    Returns:
        How it ended; empty if it went well.
    """
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _path()},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {timeout_s:g} s"
    return "" if done.returncode == 0 else _death(done.returncode, done.stderr)


def _path() -> str:
    """Where a process finds this package too."""
    mine = str(Path(__file__).parents[1])
    return os.pathsep.join(filter(None, (mine, os.environ.get("PYTHONPATH"))))


def _death(status: int, errors: str) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return f"ended with status {status}: {lines[-1][:300] if lines else 'no word'}"
