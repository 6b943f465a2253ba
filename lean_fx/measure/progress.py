"""A progress bar for long work in steps."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def counted_bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr, with the remaining time; yield a function that advances it.

    Nothing is shown if stderr is not a terminal, or rich is not installed.

    Args:
        name: the name of the work.
        total: the number of its steps.

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
