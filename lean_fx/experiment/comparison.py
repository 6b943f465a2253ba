"""One job for any data set: train some models alike, export, time and meter them, report."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from lean_fx.errors import ArgumentError, require
from lean_fx.experiment.datasets import Dataset
from lean_fx.experiment.processes import (
    Processes,
    is_first_process,
    leave_to_first_process,
    processes,
)
from lean_fx.export.exporting import export_onnx
from lean_fx.export.stored_plan import attached_plan
from lean_fx.files import make_folder
from lean_fx.measure.costs import count_macs, count_parameters
from lean_fx.measure.energy import EnergyMeter
from lean_fx.measure.machines import machine
from lean_fx.measure.report import Arm, Epoch, Report
from lean_fx.measure.timing import Latency, time_onnx
from lean_fx.onnx_files import onnx_bytes

if TYPE_CHECKING:
    from lean_fx.experiment.training import Settings


def run(
    arms: Mapping[int, Mapping[str, nn.Module]],
    data: Dataset,
    settings: Settings,
    folder: str | Path,
    *,
    title: str,
    command: str,
    rates: Sequence[float] = (),
    rate_epochs: int | None = None,
    country: str = "USA",
) -> Report:
    """Train the models with every seed, export, time and meter those of the first, and report.

    Training that is done already, or begun, goes on from its checkpoint in ``folder``. Under
    torchrun all processes train; then the first goes on alone, and the others exit.

    Args:
        arms: for each seed, the untrained models by name; every seed has the same names. Ratios
            refer to the first model. The models are trained in place.
        data: what to train and test on.
        settings: of the training, the same for all but for the seed.
        folder: for the checkpoints, the ONNX files and the report; made if it is missing.
        title: of the report.
        command: that a reader can run to make it again.
        rates: learning rates, of which each model gets its own by
            :func:`~lean_fx.experiment.rates.choose_rate`, with the first seed; without any, all
            train at that of the settings.
        rate_epochs: of the trainings that choose; those of the settings by default.
        country: ISO 3166 code of three letters; sets the carbon intensity of a joule.

    Returns:
        The report; it is saved as ``report.json``, ``report.md``, ``curves.png`` and
        ``figure3.png``.

    Raises:
        ArgumentError: there are no arms, the seeds have other names, or one is out of range.
        LeanError: see :func:`~lean_fx.experiment.training.train`,
            :func:`~lean_fx.export_onnx` and :func:`~lean_fx.measure.timing.time_onnx`.
        SystemExit: of status 0, after the training, in all processes but the first.
    """
    require_all()
    if len({tuple(models) for models in arms.values()}) != 1:
        raise ArgumentError("run: arms is empty, or its seeds have models of different names")
    settings_of = {seed: dataclasses.replace(settings, seed=seed) for seed in arms}
    target = make_folder(folder)
    first_seed, first = next(iter(arms.items()))
    choosing = settings_of[first_seed]
    if rate_epochs is not None:
        choosing = dataclasses.replace(choosing, epochs=rate_epochs)
    chosen = _chosen_rates(first, data, choosing, rates, target)
    runs = _trained(arms, data, settings_of, chosen, target, country)
    leave_to_first_process()
    _say("metering the test, exporting to ONNX, timing in ONNX Runtime")
    report = Report(
        title=title,
        command=command,
        arms=_measured_arms(first, data, runs, target, country),
        machine=machine(),
        seeds=tuple(arms),
        notes=(*_notes(processes()), *_rates_note(chosen, rates, choosing.epochs)),
    )
    report.save(target)
    return report


def _chosen_rates(
    models: Mapping[str, nn.Module],
    data: Dataset,
    settings: Settings,
    rates: Sequence[float],
    folder: Path,
) -> dict[str, float]:
    """The learning rate of each model, by name; empty if there are no rates to choose from."""
    from lean_fx.experiment.rates import choose_rate

    chosen: dict[str, float] = {}
    if not rates:
        return chosen
    for name, model in models.items():
        _say(f"choosing the learning rate of {name}")
        place = folder / f"{_slug(name)}-rates"
        chosen[name] = choose_rate(model, data, settings, rates, place, name)
    return chosen


def _trained(
    arms: Mapping[int, Mapping[str, nn.Module]],
    data: Dataset,
    settings_of: Mapping[int, Settings],
    rates: Mapping[str, float],
    folder: Path,
    country: str,
) -> dict[str, list[tuple[Epoch, ...]]]:
    """Train all models with all seeds, each model at its own rate if it has one.

    Returns:
        The history of each seed, by the name of the model.
    """
    from lean_fx.experiment.training import train

    runs: dict[str, list[tuple[Epoch, ...]]] = {}
    every = [(seed, name, model) for seed, models in arms.items() for name, model in models.items()]
    for number, (seed, name, model) in enumerate(every, start=1):
        _say(f"{number}/{len(every)} {name}, seed {seed}: {count_parameters(model):,} parameters")
        settings = settings_of[seed]
        rate = rates.get(name, settings.learning_rate)
        with EnergyMeter(country) if is_first_process() else contextlib.nullcontext() as meter:
            history = train(
                model,
                data,
                dataclasses.replace(settings, learning_rate=rate),
                folder / f"{_slug(name)}-seed{seed}",
                meter=meter,
                name=name,
            )
        runs.setdefault(name, []).append(history)
    return runs


def _measured_arms(
    models: Mapping[str, nn.Module],
    data: Dataset,
    runs: Mapping[str, Sequence[tuple[Epoch, ...]]],
    folder: Path,
    country: str,
) -> tuple[Arm, ...]:
    """Meter the test of trained models, export and time them; with the histories, by name."""
    from lean_fx.experiment.training import measure_test_energy

    energies = {
        name: measure_test_energy(model, data, country=country) for name, model in models.items()
    }
    latencies = export_and_time(models, data, folder)
    return tuple(
        Arm(
            name=name,
            parameters=count_parameters(model),
            macs=count_macs(model, data.normalised(data.test_x[:1])),
            onnx_bytes=onnx_bytes(folder / f"{_slug(name)}.onnx"),
            runs=tuple(runs[name]),
            latency=latencies[name],
            test_energy=energies[name],
            plan=str(attached_plan(model) or ""),
        )
        for name, model in models.items()
    )


def require_all() -> None:
    """Check that everything is installed that is needed after the training.

    Raises:
        MissingDependencyError: something is not.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, purpose="export and timing")
    for module in ("rich", "matplotlib"):
        require(module, extra="examples", purpose="the report")


