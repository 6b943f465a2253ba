"""Compare models side by side: cost, latency, memory, energy. They need no training."""

from __future__ import annotations

import copy
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from lean_fx.capture.example_inputs import as_inputs
from lean_fx.capture.side_effects import keeping_rng_state
from lean_fx.cloning import clone
from lean_fx.errors import ArgumentError, CaptureError, require, warn
from lean_fx.export.exporting import export_onnx
from lean_fx.export.inputs import resized
from lean_fx.export.of_tensors import of_tensors, tensors_in
from lean_fx.export.sessions import flushing_denormals, onnx_call
from lean_fx.files import make_folder, replacing
from lean_fx.kernel import uses_kernel
from lean_fx.measure.comparison_checks import (
    check_inputs,
    check_models,
    check_numbers,
    check_outputs,
    check_steps,
)
from lean_fx.measure.comparison_table import Compared, Comparison
from lean_fx.measure.costs import costs_of, count_macs, count_parameters
from lean_fx.measure.eager import time_eager, training_step, using_threads
from lean_fx.measure.energy import Energy, energy_in_turn
from lean_fx.measure.layout import blocked_layout
from lean_fx.measure.machines import machine
from lean_fx.measure.memory import peak_bytes
from lean_fx.measure.progress import counted_bar
from lean_fx.measure.timing import time_onnx
from lean_fx.measure.tracker import check_country
from lean_fx.onnx_files import onnx_bytes, weight_files

if TYPE_CHECKING:
    from lean_fx.export.sessions import Inputs

#: Measures the mean energy of calls, by name.
Meter: TypeAlias = Callable[[Mapping[str, Callable[[], object]]], dict[str, Energy]]


def compare(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    batches: Sequence[int] = (1, 16),
    threads: int = 1,
    rounds: int = 30,
    energy_s: float = 0.0,
    country: str = "USA",
    folder: str | os.PathLike[str] | None = None,
    kernel: bool | None = None,
) -> Comparison:
    """Measure models side by side: cost, latency, memory, and energy if asked for.

    Copies of the models are measured on the CPU. They need no training, but latency depends a
    little on the weights. Times and energies are measured in rounds, each with one turn per model.

    Args:
        models: the models by name; ratios refer to the first, the baseline.
        example_inputs: a tensor, a tuple of the positional inputs, or a mapping of their names,
            batch first. PyTorch's times and memory are measured at their batch.
        batches: the batch sizes at which ONNX Runtime is timed, each 1 or more.
        threads: the threads of ONNX Runtime and PyTorch, from 1 to four a core.
        rounds: samples of each time, 2 or more.
        energy_s: for how many seconds to meter calls of each file at the first batch, and then
            training steps of each model. 0 meters nothing; estimates need 30 or more.
        country: the ISO 3166 code of three letters, for the carbon intensity of a joule.
        folder: where to keep the ONNX files; it is made if missing. None keeps no files. Files of
            an earlier comparison are replaced once all models are exported.
        kernel: whether ONNX Runtime computes LEAN nodes with :func:`~lean_fx.onnx_kernel` or with
            the function in the file. None takes the kernel if it is built. The table says which.

    Returns:
        The figures: ``print(comparison.to_markdown())``, ``comparison.save(folder)``.

    Raises:
        ArgumentError: an argument is out of its range, or the models' outputs differ in structure
            or shape.
        ExportError: a model cannot be exported.
        MissingDependencyError: onnx, onnxscript or onnxruntime is not installed, or codecarbon
            where energy is asked for, or the kernel is asked for and is not built.
        WriteError: the folder cannot be made or written to.

    Warns:
        LeanWarning: a convolution of a model misses ONNX Runtime's fast path.

    Example::

        models = {"baseline": model, "lean": lean_fx.leanify(model, inputs)}
        comparison = lean_fx.compare(models, inputs)
        print(comparison.to_markdown())
    """
    check_models(models)
    given = as_inputs(example_inputs, next(iter(models.values())))
    inputs = tuple(tensors_in(given))
    check_inputs(inputs)
    batches, threads, rounds = check_numbers(batches, threads, rounds, energy_s)
    models = {name: of_tensors(model, given)[0] for name, model in models.items()}
    by_kernel = uses_kernel(kernel)
    _require_all(energy_s, country)
    with (
        tempfile.TemporaryDirectory() as temporary,
        keeping_rng_state(),
        torch.inference_mode(False),
        torch.enable_grad(),  # for training steps, whatever the caller's mode
        counted_bar("compare", len(models) + len(batches) * rounds) as show,
    ):
        done = itertools.count(1)

        def step_done(*_: int) -> None:
            show(next(done))

        inputs = tuple(value.detach().cpu().clone() for value in inputs)
        arms = {name: _copy(name, model).cpu().eval() for name, model in models.items()}
        check_outputs(arms, inputs)
        check_steps(arms, inputs)
        kept = make_folder(folder) if folder is not None else None
        files = dict(zip(arms, _files(Path(temporary), arms), strict=True))
        for name, arm in arms.items():
            export_onnx(arm, files[name], inputs)
            step_done()
        if kept is not None:  # only now: a failed export must leave the earlier files
            _keep(files.values(), kept)
        meter = partial(energy_in_turn, seconds=energy_s, country=country) if energy_s else None
        timing: Any = {"threads": threads, "rounds": rounds, "kernel": by_kernel}
        compared = _compared(arms, files, inputs, batches, timing, meter, step_done)
    return Comparison(compared, machine())


