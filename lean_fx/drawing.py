"""Pictures of models: what a graph computes, its shapes, parameters and MACs, and its reductions.

A picture is a column of boxes in the order in which they run. A box is a node or, in a large model,
a module with all that it does; arcs lead to values that are read further below.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lean_fx.boxes import Box, boxes_of
from lean_fx.capture.side_effects import keeping_rng_state
from lean_fx.checks import check_int, check_path
from lean_fx.errors import ArgumentError, require
from lean_fx.files import replacing
from lean_fx.measure.pictures import colour, new_figure, short
from lean_fx.planning.plans import Plan

_SUFFIXES = (".svg", ".png", ".pdf")
_PLAIN: dict[str, Any] = {"parse_math": False}  # a dollar sign in a name is one
_WIDTH, _HEIGHT, _STEP = 4.4, 0.5, 0.68  # inches of a box, and from one to the next
_MARGIN = 1.1  # inches beside the boxes, for the arcs


def draw(
    models: nn.Module | Plan | Mapping[str, nn.Module | Plan],
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    max_boxes: int = 32,
) -> None:
    """Draw a model, or several side by side, into an SVG, PNG or PDF file.

    Reductions, and modules that hold some, are coloured. Modules are folded into one box each, the
    innermost first, until a column has no more than ``max_boxes``.

    Args:
        models: a model, or models by title, such as the original and the reduced one. A plan may
            stand for the reduced model: it is applied to the first model.
        path: the file to make, named ``*.svg``, ``*.png`` or ``*.pdf``.
        example_inputs: as for :func:`~lean_fx.leanify`; MACs are those of the whole batch.
        max_boxes: of a column, 1 or more; what is outside any module is not folded.

    Raises:
        ArgumentError: there is no model, the file's name ends otherwise, or the inputs do not fit.
        CaptureError: a model cannot be traced.
        PlanError: a plan does not fit the first model.
        MissingDependencyError: matplotlib is not installed.
        WriteError: the file cannot be written.

    Example::

        lean = lean_fx.leanify(model, inputs, channels=10)
        lean_fx.draw({"before": model, "after": lean}, "net.svg", inputs)
    """
    check_path("draw", path)
    file = Path(path)
    if file.suffix not in _SUFFIXES:
        raise ArgumentError(f"draw: path={str(path)!r} does not end in {', '.join(_SUFFIXES)}")
    most = check_int("draw: max_boxes", max_boxes, 1)
    named = dict(models) if isinstance(models, Mapping) else {"": models}
    if not named:
        raise ArgumentError("draw: models is empty; give a model, or models by title")
    with keeping_rng_state():
        columns = {
            title: boxes_of(model, example_inputs, most)
            for title, model in _with_plans_applied(named, example_inputs).items()
        }
    figure = _picture(columns)
    with replacing(file) as part:
        figure.savefig(part, format=file.suffix[1:], dpi=110)


def _with_plans_applied(
    named: Mapping[str, nn.Module | Plan], example_inputs: Any
) -> dict[str, nn.Module]:
    model = next((each for each in named.values() if not isinstance(each, Plan)), None)
    if model is None:
        raise ArgumentError(
            "draw: a plan does not hold its model; give both: {'before': model, 'after': plan}"
        )
    return {
        title: each.apply(model, example_inputs) if isinstance(each, Plan) else each
        for title, each in named.items()
    }


def _picture(columns: Mapping[str, list[Box]]) -> Any:
    longest = max(len(boxes) for boxes in columns.values())
    width, height = len(columns) * (_WIDTH + _MARGIN) + 0.3, _STEP * longest + 0.9
    figure, axes = new_figure(width, height, 1, len(columns))
    for ax, (title, boxes) in zip(axes, columns.items(), strict=True):
        ax.set_axis_off()
        ax.set_xlim(-0.1, _WIDTH + _MARGIN)
        ax.set_ylim(-_STEP * longest, 0.35)
        total = f"{sum(box.parameters for box in boxes):,} parameters, "
        total += f"{short(sum(box.macs for box in boxes) / 1e6)} million MACs"
        ax.set_title(f"{title}: {total}" if title else total, loc="left", fontsize=10, **_PLAIN)
        for number, box in enumerate(boxes):
            _draw_box(ax, number, box)
            for source in box.sources:
                _draw_arrow(ax, source, number)
    return figure


def _draw_box(ax: Any, number: int, box: Box) -> None:
    patches = require("matplotlib.patches", extra="examples", purpose="drawing")
    top = -_STEP * number
    reduced = box.reductions > 0
    ax.add_patch(
        patches.FancyBboxPatch(
            (0, top - _HEIGHT),
            _WIDTH,
            _HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.06",
            edgecolor=colour(1) if reduced else "0.55",
            facecolor="#FBE6D6" if reduced else "0.97",
            linewidth=1.4 if reduced else 0.8,
        )
    )
    count = ""
    if reduced and box.parts > 1:
        count = f", {box.reductions} reduction{'s' if box.reductions > 1 else ''}"
    shape = "" if box.shape is None else " x ".join(map(str, box.shape))
    figures = [f"{box.parameters:,} parameters"] if box.parameters else []
    figures += [f"{short(box.macs / 1e6)} M MACs"] if box.macs else []
    lines = ((box.name, f"{box.kind}{count}"), (shape, ", ".join(figures)))
    for (left, right), below, grey in zip(lines, (0.15, 0.36), ("0", "0.35"), strict=True):
        style = {"fontsize": 8, "va": "center", "color": grey}
        ax.text(0.08, top - below, left, **style, **_PLAIN)
        ax.text(_WIDTH - 0.08, top - below, right, ha="right", **style, **_PLAIN)


def _draw_arrow(ax: Any, source: int, target: int) -> None:
    """A short arrow to the next box; an arc beside the boxes to one further down."""
    if target == source + 1:
        start = (_WIDTH / 2, -_STEP * source - _HEIGHT)
        end = (_WIDTH / 2, -_STEP * target)
        curve = 0.0
    else:
        start = (_WIDTH, -_STEP * source - _HEIGHT / 2)
        end = (_WIDTH, -_STEP * target - _HEIGHT / 2)
        curve = -min(0.5, 1.6 / (target - source))
    style = {"arrowstyle": "-|>", "color": "0.45", "lw": 0.9, "shrinkA": 0, "shrinkB": 0}
    style["connectionstyle"] = f"arc3,rad={curve:.3f}"
    ax.annotate("", end, start, arrowprops=style)
