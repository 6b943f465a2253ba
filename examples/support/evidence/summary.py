"""From the files of the runs to tables, bars and pictures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lean_fx.errors import DataError
from lean_fx.experiment.study_report import front
from lean_fx.files import make_folder, write_text
from support.evidence.arms import BESIDE, LIMIT, PARTS, Part
from support.evidence.curves import draw_curves, draw_fronts
from support.evidence.latency import read_latencies, shares
from support.evidence.rows import COSTS, Row, rows_of, with_error
from support.evidence.runs import chosen_rate, read_results, score
from support.script import command_line

_CONTROLS = ("slice", "mean", "grouped_sum", "projection", "narrow", "bottleneck")
_NARROWER = {"narrow": "the narrower net", "as_fast": "the narrower net as fast as lean_damped"}


def report(folder: Path, out: str | Path, commit: str = "") -> str:
    """Write ``evidence.md`` and its pictures; return the text.

    Args:
        folder: of the runs.
        out: where to.
        commit: whose runs, one commit or several separated by commas; by default the one with
            most of them.

    Raises:
        DataError: there is no run.
    """
    results = read_results(folder)
    commits = Counter(result["commit"] for result in results)
    if not commits:
        raise DataError(f"{folder}: holds no runs; give the folder of some by --out")
    taken = commit.split(",") if commit else [commits.most_common(1)[0][0]]
    results = [result for result in results if result["commit"] in taken]
    timed = {part.name: read_latencies(folder, part.name) for part in PARTS}
    tables = {part.name: rows_of(part, results, shares(timed[part.name])) for part in PARTS}
    target = make_folder(out)
    lines = ["# Accuracy of LEAN, its controls and narrower nets", ""]
    lines += _preamble(results, taken, commits)
    for part in PARTS:
        rows = tables[part.name]
        if not rows:
            continue
        about = _about(part, rows, timed[part.name])
        trained = any(row.finals for row in rows)
        rows = [row for row in tables.get(part.baseline, []) if row.arm in BESIDE] + rows
        lines += [f"## {part.name}", "", about, "", *_table(rows), "", *_bars(part, rows), ""]
        if trained:
            draw_curves(part, rows, target / f"{part.name}_curves.png")
            draw_fronts(part, rows, target / f"{part.name}_fronts.png")
            lines += [f"![loss and accuracy]({part.name}_curves.png)", ""]
            lines += [f"![accuracy against parameters and latency]({part.name}_fronts.png)", ""]
    text = "\n".join(lines).rstrip() + "\n"
    write_text(target / "evidence.md", text)
    return text


def _preamble(results: list[dict[str, Any]], taken: list[str], commits: Counter[str]) -> list[str]:
    good = [result for result in results if not result.get("error")]
    made_by = sorted({(r["device"], r["torch"], r["precision"]) for r in good})
    lines = [f"```\n{command_line()}\n```", ""]
    lines.append(
        f"STL-10, official files, from scratch; commit {' and '.join(taken)}, {len(good)} runs; "
        + "; ".join(
            f"{device}, torch {version}, {precision}" for device, version, precision in made_by
        )
        + "."
    )
    others = ", ".join(f"{name} ({n})" for name, n in commits.items() if name not in taken)
    if others:
        lines.append(f"Runs of other commits lie beside these and are not counted: {others}.")
    lines += [
        "",
        "Every arm: batches of 64, Adam, the rate rises over 1/20 of the steps and falls to 0 as "
        "a cosine. The rate is the best of those tried (all are listed, an asterisk marks an end "
        "of the list) on a fixed 1,000 of the 5,000 training pictures, one seed, by the mean "
        "accuracy of the last three epochs. The runs that count see all 5,000; accuracy is that "
        "on the 8,000 test pictures after the last epoch, mean ± standard error over the seeds. "
        "Training figures are means over the last epoch's own steps.",
    ]
    graphs = Counter(bool(result.get("graph")) for result in good)
    if graphs[False] and graphs[True]:
        lines.append(f"{graphs[False]} of the runs ran without CUDA graphs, as their files say.")
    lines.append("")
    return lines


def _about(part: Part, rows: list[Row], timed: Mapping[str, Any]) -> str:
    finals = [run for row in rows for run in row.finals]
    searches = [run for row in rows for run in row.searches]
    epochs = sorted({run["epochs"] for run in finals})
    tried = sorted({run["epochs"] for run in searches})
    moves = ", with flips and shifts" if part.augment else ""
    pixels = sorted({run["pixels"] for run in finals + searches})
    lengths = (
        f"{_listed(epochs)} epochs, {_listed(tried)}" if epochs else f"{_listed(tried)} epochs"
    )
    text = (
        f"{part.net} net, pictures of {_listed(pixels)} pixels{moves}; {lengths} to choose the "
        "rate."
    )
    if part.best and finals:
        text += (
            f" All settings were tried in validation; the best {part.best} of no more than "
            f"{LIMIT:,} parameters were trained to the end."
        )
    elif part.best:
        text += " All settings were tried in validation; none was trained to the end."
    if timed:
        text += (
            f" Latency: of one picture in ONNX Runtime, one thread, as a share of the baseline's; "
            f"medians of {timed['rounds']} rounds in turn on {timed['machine']}, LEAN nodes "
            f"{timed['lean_nodes']}."
        )
    return text


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| arm | parameters | MACs, million | latency | rate | tried | validation | seeds "
        "| test accuracy, % | training, % | of baseline, % |",
        "|---|---:|---:|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    base = _baseline(rows)
    for row in rows:
        if not row.searches and not row.finals:
            lines.append(f"| {row.arm} | | | | | | | | error: {row.error} | | |")
            continue
        rates = sorted(run["rate"] for run in row.searches)
        rate = row.finals[0]["rate"] if row.finals else chosen_rate(row.searches)
        shown = "" if rate is None else f"{rate:g}"
        if rates and rate in (rates[0], rates[-1]):
            shown += "*"
        valid = f"{100 * max(map(score, row.searches)):.1f}" if row.searches else ""
        cells = ["", "", ""]
        if row.finals:
            (mean, error), (train, _) = row.last(), row.last("train_accuracy")
            cells = [
                with_error(mean, error),
                f"{train:.1f}",
                f"{100 * mean / base:.1f}" if base else "",
            ]
        latency = "" if math.isnan(row.latency) else f"{row.latency:.2f}"
        lines.append(
            f"| {row.arm} | {row.parameters:,} | {row.macs / 1e6:.2f} | {latency} | {shown} "
            f"| {', '.join(f'{each:g}' for each in rates)} | {valid} | {len(row.finals)} "
            f"| {' | '.join(cells)} |"
        )
    return lines


def _bars(part: Part, rows: Sequence[Row]) -> list[str]:
    """What is met and what is not, in words."""
    done = [row for row in rows if row.finals]
    lean = [row for row in done if row.is_lean]
    base = _baseline(rows)
    lines = []
    small = [row for row in lean if row.parameters <= LIMIT]
    if part.net == "paper" and base and small:
        best = max(small, key=lambda row: row.last()[0])
        share = 100 * best.last()[0] / base
        lines.append(
            f"- 95 % of the baseline with at most {LIMIT:,} parameters: "
            f"{'met' if share >= 95 else 'not met'}; the best is {best.arm}, "
            f"{best.parameters:,} parameters, {share:.1f} %."
        )
    for row in lean:
        for other in done:
            if other.arm in _NARROWER:
                lines.append(f"- {row.arm} {_against(row, other)} {_NARROWER[other.arm]}.")
        controls = [each for each in done if each.arm in _CONTROLS]
        if controls:
            strongest = max(controls, key=lambda each: each.last()[0])
            against = _against(row, strongest)
            lines.append(f"- {row.arm} {against} the best control, {strongest.arm}.")
    for cost, value in COSTS.items():
        drawn = [row for row in done if not math.isnan(value(row))]
        kept = front([(value(row), row.last()[0]) for row in drawn])
        names = [row.arm for row in drawn if (value(row), row.last()[0]) in kept]
        if names:
            lines.append(f"- On the front of accuracy against {cost}: {', '.join(names)}.")
    return lines


def _against(row: Row, other: Row) -> str:
    (mine, error), (theirs, their_error) = row.last(), other.last()
    gap, width = mine - theirs, math.hypot(error, their_error)
    # Two standard errors; with one seed there are none.
    if math.isnan(width):
        return f"ends {gap:+.1f} points (one seed) from"
    word = "ties with" if abs(gap) <= 2 * width else "is above" if gap > 0 else "is below"
    return f"({with_error(gap, width)} points) {word}"


def _baseline(rows: Sequence[Row]) -> float:
    found = [row.last()[0] for row in rows if row.arm == "baseline" and row.finals]
    return found[0] if found else 0.0


def _listed(values: Sequence[int]) -> str:
    return " and ".join(map(str, values)) or "no"