def _compared(
    arms: Mapping[str, nn.Module],
    files: Mapping[str, Path],
    inputs: tuple[Tensor, ...],
    batches: Sequence[int],
    timing: dict[str, Any],  # threads, rounds and kernel
    meter: Meter | None,
    step_done: Callable[[int, int], None],
) -> tuple[Compared, ...]:
    """Time the models, meter them if there is a meter, and count what each costs."""
    threads, kernel = timing["threads"], timing["kernel"]
    feeds = [tuple(resized(value, batch).numpy() for value in inputs) for batch in batches]
    latencies = [time_onnx(files, each, progress=step_done, **timing) for each in feeds]
    eager, step = time_eager(arms, inputs, threads=threads, rounds=timing["rounds"])
    calls, steps = {}, {}
    if meter is not None:
        calls = _energy_of_calls(files, feeds[0], threads, kernel, meter)
        steps = _energy_of_steps(arms, inputs, threads, meter)
    return tuple(
        Compared(
            name=name,
            **_costs(arm, inputs),
            **_layout(name, files[name], kernel),
            latencies=tuple(latency[name] for latency in latencies),
            eager=eager[name],
            step=step[name],
            energy=calls.get(name),
            step_energy=steps.get(name),
        )
        for name, arm in arms.items()
    )


def _require_all(energy_s: float, country: str) -> None:
    """Check that what measures is installed, and knows the country.

    Raises:
        ArgumentError: CodeCarbon does not know the country.
        MissingDependencyError: a package is not installed.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, purpose="comparing")
    if energy_s:
        require("codecarbon", purpose="metering energy")
        check_country("compare", country)


def _keep(files: Iterable[Path], folder: Path) -> None:
    """Copy ONNX files and their weights into a folder."""
    for file in files:
        with replacing(folder / file.name) as part:
            shutil.copyfile(file, part)
            for each in weight_files(file):
                shutil.copyfile(each, part.parent / each.name)


def _costs(arm: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """What a model costs in PyTorch; the work is that of one sample."""
    sample = tuple(resized(value, 1) for value in inputs)
    return {
        "parameters": count_parameters(arm),
        "weight_bytes": sum(value.nbytes for value in _held(arm)),
        "macs": count_macs(arm, sample),
        "moved_bytes": _moved_bytes(arm, sample),
        "peak_inference_bytes": _peak(arm, inputs, training=False),
        "peak_training_bytes": _peak(arm, inputs, training=True),
    }


def _layout(name: str, file: Path, by_kernel: bool) -> dict[str, Any]:
    """The size of an ONNX file, and how ONNX Runtime lays out what its convolutions read."""
    reorders, off_path = blocked_layout(file, kernel=by_kernel)
    for text in off_path:
        warn(f"{name}: {text}")
    return {"onnx_bytes": onnx_bytes(file), "reorders": reorders, "off_path": off_path}


def _copy(name: str, model: nn.Module) -> nn.Module:
    try:
        return clone(model)
    except CaptureError as error:
        raise ArgumentError(f"compare: {name!r}: {error}") from error


def _files(home: Path, names: Iterable[str]) -> Iterator[Path]:
    """A path for each name, unique even on a file system that ignores case."""
    taken: set[str] = set()
    for name in names:
        stem = re.sub(r"[^\w.-]+", "-", name).strip(".-")[:64] or "model"
        number = 1
        while (unique := stem if number == 1 else f"{stem}-{number}").casefold() in taken:
            number += 1
        taken.add(unique.casefold())
        yield home / f"{unique}.onnx"


def _held(arm: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a model, shared ones once."""
    return [*arm.parameters(), *arm.buffers()]


def _moved_bytes(arm: nn.Module, sample: tuple[Tensor, ...]) -> int | None:
    """Bytes moved by the sample; None if the model cannot be captured, or fails as captured."""
    try:
        return costs_of(arm, sample).moved_bytes
    except (ArgumentError, CaptureError):
        return None


def _peak(arm: nn.Module, inputs: tuple[Tensor, ...], *, training: bool) -> int:
    arm = copy.deepcopy(arm).train(training)
    held = [*_held(arm), *inputs]
    if training:
        return peak_bytes(training_step(arm, inputs), held)
    with torch.no_grad():
        return peak_bytes(lambda: arm(*inputs), held)


def _energy_of_calls(
    files: Mapping[str, Path], feeds: Inputs, threads: int, by_kernel: bool, meter: Meter
) -> dict[str, Energy]:
    """The energy of a call of each file, by name."""
    calls = {
        name: onnx_call(name, file, feeds, threads, kernel=by_kernel)
        for name, file in files.items()
    }
    with flushing_denormals():
        return meter(calls)


def _energy_of_steps(
    arms: Mapping[str, nn.Module], inputs: tuple[Tensor, ...], threads: int, meter: Meter
) -> dict[str, Energy]:
    """The energy of a training step of each model, by name."""
    steps = {name: training_step(copy.deepcopy(arm).train(), inputs) for name, arm in arms.items()}
    with using_threads(threads):
        return meter(steps)
