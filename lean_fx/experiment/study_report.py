"""The results of a study: CSV, Markdown, the fronts of accuracy, and parallel coordinates."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lean_fx.errors import require
from lean_fx.experiment.study import Study
from lean_fx.experiment.study_database import Row
from lean_fx.experiment.trials import Outcome
from lean_fx.files import make_folder, replacing, write_text
from lean_fx.measure.machines import machine
from lean_fx.measure.pictures import colour, new_figure, short

_OWN = ("trial", "state", "arm", "channels", "sites", "options", "learning_rate", "seed")
_MEASURED = tuple(field.name for field in dataclasses.fields(Outcome))


@dataclasses.dataclass(frozen=True)
class Group:
    """The rows of a configuration, seeds aside.

    Attributes:
        name: of the configuration.
        arm: of the configuration.
        rows: those of one state, at least one.
    """

    name: str
    arm: str
    rows: tuple[Outcome, ...]

    @property
    def accuracy(self) -> float:
        """The mean over the seeds."""
        return statistics.mean(row.accuracy for row in self.rows)

    @property
    def standard_error(self) -> float:
        """Of that mean; NaN for a single seed."""
        if len(self.rows) < 2:
            return math.nan
        spread = statistics.stdev(row.accuracy for row in self.rows)
        return spread / math.sqrt(len(self.rows))

    def median(self, field: str) -> float:
        """The median of a figure over the seeds."""
        return statistics.median(float(getattr(row, field)) for row in self.rows)


def groups(rows: Sequence[Row], state: str = "complete") -> list[Group]:
    """The rows of a state by configuration, the most accurate first."""
    found: dict[tuple[str, str], list[Outcome]] = {}
    for row in rows:
        if row.state == state and row.outcome is not None:
            key = (row.configuration.name, row.configuration.arm)
            found.setdefault(key, []).append(row.outcome)
    made = [Group(name, arm, tuple(outcomes)) for (name, arm), outcomes in found.items()]
    return sorted(made, key=lambda group: -group.accuracy)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, accuracy) that no other beats in both, by cost.

    Example:
        >>> front([(1.0, 0.5), (2.0, 0.4), (3.0, 0.9)])
        [(1.0, 0.5), (3.0, 0.9)]
    """
    kept: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not kept or accuracy > kept[-1][1]:
            kept.append((cost, accuracy))
    return kept


def write_report(study: Study, rows: Sequence[Row], command: str = "") -> Path:
    """Write ``study.csv``, ``study.md``, ``fronts.png`` and ``parallel.png`` to a study's folder.

    Args:
        study: to report on.
        rows: its finished trials, and what was retrained.
        command: that a reader can run to make it again.

    Returns:
        The Markdown file. The pictures are left out while no trial is complete.

    Raises:
        WriteError: a file cannot be written.
        DataError: the database cannot be reached.
    """
    folder = make_folder(study.folder)
    write_text(folder / "study.csv", as_csv(rows))
    found = groups(rows)
    if found:
        for name, figure in (("fronts", draw_fronts(found)), ("parallel", _parallel(study))):
            with replacing(folder / f"{name}.png") as part:
                figure.savefig(part, format="png", dpi=150)
    write_text(folder / "study.md", as_markdown(study, rows, command))
    return folder / "study.md"


