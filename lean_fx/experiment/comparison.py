"""One job for any data set: train some models alike, export, time and meter them, report."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lean_fx.errors import require
from lean_fx.experiment.datasets import Dataset
from lean_fx.experiment.models import PAPER_WIDTHS, PaperNet, narrow_widths, nearest_widths
from lean_fx.experiment.processes import (
    Processes,
    is_first_process,
    leave_to_first_process,
    processes,
)
from lean_fx.export import export_onnx
from lean_fx.files import make_folder
from lean_fx.measure.cost import count_macs, count_parameters
from lean_fx.measure.energy import EnergyMeter
from lean_fx.measure.report import Arm, Epoch, Report
from lean_fx.measure.timing import Latency, machine, time_onnx
from lean_fx.policy import ChannelsPolicy
from lean_fx.registry import ReductionFactory, reduction_name
from lean_fx.transform import leanify

if TYPE_CHECKING:
    from lean_fx.experiment.training import Settings


def baseline_net(data: Dataset) -> PaperNet:
    """The paper's net for the pictures of a data set, its weights drawn anew."""
    _, channels, size, _ = data.train_x.shape
    return PaperNet(PAPER_WIDTHS, channels, size, data.classes)


def lean_net(
    data: Dataset, channels: ChannelsPolicy, reduction: str | ReductionFactory = "lean"
) -> nn.Module:
    """The paper's net, leanified."""
    return leanify(
        baseline_net(data), data.train_x[:2].float(), channels=channels, reduction=reduction
    )


def narrow_net(data: Dataset, parameters: int) -> PaperNet:
    """The control of equal budget: the paper's net made narrower, with as many parameters."""
    _, channels, size, _ = data.train_x.shape
    shape = {"in_channels": channels, "image_size": size, "classes": data.classes}
    widths = narrow_widths(parameters, widths=PAPER_WIDTHS, **shape)
    return PaperNet(widths, channels, size, data.classes)


def paper_arms(
    data: Dataset, channels: ChannelsPolicy = 10, reduction: str = "lean", seed: int = 0
) -> dict[str, nn.Module]:
    """The three models of the paper's experiment: baseline, LEAN, and a narrower net.

    Args:
        data: gives the size of the pictures and the number of classes.
        channels: see :func:`lean_fx.leanify`.
        reduction: see :func:`lean_fx.leanify`.
        seed: of the first weights of each.

    Returns:
        The models by name, the baseline first.
    """
    _, in_channels, size, _ = data.train_x.shape
    return three_arms(
        lambda widths: PaperNet(widths, in_channels, size, data.classes),
        PAPER_WIDTHS,
        data.train_x[:2].float(),
        channels=channels,
        reduction=reduction,
        seed=seed,
    )


def three_arms(
    make: Callable[[tuple[int, ...]], nn.Module],
    widths: tuple[int, ...],
    inputs: Tensor,
    *,
    channels: ChannelsPolicy,
    reduction: str = "lean",
    min_channels: int = 16,
    seed: int = 0,
) -> dict[str, nn.Module]:
    """A net, the same leanified, and the same made narrower to the count of the leanified one.

    Args:
        make: builds the net from its widths.
        widths: of the baseline.
        inputs: example inputs.
        channels: see :func:`lean_fx.leanify`, like the next two.
        reduction: a registered name.
        min_channels: layers that read fewer are left alone.
        seed: of the first weights of each.

    Returns:
        The models by name, the baseline first.

    Example:
        >>> arms = three_arms(
        ...     lambda widths: PaperNet(widths, image_size=8), (32, 64), torch.rand(2, 3, 8, 8),
        ...     channels=8,
        ... )
        >>> {name: count_parameters(model) for name, model in arms.items()}
        {'baseline': 21962, 'lean': 5914, 'narrow 15/31': 5886}
    """
    torch.manual_seed(seed)
    baseline = make(widths)
    torch.manual_seed(seed)
    lean = leanify(
        make(widths), inputs, channels=channels, reduction=reduction, min_channels=min_channels
    )

    def count(some: tuple[int, ...]) -> int:
        with torch.device("meta"):
            return count_parameters(make(some))

    narrow = nearest_widths(count_parameters(lean), widths, count)
    torch.manual_seed(seed)
    names = ("baseline", reduction_name(reduction), f"narrow {'/'.join(map(str, narrow))}")
    return dict(zip(names, (baseline, lean, make(narrow)), strict=True))


