"""Rows of text as a table: for a terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lean_fx.errors import require

if TYPE_CHECKING:
    from rich.table import Table


def rich_table(rows: Sequence[Sequence[str]], notes: Sequence[str], title: str = "") -> Table:
    """A table for a terminal; the first row is its head, the first column its labels.

    Raises:
        MissingDependencyError: rich is not installed.
    """
    text = require("rich.text", extra="examples", purpose="the table").Text
    table: Table = require("rich.table", extra="examples", purpose="the table").Table(
        title=text(title) if title else None,
        caption=text("\n".join(notes)),
        caption_justify="left",
        box=require("rich.box", extra="examples", purpose="the table").SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    head, *others = rows
    for cell in head:
        table.add_column(text(cell), justify="right" if cell else "left", overflow="fold")
    for row in others:
        table.add_row(*map(text, row))
    return table


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The same in Markdown, a bar within a cell escaped.

    Example:
        >>> print(markdown_table([("", "a"), ("size", "12")]))
        |  | a |
        | --- | ---: |
        | size | 12 |
    """
    head, *others = rows
    lines = [head, ("---", *("---:" for _ in head[1:])), *others]
    cells = [[cell.strip().replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