def as_csv(rows: Sequence[Row]) -> str:
    """A line a trial, failed ones with their errors."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*_OWN, *_MEASURED, "error"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        own = dataclasses.asdict(row.configuration)
        own["options"] = " ".join(f"{name}={value}" for name, value in row.configuration.options)
        measured = dataclasses.asdict(row.outcome) if row.outcome is not None else {}
        trial = {"trial": row.trial, "state": row.state, "error": row.error}
        writer.writerow(trial | own | measured)
    return text.getvalue()


def as_json(rows: Sequence[Row]) -> str:
    """A list of the trials; what was not measured is null, or missing if the trial failed."""
    every = [dataclasses.asdict(row) for row in rows]
    for row in every:
        row["outcome"] = {
            name: None if value != value else value  # NaN is not JSON
            for name, value in (row["outcome"] or {}).items()
        }
    return json.dumps(every)


def as_markdown(study: Study, rows: Sequence[Row], command: str = "") -> str:
    """A table of the configurations, the most accurate first, and what failed."""
    where = "a held-out fifth of the train split" if study.held_out else "the test split"
    states = [row.state for row in rows]
    lines = [
        f"# {study.name}\n",
        *([f"```\n{command}\n```\n"] if command else []),
        f"{machine()}; {study.settings.epochs} epochs; accuracy on {where}, mean and standard error"
        f" over the seeds; {states.count('complete')} trials complete, {states.count('pruned')} "
        f"pruned, {states.count('failed')} failed.\n",
        *_configurations(rows),
        *_retrained(groups(rows, "retrained")),
    ]
    failed = [row for row in rows if row.state == "failed"]
    if failed:
        lines += ["\n## Failed\n"]
        lines += [f"- {row.configuration.name}: {row.error}" for row in failed]
    return "\n".join(lines) + "\n"


def _configurations(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| configuration | seeds | accuracy, % | parameters | MACs | latency, ratio | energy, J |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for group in groups(rows):
        latency, energy = group.median("latency_ratio"), group.median("energy_j")
        lines.append(
            f"| {group.name} | {len(group.rows)} | {_accuracy(group)} "
            f"| {group.median('parameters'):,.0f} | {group.median('macs'):,.0f} "
            f"| {'' if math.isnan(latency) else f'{latency:.2f}'} "
            f"| {'' if math.isnan(energy) else short(energy)} |"
        )
    by = sorted({row.outcome.lean_nodes for row in rows if row.outcome} - {""})
    if by:
        lines.append(
            f"\nLatency: of one sample, one thread, as a ratio to the whole model's, timed in "
            f"turn; LEAN nodes by {' or '.join(by)}."
        )
    return lines


def _retrained(found: Sequence[Group]) -> list[str]:
    if not found:
        return []
    return [
        "\n## Retrained\n",
        "The most accurate anew, on the whole train split; accuracy on the test split.\n",
        "| configuration | seeds | epochs | accuracy, % |",
        "|---|---:|---:|---:|",
        *(
            f"| {each.name} | {len(each.rows)} | {each.median('epochs'):.0f} | {_accuracy(each)} |"
            for each in found
        ),
    ]


def _accuracy(group: Group) -> str:
    error = group.standard_error
    shown = "" if math.isnan(error) else f" ± {100 * error:.1f}"
    return f"{100 * group.accuracy:.1f}{shown}"


def draw_fronts(found: Sequence[Group]) -> Any:
    """Draw accuracy over each cost that was measured; the line is the front of all.

    Args:
        found: the groups, one or more.

    Returns:
        A matplotlib figure.
    """
    costs = {
        "parameters": "parameters",
        "macs": "multiply-adds of a sample",
        "latency_ratio": "latency, whole model = 1",
    }
    shown = [field for field in costs if not math.isnan(found[0].median(field))]
    figure, axes = new_figure(5 * len(shown), 4.6, 1, len(shown))
    arms = list(dict.fromkeys(group.arm for group in found))
    for ax, field in zip(axes, shown, strict=True):
        for index, arm in enumerate(arms):
            own = [group for group in found if group.arm == arm]
            ax.errorbar(
                [group.median(field) for group in own],
                [100 * group.accuracy for group in own],
                [0 if math.isnan(g.standard_error) else 100 * g.standard_error for g in own],
                fmt="o" if arm.startswith("lean") else "s",
                color=colour(index),
                markersize=4.5,
                label=arm,
            )
        line = front([(group.median(field), 100 * group.accuracy) for group in found])
        ax.plot(*zip(*line, strict=True), color="0.6", linewidth=1, zorder=0, label="front")
        values = [group.median(field) for group in found]
        alike = max(values) < 4 * min(values)  # labels of a short logarithmic axis overlap
        scale = "linear" if alike else "log"
        ax.set(xlabel=costs[field], ylabel="accuracy, %", xscale=scale)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False
    )
    return figure


def _parallel(study: Study) -> Any:
    """Optuna's parallel coordinates of the complete trials that were run."""
    optuna = require("optuna", extra="examples", purpose="parallel coordinates")
    matplotlib = require("matplotlib", extra="examples", purpose="drawing")
    database = study.database()
    shown = optuna.create_study(direction="maximize")
    for trial in database.get_trials(states=(optuna.trial.TrialState.COMPLETE,)):
        if "outcome" in trial.user_attrs:
            accuracy = trial.user_attrs["outcome"]["accuracy"]
            shown.add_trial(
                optuna.create_trial(
                    value=accuracy, params=trial.params, distributions=trial.distributions
                )
            )
    varied = [name for name, choices in study.space.choices.items() if len(choices) > 1]
    with warnings.catch_warnings(), matplotlib.rc_context({"figure.constrained_layout.use": True}):
        warnings.simplefilter("ignore")  # the function is marked as experimental
        draw = optuna.visualization.matplotlib.plot_parallel_coordinate
        axes = draw(shown, params=varied or None, target_name="accuracy")
    axes.figure.set_size_inches(2 + 2 * len(varied), 4.5)
    require("matplotlib.pyplot", extra="examples", purpose="drawing").close(axes.figure)
    return axes.figure
