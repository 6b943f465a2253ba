"""The progress bar of long work that is counted."""

from __future__ import annotations

from typing import Any

from lean_fx.errors import require


class CountedBar:
    """A progress bar on stderr with the time that is left; silent where it is no terminal."""

    def __init__(self, name: str, total: int) -> None:
        progress = require("rich.progress", extra="examples", purpose="the progress bar")
        console = require("rich.console", extra="examples", purpose="the progress bar")
        terminal = console.Console(stderr=True)
        self._progress = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=terminal,
            disable=not terminal.is_terminal,
        )
        self._task = self._progress.add_task(name, total=total)

    def __enter__(self) -> Any:
        self._progress.start()
        return lambda done: self._progress.update(self._task, completed=done)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
