"""A plan as a table of plain text."""

from __future__ import annotations

from collections.abc import Sequence

from lean_fx.graph.sites import Consumer, Site
from lean_fx.planning.plans import Plan
from lean_fx.reduction.registry import reduction_name


def plan_table(plan: Plan) -> str:
    """The lines that ``print(plan)`` shows."""
    count = sum(len(site.consumers) for site in plan.sites)
    layers = sum(each.reason.code != "within_stack" for each in plan.left_alone) + count
    plural = "" if len(plan.sites) == 1 else "s"
    head = (
        f"Plan for {plan.model}: {len(plan.sites)} reduction{plural} "
        f"({reduction_name(plan.reduction)}) before {count} of {layers} "
        "layers"
    )
    lines = [head]
    if plan.sites:
        before = sum(consumer.weights for site in plan.sites for consumer in site.consumers)
        after = sum(_after(c, site) for site in plan.sites for c in site.consumers)
        lines.append(
            f"their weights: {before:,} -> {after:,}, of {plan.parameters:,} parameters in all"
        )
    if plan.split_layers:
        lines.append(f"split into single layers: {', '.join(plan.split_layers)}")
    if plan.weights:
        lines.append(f"parameters made layers: {', '.join(plan.weights)}")
    if plan.sites:
        header = ("value", "sign", "MACs", "layer", "type", "channels", "weights", "note")
        lines += _aligned([header, *(row for site in plan.sites for row in _rows(site))])
    if plan.left_alone:
        lines.append("left alone")
        lines += _aligned([(each.layer, each.kind, each.reason.text) for each in plan.left_alone])
    return "\n".join(lines)


def _rows(site: Site) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for consumer in site.consumers:
        rows.append(
            (
                "" if rows else site.value or "its input",
                "" if rows else (">= 0" if site.nonnegative else "any"),
                "" if rows or site.macs is None else f"{site.macs:,}",
                consumer.layer,
                consumer.kind,
                f"{site.in_channels} -> {site.out_channels}"
                + (f" in {site.groups} groups" if site.groups > 1 else ""),
                f"{consumer.weights:,} -> {_after(consumer, site):,}",
                "" if rows else site.note,
            )
        )
    return rows


def _after(consumer: Consumer, site: Site) -> int:
    return consumer.weights * (site.out_channels or 0) // site.in_channels


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
