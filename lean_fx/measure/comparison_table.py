"""The result of a comparison: a table of figures, each with its unit and spread."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lean_fx.errors import ArgumentError
from lean_fx.files import make_folder, replacing, write_text
from lean_fx.measure.energy import Energy
from lean_fx.measure.pictures import colour, new_figure, short
from lean_fx.measure.tables import markdown_table, rich_table
from lean_fx.measure.timing import Latency

if TYPE_CHECKING:
    from rich.table import Table

_RESAMPLES = 2000


@dataclass(frozen=True)
class Ratio:
    """The time of a model divided by the time of the baseline in the same rounds.

    Attributes:
        median: the ratio of the medians; below 1 is faster.
        low: the lower end of its 95 % confidence interval.
        high: the upper end.
    """

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}-{self.high:.2f}]"


def ratio_of(latency: Latency, baseline: Latency) -> Ratio:
    """The ratio of two latencies that were measured in turn, and its bootstrap interval.

    The bootstrap draws rounds with replacement, the same rounds for both latencies, because what
    slows a round down slows both. The interval holds the middle 95 % of the ratios of medians.

    Raises:
        ArgumentError: the numbers of rounds differ.

    Example:
        >>> latency = Latency((1.0, 2.0, 3.0), batch=1, threads=1)
        >>> str(ratio_of(latency, latency))
        '1.00 [1.00-1.00]'

    References:
        Efron and Tibshirani: An Introduction to the Bootstrap, 1993, chapter 13 (percentile
        intervals).
    """
    if latency.rounds != baseline.rounds:
        raise ArgumentError(
            f"ratio_of: {latency.rounds} and {baseline.rounds} rounds were not measured in turn; "
            "give latencies of one run"
        )
    generator, count = random.Random(0), latency.rounds
    ratios = []
    for _ in range(_RESAMPLES):
        rounds = generator.choices(range(count), k=count)
        mine, theirs = (
            statistics.median(each.samples_ms[index] for index in rounds)
            for each in (latency, baseline)
        )
        ratios.append(mine / theirs)
    cuts = statistics.quantiles(ratios, n=40, method="inclusive")
    return Ratio(latency.median_ms / baseline.median_ms, cuts[0], cuts[-1])


@dataclass(frozen=True)
class Compared:
    """The figures of one model.

    Attributes:
        name: the model's name in the comparison.
        parameters: the number of elements of all parameters.
        weight_bytes: the bytes of parameters and buffers.
        macs: multiply-adds of one sample.
        moved_bytes: bytes of activations and weights that the layers read and write for one
            sample; None if torch.fx cannot capture the model.
        peak_inference_bytes: the most bytes of tensors alive at once in a forward pass of the
            example inputs.
        peak_training_bytes: the same in a training step, gradients included.
        onnx_bytes: the size of the exported file.
        reorders: how many nodes of ONNX Runtime's optimised graph only change the memory layout.
        off_path: the layers that miss ONNX Runtime's fast convolution, and why.
        latencies: the latencies of the file, one for each batch.
        eager: the latency of a forward pass in PyTorch.
        step: the latency of a training step in PyTorch: forward, backward, SGD.
        energy: the energy of one call of the file at the first batch; None if not metered.
        step_energy: the energy of the training step that ``step`` times; None if not metered.
    """

    name: str
    parameters: int
    weight_bytes: int
    macs: int
    moved_bytes: int | None
    peak_inference_bytes: int
    peak_training_bytes: int
    onnx_bytes: int
    reorders: int
    off_path: tuple[str, ...]
    latencies: tuple[Latency, ...]
    eager: Latency
    step: Latency
    energy: Energy | None = None
    step_energy: Energy | None = None


@dataclass(frozen=True)
class Comparison:
    """Models side by side; the first is the baseline of every ratio.

    Attributes:
        models: the figures of each model.
        machine: processor, instruction set, cores and versions.
    """

    models: tuple[Compared, ...]
    machine: str

    def rows(self) -> list[tuple[str, ...]]:
        """The table as text, its head first: a column for each model, a row for each figure."""
        base = self.models[0]
        rows: list[tuple[str, ...]] = [("", *(model.name for model in self.models))]

        def add(label: str, text: Callable[[Compared], str]) -> None:
            rows.append((label, *map(text, self.models)))

        def add_times(label: str, of: Callable[[Compared], Latency]) -> None:
            add(f"{label}, ms", lambda m: short(of(m).median_ms))
            add("  quartiles", lambda m: f"{short(of(m).q1_ms)}-{short(of(m).q3_ms)}")
            add("  ratio [95 %]", lambda m: str(ratio_of(of(m), of(base))))

        def add_energy(label: str, of: Callable[[Compared], Energy | None]) -> None:
            if (known := of(base)) is None:
                return
            meter, none = known.meter, Energy(math.nan, math.nan, math.nan, "none")
            add(f"energy of {label}, mJ ({meter})", lambda m: short((of(m) or none).energy_j * 1e3))
            add(f"CO2 of {label}, ug ({meter})", lambda m: short((of(m) or none).co2_g * 1e6))

        add("parameters", lambda m: f"{m.parameters:,}")
        add("weights, kB", lambda m: short(m.weight_bytes / 1e3))
        add("MACs, million", lambda m: short(m.macs / 1e6))
        add(
            "bytes moved, MB",
            lambda m: "-" if m.moved_bytes is None else short(m.moved_bytes / 1e6),
        )
        add("peak memory, inference, MB", lambda m: short(m.peak_inference_bytes / 1e6))
        add("peak memory, training, MB", lambda m: short(m.peak_training_bytes / 1e6))
        add("ONNX file, kB", lambda m: short(m.onnx_bytes / 1e3))
        add("layout reorders", lambda m: str(m.reorders))
        for index, latency in enumerate(base.latencies):
            label = f"ONNX Runtime, batch {latency.batch}"
            add_times(label, lambda m, index=index: m.latencies[index])  # type: ignore[misc]
        add_times(f"PyTorch forward, batch {base.eager.batch}", lambda m: m.eager)
        add_times(f"training step, batch {base.step.batch}", lambda m: m.step)
        add_energy("a call", lambda m: m.energy)
        add_energy("a training step", lambda m: m.step_energy)
        return rows

    def footnotes(self) -> list[str]:
        """How the figures were measured, in sentences."""
        base = self.models[0]
        timed = base.latencies[0]
        notes = [
            f"Machine: {self.machine}; threads {timed.threads}.",
            f"Times: median of {timed.rounds} rounds, all models in turn; ratio: to {base.name}, "
            "below 1 is faster, with its bootstrap interval.",
            f"LEAN nodes in ONNX Runtime: {timed.lean_nodes}.",
            "MACs and bytes moved: of one sample; each layer reads its inputs and weights once and "
            "writes its result.",
            f"Peak memory: tensors alive at once in PyTorch at batch {base.eager.batch}, weights "
            "included.",
        ]
        if base.energy is not None:
            notes.append(
                f"Energy and CO2 (meter {base.energy.meter}): {base.energy.basis}; a call at batch "
                f"{timed.batch}, a training step at batch {base.step.batch}; "
                f"{base.energy.co2_g_per_kwh:.0f} g of CO2 a kWh."
            )
        return notes + [
            f"{model.name}: {text}." for model in self.models for text in model.off_path
        ]

    def __str__(self) -> str:
        return self.to_markdown()

    def table(self) -> Table:
        """The table for a terminal."""
        return rich_table(self.rows(), self.footnotes())

    def to_markdown(self) -> str:
        """The table and its footnotes in Markdown."""
        table = markdown_table(self.rows())
        return table + "\n\n" + "\n".join(f"- {note}" for note in self.footnotes()) + "\n"

    def to_json(self) -> str:
        """Every figure as JSON, the samples of each round included."""
        base, values = self.models[0], dataclasses.asdict(self)
        for model, stored in zip(self.models, values["models"], strict=True):
            pairs = zip(model.latencies, base.latencies, strict=True)
            stored["latencies"] = [_as_json(*pair) for pair in pairs]
            stored["eager"] = _as_json(model.eager, base.eager)
            stored["step"] = _as_json(model.step, base.step)
        return json.dumps(values, indent=1) + "\n"

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write ``comparison.md``, ``comparison.json`` and ``latency.png``; return their paths.

        Raises:
            WriteError: the folder cannot be made or written to.
            MissingDependencyError: matplotlib is not installed.
        """
        figure = self.draw()  # first, as it may fail
        target = make_folder(folder)
        with replacing(target / "comparison.json") as part:
            figure.savefig(part.parent / "latency.png", format="png", dpi=150)
            write_text(part.with_suffix(".md"), self.to_markdown())
            write_text(part, self.to_json())
        return [target / name for name in ("comparison.md", "comparison.json", "latency.png")]

    def draw(self) -> Any:
        """Draw the ratios of time with their intervals, a panel for each batch; the figure."""
        base = self.models[0]
        count = len(base.latencies)
        figure, axes = new_figure(1 + 3.2 * count, 3.4, 1, count)
        for index, axis in enumerate(axes):
            for place, model in enumerate(self.models):
                ratio = ratio_of(model.latencies[index], base.latencies[index])
                ends = [[max(0.0, ratio.median - ratio.low)], [max(0.0, ratio.high - ratio.median)]]
                axis.bar(place, ratio.median, yerr=ends, color=colour(place), capsize=4)
            axis.set_xticks(range(len(self.models)), [model.name for model in self.models])
            axis.set_title(f"ONNX Runtime, batch {base.latencies[index].batch}")
            axis.set_ylabel(f"time, {base.name} = 1")
        return figure


def _as_json(latency: Latency, baseline: Latency) -> dict[str, Any]:
    """What JSON holds of a latency: its quartiles and its ratio, then its samples."""
    return {
        "median_ms": latency.median_ms,
        "q1_ms": latency.q1_ms,
        "q3_ms": latency.q3_ms,
        "ratio": dataclasses.asdict(ratio_of(latency, baseline)),
        **dataclasses.asdict(latency),
    }
