"""The progress bar of long work that is counted."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def counted_bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr with the time that is left, to be told how much is done.

    It is silent where stderr is not a terminal, or rich is not installed.

    Args:
        name: of the work.
        total: how many steps it has.

    Example:
        >>> with counted_bar("counting", 2) as show:
        ...     for done in (1, 2):
        ...         show(done)
    """
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    ) as bar:
        task = bar.add_task(name, total=total)
        yield lambda done: bar.update(task, completed=done)