def run(
    arms: Mapping[int, Mapping[str, nn.Module]],
    data: Dataset,
    settings: Settings,
    folder: str | Path,
    *,
    title: str,
    command: str,
    country: str = "USA",
    batch: int = 1,
    threads: int = 1,
) -> Report:
    """Train the models with every seed, export, time and meter those of the first, and report.

    Training that is done already, or begun, goes on from its checkpoint in ``folder``. Under
    torchrun all processes train; then the first goes on alone, and the others exit.

    Args:
        arms: by seed the models by name, the same names for each, with their first weights; the
            first model is what the ratios refer to. They end trained.
        data: what to train and test on.
        settings: of the training, the same for all but for the seed.
        folder: for the checkpoints, the ONNX files and the report; made if it is missing.
        title: of the report.
        command: that a reader can run to make it again.
        country: ISO 3166 code of three letters; sets the carbon intensity of a joule.
        batch: of the timed calls, 1 or more.
        threads: of ONNX Runtime, 1 or more.

    Returns:
        The report; it is saved as ``report.json``, ``report.md``, ``curves.png`` and
        ``figure3.png``.

    Raises:
        LeanError: see :func:`~lean_fx.experiment.training.train`,
            :func:`~lean_fx.export_onnx` and :func:`~lean_fx.measure.timing.time_onnx`.
        SystemExit: of status 0, after the training, in all processes but the first.
    """
    from lean_fx.experiment.training import measure_test_energy, train

    require_all()
    target = make_folder(folder)
    runs: dict[str, list[tuple[Epoch, ...]]] = {}
    every = [(seed, name, model) for seed, models in arms.items() for name, model in models.items()]
    for number, (seed, name, model) in enumerate(every, start=1):
        _say(f"{number}/{len(every)} {name}, seed {seed}: {count_parameters(model):,} parameters")
        with EnergyMeter(country) if is_first_process() else contextlib.nullcontext() as meter:
            history = train(
                model,
                data,
                dataclasses.replace(settings, seed=seed),
                target / f"{_slug(name)}-seed{seed}",
                meter=meter,
                name=name,
            )
        runs.setdefault(name, []).append(history)
    leave_to_first_process()
    _say("metering the test, exporting to ONNX, timing in ONNX Runtime")
    first = next(iter(arms.values()))
    energies = {
        name: measure_test_energy(model, data, country=country) for name, model in first.items()
    }
    latencies = export_and_time(first, data, target, batch=batch, threads=threads)
    report = Report(
        title=title,
        command=command,
        arms=tuple(
            Arm(
                name=name,
                parameters=count_parameters(model),
                macs=count_macs(model, data.normalised(data.test_x[:1])),
                onnx_bytes=(target / f"{_slug(name)}.onnx").stat().st_size,
                runs=tuple(runs[name]),
                latency=latencies[name],
                test_energy=energies[name],
                plan=str(getattr(model, "meta", {}).get("lean_fx.plan", "")),
            )
            for name, model in first.items()
        ),
        machine=machine(),
        seeds=tuple(arms),
        notes=_notes(processes()),
    )
    report.save(target)
    return report


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
    models: Mapping[str, nn.Module],
    data: Dataset,
    folder: Path,
    *,
    batch: int = 1,
    threads: int = 1,
) -> dict[str, Latency]:
    """Export models to ``folder`` and time them in one run, in turn.

    Args:
        models: by name.
        data: whose test pictures are the inputs.
        folder: gets a file for each model.
        batch: pictures a call, 1 or more.
        threads: of ONNX Runtime, 1 or more.

    Returns:
        The latency of each.
    """
    inputs = data.normalised(data.test_x[:batch])
    files = {name: folder / f"{_slug(name)}.onnx" for name in models}
    for name, model in models.items():
        export_onnx(copy.deepcopy(model).cpu(), files[name], data.normalised(data.test_x[:2]))
    return time_onnx(files, inputs.numpy(), threads=threads)


def _notes(here: Processes) -> tuple[str, ...]:
    if here.count == 1:
        return ()
    where = "" if here.machines == 1 else f" on {here.machines} machines; energy: of the first one"
    return (f"Training: {here.count} processes{where}.",)


def _slug(name: str) -> str:
    return name.replace(" ", "-").replace("/", "-")


def _say(text: str) -> None:
    if is_first_process():
        print(text, file=sys.stderr, flush=True)