def export_and_time(
    models: Mapping[str, nn.Module], data: Dataset, folder: Path
) -> dict[str, Latency]:
    """Export models to ``folder``, and time one picture in one run, in turn, on one thread.

    Args:
        models: by name.
        data: whose test pictures are the inputs.
        folder: gets a file for each model.

    Returns:
        The latency of each.
    """
    files = {name: folder / f"{_slug(name)}.onnx" for name in models}
    for name, model in models.items():
        export_onnx(copy.deepcopy(model).cpu(), files[name], data.normalised(data.test_x[:2]))
    return time_onnx(files, data.normalised(data.test_x[:1]).numpy())


def _notes(here: Processes) -> tuple[str, ...]:
    if here.count == 1:
        return ()
    where = "" if here.machines == 1 else f" on {here.machines} machines; energy: of the first one"
    return (f"Training: {here.count} processes{where}.",)


def _rates_note(
    chosen: Mapping[str, float], rates: Sequence[float], epochs: int
) -> tuple[str, ...]:
    if not chosen:
        return ()
    tried = ", ".join(f"{rate:g}" for rate in sorted(rates))
    each = ", ".join(f"{name} {rate:g}" for name, rate in chosen.items())
    part = f"a fifth of the train split in {epochs} epochs"
    return (f"Learning rates, chosen of {tried} on {part}: {each}.",)


def _slug(name: str) -> str:
    return name.replace(" ", "-").replace("/", "-")


def _say(text: str) -> None:
    if is_first_process():
        print(text, file=sys.stderr, flush=True)
