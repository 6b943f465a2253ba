"""The pictures of a report: curves by epoch, and the bars of the paper's Figure 3."""

from __future__ import annotations

import functools
import math
import operator
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lean_fx.errors import require

if TYPE_CHECKING:
    from lean_fx.measure.report import Arm

# Okabe and Ito, "Color Universal Design", 2008: told apart by colour-blind readers too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")


def short(value: float) -> str:
    """Write a number with three digits or more, never in powers of ten; "n/a" for NaN.

    Example:
        >>> [short(x) for x in (12345.6, 38.59, 1.5, 0.00123, float("nan"))]
        ['12,346', '38.6', '1.50', '0.00123', 'n/a']
    """
    if math.isnan(value):
        return "n/a"
    if value == 0 or math.isinf(value):
        return f"{value:.2f}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def new_figure(width: float, height: float, rows: int, columns: int) -> tuple[Any, list[Any]]:
    """Make a figure and its axes without pyplot, whose state is the process's."""
    purpose = {"extra": "examples", "purpose": "drawing"}
    figure = require("matplotlib.figure", **purpose).Figure((width, height), layout="constrained")
    require("matplotlib.backends.backend_agg", **purpose).FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def colour(index: int) -> str:
    """The colour of the model with this index; they repeat after eight."""
    return _COLOURS[index % len(_COLOURS)]


def draw_curves(arms: Sequence[Arm]) -> Any:
    """Draw loss and accuracy by epoch, training dashed and test solid; return the figure.

    Of several runs it is the mean; a band shows the range of their tests.
    """
    figure, axes = new_figure(10, 4.4 + 0.2 * (len(arms) // 4), 1, 2)
    panels = (("loss", 1.0, "mean loss"), ("accuracy", 100.0, "accuracy, %"))
    for ax, (field, scale, label) in zip(axes, panels, strict=True):
        for index, arm in enumerate(arms):
            for part, style in (("train", "--"), ("test", "-")):
                by_epoch = [
                    [scale * getattr(epoch, f"{part}_{field}") for epoch in same_epoch]
                    for same_epoch in zip(*arm.runs, strict=True)
                ]
                across = range(1, arm.epochs + 1)
                ax.plot(
                    across,
                    [statistics.mean(values) for values in by_epoch],
                    style,
                    color=colour(index),
                    linewidth=1.6 if part == "test" else 1.1,
                    marker="o" if arm.epochs == 1 else None,
                )
                if part == "test" and len(arm.runs) > 1:
                    low, high = ([end(values) for values in by_epoch] for end in (min, max))
                    ax.fill_between(across, low, high, color=colour(index), alpha=0.2, linewidth=0)
        ax.set(xlabel="epoch", ylabel=label)
        ax.xaxis.get_major_locator().set_params(integer=True)
    line = require("matplotlib.lines", extra="examples", purpose="drawing").Line2D
    handles = [line([], [], color=colour(i), label=arm.name) for i, arm in enumerate(arms)]
    handles += [
        line([], [], color="0.4", linestyle=style, label=label)
        for style, label in (("--", "training"), ("-", "test"))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_bars(arms: Sequence[Arm]) -> Any:
    """Draw the paper's Figure 3 as bars, training beside testing; return the figure."""
    figure, axes = new_figure(max(11.0, 2.2 * len(arms)), 6.6, 2, 3)
    train = [arm.train_energy_per_epoch for arm in arms]
    test = [arm.test_energy for arm in arms]
    accuracy = [100 * arm.train_accuracy for arm in arms]
    groups = ("training,\nper epoch", "testing,\none pass")
    _bars(
        axes[0],
        "Accuracy after the last epoch, %",
        {"training set": accuracy, "test set": [100 * arm.accuracy for arm in arms]},
    )
    energy = functools.reduce(operator.add, train + test)
    meter = f"meter: {energy.meter}{', an estimate' if energy.is_estimate else ''}"
    for ax, title, field, scale in (
        (axes[1], f"Energy, J ({meter})", "energy_j", 1.0),
        (axes[2], f"CO2, mg ({meter})", "co2_g", 1e3),
        (axes[3], "Time, s", "seconds", 1.0),
    ):
        values = ([scale * getattr(item, field) for item in part] for part in (train, test))
        _bars(ax, title, dict(zip(groups, values, strict=True)))
    _bars(axes[4], "Parameters, thousands", {"": [arm.parameters / 1e3 for arm in arms]})
    _bars(axes[5], "MACs of one sample, millions", {"": [arm.macs / 1e6 for arm in arms]})
    figure.legend(
        handles=axes[5].containers,
        labels=[arm.name for arm in arms],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    return figure


def _bars(ax: Any, title: str, groups: dict[str, list[float]]) -> None:
    """Draw a group of bars for every key, one bar an arm, each with its value above it."""
    count = len(next(iter(groups.values())))
    width = 0.8 / count
    crowded = count * len(groups) > 6
    for index in range(count):
        values = [group[index] for group in groups.values()]
        places = [group + (index - (count - 1) / 2) * width for group in range(len(groups))]
        bars = ax.bar(places, values, 0.92 * width, color=colour(index))
        ax.bar_label(
            bars, [short(value) for value in values], padding=3, fontsize=8, rotation=90 * crowded
        )
    ax.set_title(title, fontsize=10, loc="left")
    ax.set_xticks(range(len(groups)), list(groups))
    ax.tick_params(axis="x", length=0)
    ax.margins(x=0.05 if len(groups) > 1 else 0.3, y=0.25 if crowded else 0.1)
