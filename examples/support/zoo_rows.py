"""What is known of one model of the zoo: a row, and the file that it is kept in."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from lean_fx.errors import DataError
from lean_fx.files import write_text

#: What is asked of a model, in order; :mod:`~support.zoo_rings` says what each means.
RINGS = (
    *("baseline", "captured", "leanified", "runs", "trains"),
    *("quick", "exported", "cheaper", "faster"),
)
#: How a ring can end; a crash is an error that is none of lean_fx's own.
STATUSES = ("ok", "skip", "fail", "crash")


@dataclass
class Ring:
    """How a ring ended.

    Attributes:
        status: one of ``STATUSES``, or ``"running"``.
        reason: one line; empty if it went well.
        seconds: that it took.
    """

    status: str
    reason: str = ""
    seconds: float = 0.0


@dataclass
class Row:
    """What is known of one model.

    Attributes:
        model: its name.
        rings: by name, in order, as far as it came.
        numbers: what was counted and timed, by name.
        reasons: of the call sites that were not reduced, how often each.
        ended: empty while it runs; then ``"done"``, or how its process ended before.
    """

    model: str
    rings: dict[str, Ring] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    ended: str = ""


def write_row(row: Row, file: Path) -> None:
    """Write a row as JSON, whole or not at all.

    Raises:
        WriteError: the file cannot be written.
    """
    write_text(file, json.dumps(dataclasses.asdict(row), indent=1))


def read_row(file: Path) -> Row:
    """Read what :func:`write_row` wrote.

    Raises:
        DataError: the file is no such row.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        rings = {name: Ring(**ring) for name, ring in content.pop("rings").items()}
        return Row(rings=rings, **content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{file}: is not a row of the zoo ({error}); move it away") from error
