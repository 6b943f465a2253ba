"""The arms of the evidence with what their runs left."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from support.evidence.arms import Part


@dataclass(frozen=True)
class Row:
    """An arm with its runs.

    Args:
        part: name of the part.
        arm: name of the arm.
        searches: the runs that choose its rate.
        finals: the runs that count.
        latency: of its net, as a share of the baseline's; NaN if it was not timed.
        error: of the first run that failed.
    """

    part: str
    arm: str
    searches: list[dict[str, Any]]
    finals: list[dict[str, Any]]
    latency: float = math.nan
    error: str = ""

    @property
    def is_lean(self) -> bool:
        """Whether it is a form of LEAN."""
        return self.arm.startswith("lean")

    @property
    def parameters(self) -> int:
        """Of its net."""
        return int((self.finals or self.searches)[0]["parameters"])

    @property
    def macs(self) -> int:
        """Multiply-adds of a picture."""
        return int((self.finals or self.searches)[0]["macs"])

    def last(self, key: str = "test_accuracy") -> tuple[float, float]:
        """Mean over the seeds after the last epoch, and its standard error, in percent."""
        return mean_and_error([100 * run[key][-1] for run in self.finals])


#: What accuracy is weighed against.
COSTS: Mapping[str, Callable[[Row], float]] = {
    "parameters": lambda row: row.parameters,
    "latency": lambda row: row.latency,
}


def rows_of(
    part: Part, results: Sequence[dict[str, Any]], latencies: Mapping[str, float]
) -> list[Row]:
    """A row for each arm of a part that has runs.

    Args:
        part: whose arms.
        results: what the runs of all parts left.
        latencies: of the nets, as shares of the baseline's, by arm.
    """
    rows = []
    for arm in part.arms:
        runs = [r for r in results if r["part"] == part.name and r["arm"] == arm.name]
        good = [run for run in runs if not run.get("error")]
        searches = [run for run in good if run["split"] == "validation"]
        finals = [run for run in good if run["split"] == "test"]
        if finals:  # of one rate and length, should others lie there too
            kind = Counter((run["rate"], run["epochs"]) for run in finals).most_common(1)[0][0]
            finals = [run for run in finals if (run["rate"], run["epochs"]) == kind]
        errors = [str(run["error"]) for run in runs if run.get("error")]
        if runs:
            latency = latencies.get(arm.name, math.nan)
            error = errors[0] if errors else ""
            rows.append(Row(part.name, arm.name, searches, finals, latency, error))
    return rows


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error: NaN for one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    squares = sum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (len(values) - 1) / len(values))


def with_error(mean: float, error: float) -> str:
    """A mean and its standard error, if there is one, as a table shows them.

    Example:
        >>> with_error(*mean_and_error([1.0, 3.0])), with_error(*mean_and_error([1.0]))
        ('2.0 ± 1.0', '1.0')
    """
    return f"{mean:.1f}" if math.isnan(error) else f"{mean:.1f} ± {error:.1f}"
