"""The pictures of the evidence: loss and accuracy by epoch, accuracy against costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lean_fx.errors import require
from lean_fx.experiment.study_report import front
from lean_fx.files import replacing
from support.evidence.arms import Part
from support.evidence.rows import COSTS, Row


def draw_curves(part: Part, rows: Sequence[Row], path: Path) -> None:
    """Draw loss and accuracy by epoch, means over the seeds."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(13, 5))
    done = [row for row in rows if row.finals]
    for row, colour in zip(done, _colours(plt, len(done)), strict=True):
        for axis, key in zip(axes, ("loss", "accuracy"), strict=True):
            for kind, line in (("test", "-"), ("train", ":")):
                values = _mean_curve([run[f"{kind}_{key}"] for run in row.finals])
                label = row.arm if (kind, key) == ("test", "accuracy") else None
                axis.plot(range(1, len(values) + 1), values, line, color=colour, label=label)
    losses = [run["test_loss"][0] for row in done for run in row.finals if run["test_loss"][0]]
    axes[0].set(ylabel="cross-entropy", ylim=(0, 1.5 * max(losses, default=2.3)))
    axes[1].set(ylabel="accuracy")
    for axis in axes:
        axis.set(xlabel="epoch", title=f"{part.name}: test (solid), training (dotted)")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    _save(plt, figure, path)


def draw_fronts(part: Part, rows: Sequence[Row], path: Path) -> None:
    """Draw accuracy against parameters and, where the nets were timed, against latency."""
    plt = _pyplot()
    done = [row for row in rows if row.finals]
    shown = {cost: [row for row in done if not math.isnan(of(row))] for cost, of in COSTS.items()}
    shown = {cost: rows for cost, rows in shown.items() if rows}
    figure, axes = plt.subplots(
        1, len(shown), figsize=(6.5 * len(shown), 5.5), squeeze=False, sharey=True
    )
    colours = dict(zip((row.arm for row in done), _colours(plt, len(done)), strict=True))
    for axis, (cost, drawn) in zip(axes[0], shown.items(), strict=True):
        value = COSTS[cost]
        for row in drawn:
            mean, error = row.last()
            axis.errorbar(
                value(row),
                mean,
                yerr=0 if math.isnan(error) else error,
                fmt="o" if row.is_lean else "s",
                color=colours[row.arm],
                label=row.arm,
                capsize=3,
            )
        line = front([(value(row), row.last()[0]) for row in drawn])
        axis.plot(*zip(*line, strict=True), color="0.6", linewidth=1, zorder=0, label="front")
        axis.set(xscale="log", xlabel="latency, baseline = 1" if cost == "latency" else cost)
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set(ylabel="test accuracy, %")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"{part.name}: LEAN (circles), others (squares)")
    _save(plt, figure, path)


def _pyplot() -> Any:
    require("matplotlib", extra="examples", purpose="the report").use("Agg")
    return require("matplotlib.pyplot", extra="examples", purpose="the report")


def _colours(plt: Any, count: int) -> list[Any]:
    table = plt.get_cmap("tab20" if count > 10 else "tab10")
    return [table(number % table.N) for number in range(count)]


def _save(plt: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    with replacing(path) as part:
        figure.savefig(part, dpi=110)
    plt.close(figure)


def _mean_curve(curves: Sequence[Sequence[float | None]]) -> list[float]:
    """The mean over the seeds at each epoch; NaN where one has none."""
    return [
        sum(math.nan if value is None else value for value in column) / len(column)
        for column in zip(*curves, strict=True)
    ]
