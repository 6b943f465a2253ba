"""The report of an experiment: a table, Markdown, JSON and two pictures, of the same figures."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from lean_fx.errors import ArgumentError, DataError
from lean_fx.files import make_folder, replacing, write_text
from lean_fx.measure.energy import Energy
from lean_fx.measure.pictures import draw_bars, draw_curves, short
from lean_fx.measure.tables import markdown_table, rich_table
from lean_fx.measure.timing import Latency

if TYPE_CHECKING:
    from rich.table import Table

_FORMAT = "lean_fx.report"
_VERSION = 2


@dataclass(frozen=True)
class Epoch:
    """The results of one epoch: mean losses, accuracies in [0, 1], and the energy of training."""

    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    train: Energy


@dataclass(frozen=True)
class Arm:
    """One model of an experiment and everything measured of it.

    Args:
        name: what the reader calls it; unique in a report.
        parameters: elements of all parameters.
        macs: multiply-adds of one sample.
        onnx_bytes: size of the exported file.
        runs: its training with each seed, all of equally many epochs, at least one.
        latency: of the exported file.
        test_energy: of one pass over the test set.
        plan: the printed plan of its reductions; empty where there are none.
    """

    name: str
    parameters: int
    macs: int
    onnx_bytes: int
    runs: tuple[tuple[Epoch, ...], ...]
    latency: Latency
    test_energy: Energy
    plan: str = ""

    def __post_init__(self) -> None:
        if not self.runs or not self.runs[0]:
            raise ArgumentError(f"Arm: {self.name!r} has no epochs; give at least one")
        if len({len(run) for run in self.runs}) > 1:
            lengths = ", ".join(str(len(run)) for run in self.runs)
            raise ArgumentError(
                f"Arm: {self.name!r} has runs of {lengths} epochs; give equally long ones"
            )

    @property
    def epochs(self) -> int:
        """How many epochs each run has."""
        return len(self.runs[0])

    @property
    def accuracies(self) -> tuple[float, ...]:
        """The test accuracy after the last epoch of each run, in [0, 1]."""
        return tuple(run[-1].test_accuracy for run in self.runs)

    @property
    def accuracy(self) -> float:
        """The mean of :attr:`accuracies`."""
        return statistics.mean(self.accuracies)

    @property
    def train_accuracy(self) -> float:
        """The training accuracy of the last epoch, in [0, 1]; the mean over the runs."""
        return statistics.mean(run[-1].train_accuracy for run in self.runs)

    @property
    def train_energy(self) -> Energy:
        """The whole training, all runs together."""
        return functools.reduce(operator.add, (epoch.train for run in self.runs for epoch in run))

    @property
    def train_energy_per_epoch(self) -> Energy:
        """The mean epoch of the training."""
        return self.train_energy.scaled(1 / (len(self.runs) * self.epochs))


@dataclass(frozen=True)
class Report:
    """An experiment's result.

    Args:
        title: one line.
        command: the command that made it.
        arms: the models; the first is the baseline that every ratio refers to.
        machine: see :func:`lean_fx.measure.machines.machine`.
        seeds: those that every model was trained with, a run each.
        notes: sentences to stand below the table.
    """

    title: str
    command: str
    arms: tuple[Arm, ...]
    machine: str
    seeds: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if not names:
            raise ArgumentError("Report: arms is empty; give at least the baseline")
        if len(set(names)) < len(names):
            raise ArgumentError(f"Report: the names {', '.join(names)} are not all different")
        for arm in self.arms:
            if len(arm.runs) != len(self.seeds):
                raise ArgumentError(
                    f"Report: {arm.name!r} has {len(arm.runs)} runs for {len(self.seeds)} seeds; "
                    "give one each"
                )

    def table(self) -> Table:
        """Return the table for a terminal: a column for each model, a row for each figure."""
        return rich_table(self._rows(), self.footnotes(), self.title)

    def to_markdown(self, pictures: Sequence[str] = ()) -> str:
        """Return the report in Markdown.

        Args:
            pictures: addresses of pictures to show.
        """
        parts = [
            f"# {self.title}",
            f"```\n{self.command}\n```",
            markdown_table(self._rows()),
            "\n".join(f"- {note}" for note in self.footnotes()),
            *(f"![{Path(picture).stem}]({picture})" for picture in pictures),
            *(f"## {arm.name}\n\n```\n{arm.plan}\n```" for arm in self.arms if arm.plan),
        ]
        return "\n\n".join(parts) + "\n"

    def to_json(self) -> str:
        """Return everything as JSON, from which :meth:`from_json` makes an equal report.

        Energy that was not measured is ``NaN``, as Python's json writes it; it equals nothing, so
        neither do reports with it.
        """
        head = {"format": _FORMAT, "version": _VERSION}
        return json.dumps(head | dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what :meth:`to_json` wrote.

        Raises:
            DataError: the text is not JSON, not of this format and version, or a value in it is
                missing, unknown or of a wrong type.
            ArgumentError: a value breaks a rule of its class.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"report: is not JSON ({error}); give what to_json wrote") from error
        if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
            raise DataError(f"report: has no format {_FORMAT!r}; give what to_json wrote")
        version = data.pop("version", None)
        if version != _VERSION:
            raise DataError(
                f"report: version {version!r} is not {_VERSION}; write it anew with this lean_fx"
            )
        report: Report = _build(cls, data, "report")
        return report

    def draw(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Draw ``curves.png`` (by epoch) and ``figure3.png`` (the paper's Figure 3, as bars).

        Raises:
            WriteError: the folder cannot be made or written to.
            MissingDependencyError: matplotlib is not installed.
        """
        target = make_folder(folder)
        pictures = {"curves.png": draw_curves, "figure3.png": draw_bars}
        for name, draw in pictures.items():
            figure = draw(self.arms)
            with replacing(target / name) as part:
                figure.savefig(part, format="png", dpi=150)
        return [target / name for name in pictures]

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write ``report.json``, ``report.md`` and the pictures; return their paths.

        Raises:
            WriteError: as in :meth:`draw`.
            MissingDependencyError: as in :meth:`draw`.
        """
        target = make_folder(folder)
        with replacing(target / "report.json") as part:
            pictures = [picture.name for picture in self.draw(part.parent)]
            write_text(part.with_suffix(".md"), self.to_markdown(pictures))
            write_text(part, self.to_json())
        return [target / name for name in ("report.json", "report.md", *pictures)]

    def footnotes(self) -> list[str]:
        """Return the sentences that say what the figures rest on, and the notes."""
        calls = _listed(
            f"{a.latency.rounds} rounds, batch {a.latency.batch}, threads {a.latency.threads}"
            for a in self.arms
        )
        epochs = _listed(str(arm.epochs) for arm in self.arms)
        energies = [energy for arm in self.arms for energy in (arm.train_energy, arm.test_energy)]
        return [
            f"Machine: {self.machine}.",
            f"Latency: median of {calls}; ratio: to {self.arms[0].name}, below 1 is faster; LEAN "
            f"nodes {_listed(arm.latency.lean_nodes for arm in self.arms)}.",
            f"Training J, s, CO2: mean of {epochs} epochs. Test J: one pass over the test set.",
            *dict.fromkeys(f"Energy and CO2 (meter {e.meter}): {e.basis}." for e in energies),
            _seeds_note(self.seeds),
            *self.notes,
        ]

    def _rows(self) -> list[tuple[str, ...]]:
        columns = [_column(arm, self.arms[0]) for arm in self.arms]
        return [(label, *(column[label] for column in columns)) for label in columns[0]]


def _column(arm: Arm, baseline: Arm) -> dict[str, str]:
    """What the table says of a model, by the labels of its rows."""
    train, latency = arm.train_energy_per_epoch, arm.latency
    accuracies = [100 * accuracy for accuracy in arm.accuracies]
    spread = f"{min(accuracies):.1f}-{max(accuracies):.1f}"
    return {
        "": arm.name,
        "parameters": f"{arm.parameters:,}",
        "MACs, million": short(arm.macs / 1e6),
        "ONNX file, kB": short(arm.onnx_bytes / 1e3),
        "test accuracy, %": f"{100 * arm.accuracy:.1f}",
        **({"  range": spread} if len(accuracies) > 1 else {}),
        "latency, ms": short(latency.median_ms),
        "  quartiles": f"{short(latency.q1_ms)}-{short(latency.q3_ms)}",
        "  ratio": f"{latency.median_ms / baseline.latency.median_ms:.2f}",
        "training, s/epoch": short(train.seconds),
        "training, J/epoch": short(train.energy_j),
        "training, mg CO2/epoch": short(train.co2_g * 1e3),
        "testing, J": short(arm.test_energy.energy_j),
    }


def _seeds_note(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"Accuracy rests on one seed ({seeds[0]}): a small difference may be chance."
    return (
        f"Accuracy: mean and range over {len(seeds)} seeds ({', '.join(map(str, seeds))}); "
        f"latency and testing: of the nets of seed {seeds[0]}."
    )


def _listed(values: Any) -> str:
    return " / ".join(dict.fromkeys(values))


def _build(kind: Any, data: Any, where: str) -> Any:
    """Make a value of type ``kind`` from parsed JSON, or say where it does not fit."""
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        if isinstance(data, dict) and set(data) == set(hints):
            return kind(**{key: _build(hints[key], data[key], f"{where}.{key}") for key in hints})  # type: ignore[operator]
        raise DataError(f"{where}: does not have exactly the keys {', '.join(hints)}")
    if get_origin(kind) is tuple and isinstance(data, list):
        item = get_args(kind)[0]
        return tuple(_build(item, value, f"{where}[{i}]") for i, value in enumerate(data))
    if kind is float and type(data) is int:
        return float(data)
    if type(data) is not kind:
        raise DataError(f"{where}: {data!r} is not {getattr(kind, '__name__', kind)}")
    return data
