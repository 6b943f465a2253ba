"""The rows of the zoo as a CSV file, and as a report in Markdown."""

from __future__ import annotations

import csv
import io
import statistics
from collections import Counter
from collections.abc import Sequence

from lean_fx.measure.tables import markdown_table
from support.zoo_rows import RINGS, Row

NUMBERS = (
    *("size", "sizes", "calls", "sites", "sites_reduced", "reductions"),
    *("parameters", "parameters_lean", "macs", "macs_lean"),
    *("leanify_s", "trace_s", "median_ms", "median_ms_lean", "dynamic_batch"),
)
_KINDS = ("conv", "depthwise", "linear", "attention", "recurrent")


def csv_text(rows: Sequence[Row]) -> str:
    """A line a model: how each ring ended, the numbers, the first reason that is not ok.

    Example:
        >>> print(csv_text([Row("a", ended="done")]).splitlines()[1][:6])
        a,done
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("model", "ended", *RINGS, *NUMBERS, "not_reduced", "reason"))
    for row in rows:
        rings = [row.rings[ring].status if ring in row.rings else "" for ring in RINGS]
        numbers = [_short(row.numbers.get(name)) for name in NUMBERS]
        why = "; ".join(f"{count} {reason}" for reason, count in row.reasons.items())
        broken = [each for each in row.rings.values() if each.status not in ("ok", "running")]
        reason = broken[0].reason if broken else ""
        writer.writerow((row.model, row.ended, *rings, *numbers, why, reason))
    return text.getvalue()


def _short(number: float | None) -> str:
    if number is None:
        return ""
    return str(int(number)) if number == int(number) else f"{number:.4g}"


def report(rows: Sequence[Row], heading: Sequence[str] = ()) -> str:
    """The tables: rings, call sites, reasons, times, and what went wrong with which model.

    Args:
        rows: of the models.
        heading: paragraphs to stand under the title.
    """
    parts = ["# The zoo", *heading]
    parts += ["## Rings", markdown_table(_ring_table(rows))]
    parts += ["## Call sites", markdown_table(_site_table(rows))]
    reasons = _reason_table(rows)
    if reasons:
        parts += ["## Why sites are not reduced", markdown_table(reasons)]
    parts += ["## Ratios", markdown_table(_ratio_table(rows))]
    broken = _broken_table(rows)
    if broken:
        parts += ["## What went wrong", markdown_table(broken)]
    return "\n\n".join(parts) + "\n"


def _groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by where the models come from, and all of them where that is several places."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        source = row.model.partition("/")[0] if "/" in row.model else "others"
        groups.setdefault(source, []).append(row)
    return groups | {"all": list(rows)} if len(groups) > 1 else groups


def _ring_table(rows: Sequence[Row]) -> list[list[str]]:
    """Of each group, how many models passed, by ring; skipped ones are named apart."""
    table = [["", "models", *RINGS]]
    for name, group in _groups(rows).items():
        cells = []
        for ring in RINGS:
            ends = Counter(row.rings[ring].status for row in group if ring in row.rings)
            tried = sum(ends.values()) - ends["skip"]
            cell = f"{ends['ok']}/{tried}" if ends else "-"
            cells.append(cell + (f", {ends['skip']} skipped" if ends["skip"] else ""))
        table.append([name, str(len(group)), *cells])
    return table


def _site_table(rows: Sequence[Row]) -> list[list[str]]:
    """Of each group, the calls by kind, the sites and how many of them were reduced."""
    table = [["", *(f"{kind} calls" for kind in _KINDS), "sites", "reduced", "%"]]
    for name, group in _groups(rows).items():
        told = [row.numbers for row in group if "sites_reduced" in row.numbers]
        calls = [sum(int(each.get(f"{kind}_calls", 0)) for each in told) for kind in _KINDS]
        sites, reduced = (
            sum(int(each[key]) for each in told) for key in ("sites", "sites_reduced")
        )
        share = f"{100 * reduced / sites:.1f}" if sites else "-"
        table.append([name, *map(str, calls), str(sites), str(reduced), share])
    return table


def _reason_table(rows: Sequence[Row]) -> list[list[str]]:
    """Every reason, the most frequent first, and the model that has it most often."""
    counts: Counter[str] = Counter()
    models: dict[str, list[tuple[int, str]]] = {}
    for row in rows:
        counts.update(row.reasons)
        for reason, count in row.reasons.items():
            models.setdefault(reason, []).append((count, row.model))
    table = [["reason", "sites", "models", "most in"]]
    for reason, count in counts.most_common():
        most, name = max(models[reason])
        table.append([reason, str(count), str(len(models[reason])), f"{name} ({most})"])
    return table if len(table) > 1 else []


def _ratio_table(rows: Sequence[Row]) -> list[list[str]]:
    """Of each group, the medians over the models of what is before and after."""
    pairs = {
        "leanify / trace and shapes": ("leanify_s", "trace_s"),
        "parameters": ("parameters_lean", "parameters"),
        "MACs": ("macs_lean", "macs"),
        "latency": ("median_ms_lean", "median_ms"),
    }
    table = [["median [least-greatest], models", *pairs]]
    for name, group in _groups(rows).items():
        cells = []
        for above, below in pairs.values():
            ratios = [
                row.numbers[above] / row.numbers[below]
                for row in group
                if above in row.numbers and row.numbers.get(below)
            ]
            cells.append(
                f"{statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}], "
                f"{len(ratios)}"
                if ratios
                else "-"
            )
        table.append([name, *cells])
    return table


def _broken_table(rows: Sequence[Row]) -> list[list[str]]:
    """The first ring of each model that failed or crashed, unless it is one of a ratio."""
    table = [["model", "ring", "end", "reason"]]
    for row in rows:
        for name, ring in row.rings.items():
            if ring.status in ("fail", "crash") and name not in ("quick", "cheaper", "faster"):
                table.append([row.model, name, ring.status, ring.reason])
                break
    return table if len(table) > 1 else []
