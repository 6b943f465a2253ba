"""Compare models side by side: cost, latency, memory, energy. They need no training."""

from __future__ import annotations

import copy
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lean_fx.capture.example_inputs import as_inputs
from lean_fx.capture.side_effects import keeping_rng_state
from lean_fx.checks import (
    check_int,
    check_ints,
    check_not_negative,
    check_shapes,
    check_threads,
    check_values,
)
from lean_fx.cloning import clone
from lean_fx.errors import ArgumentError, CaptureError, one_line, require, warn
from lean_fx.export.exporting import export_onnx
from lean_fx.export.inputs import resized
from lean_fx.export.of_tensors import of_tensors, tensors_in
from lean_fx.export.sessions import flushing_denormals, onnx_call
from lean_fx.files import make_folder, replacing
from lean_fx.kernel import uses_kernel
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
    _check_models(models)
    given = as_inputs(example_inputs, next(iter(models.values())))
    inputs = tuple(tensors_in(given))
    _check_inputs(inputs)
    _check_numbers(batches, threads, rounds, energy_s)
    models = {name: of_tensors(model, given)[0] for name, model in models.items()}
    by_kernel = uses_kernel(kernel)
    batches, threads, rounds = tuple(map(int, batches)), int(threads), int(rounds)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, purpose="comparing")
    if energy_s:
        require("codecarbon", purpose="metering energy")
        check_country("compare", country)
    with (
        tempfile.TemporaryDirectory() as temporary,
        keeping_rng_state(),
        torch.inference_mode(False),
        torch.enable_grad(),  # of training steps, wherever it is called
        counted_bar("compare", len(models) + len(batches) * rounds) as show,
    ):
        done = itertools.count(1)

        def step_done(*_: int) -> None:
            show(next(done))

        inputs = tuple(value.detach().cpu().clone() for value in inputs)
        arms = {name: _copy(name, model).cpu().eval() for name, model in models.items()}
        _check_outputs(arms, inputs)
        _check_steps(arms, inputs)
        kept = make_folder(folder) if folder is not None else None
        files = dict(zip(arms, _files(Path(temporary), arms), strict=True))
        for name, arm in arms.items():
            export_onnx(arm, files[name], inputs)
            step_done()
        if kept is not None:  # only now: a failed export must leave the earlier files
            _keep(files.values(), kept)
        feeds = [tuple(resized(value, batch).numpy() for value in inputs) for batch in batches]
        options: Any = {"threads": threads, "rounds": rounds, "kernel": by_kernel}
        latencies = [time_onnx(files, each, progress=step_done, **options) for each in feeds]
        eager, step = time_eager(arms, inputs, threads=threads, rounds=rounds)
        runs = {
            name: onnx_call(name, file, feeds[0], threads, kernel=by_kernel)
            for name, file in (files if energy_s else {}).items()
        }
        calls, steps = _energies(arms, inputs, runs, threads, energy_s, country)
        compared = [
            Compared(
                name=name,
                **_costs(arm, inputs),
                **_layout(name, files[name], by_kernel),
                latencies=tuple(latency[name] for latency in latencies),
                eager=eager[name],
                step=step[name],
                energy=calls.get(name),
                step_energy=steps.get(name),
            )
            for name, arm in arms.items()
        ]
    return Comparison(tuple(compared), machine())


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


def _check_models(models: Mapping[str, nn.Module]) -> None:
    if not isinstance(models, Mapping) or not models:
        raise ArgumentError("compare: models is not a mapping, or is empty; give names and models")
    for name, model in models.items():
        if not isinstance(name, str) or not name.isprintable() or not name:
            raise ArgumentError(f"compare: the name {name!r} is not printable text; give another")
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"compare: {name!r} is a {type(model).__name__}; give a module")
        check_shapes(model, f"compare: {name!r}")
        check_values(model, f"compare: {name!r}")


def _check_inputs(inputs: tuple[Any, ...]) -> None:
    sizes = {value.shape[0] for value in inputs if isinstance(value, Tensor) and value.dim()}
    if not sizes or not all(isinstance(value, Tensor) for value in inputs):
        raise ArgumentError(
            "compare: example_inputs are not tensors with a batch axis; give tensors"
        )
    if any(value.is_meta for value in inputs):
        raise ArgumentError(
            "compare: example_inputs are on the meta device and have no values; give real tensors"
        )
    if 0 in sizes:
        raise ArgumentError("compare: example_inputs have no rows; give one or more")
    if len(sizes) > 1:
        shown = ", ".join(str(value.shape[0]) for value in inputs if value.dim())
        raise ArgumentError(
            f"compare: example_inputs: batches of {shown} differ; give one batch, the first axis "
            "of all inputs (hidden states have it second: let the model make its own)"
        )


def _check_numbers(batches: Sequence[int], threads: int, rounds: int, energy_s: float) -> None:
    check_ints("compare: batches", batches, 1)
    check_threads("compare", threads)
    check_int("compare: rounds", rounds, 2)
    check_not_negative("compare: energy_s", energy_s)


def _check_outputs(arms: Mapping[str, nn.Module], inputs: tuple[Tensor, ...]) -> None:
    forms = {}
    for name, arm in arms.items():
        try:
            with torch.no_grad():
                output = copy.deepcopy(arm)(*(value.clone() for value in inputs))
        except Exception as error:
            raise ArgumentError(
                f"compare: {name!r} fails on the example inputs ({one_line(error)}); "
                "give inputs that all models take"
            ) from error
        if not any(isinstance(value, Tensor) for value in pytree.tree_leaves(output)):
            raise ArgumentError(
                f"compare: {name!r} returns a {type(output).__name__}, in which no tensors can be "
                "found; return tensors, or a tuple, list or dict of them"
            )
        forms[name] = pytree.tree_map(lambda x: list(getattr(x, "shape", ())), output)
    first, *others = forms
    for name in others:
        if forms[name] != forms[first]:
            raise ArgumentError(
                f"compare: {name!r} returns {forms[name]} and {first!r} returns {forms[first]}; "
                "compare models whose outputs have the same form"
            )


def _check_steps(arms: Mapping[str, nn.Module], inputs: tuple[Tensor, ...]) -> None:
    for name, arm in arms.items():
        try:
            training_step(copy.deepcopy(arm).train(), inputs)()
        except Exception as error:
            raise ArgumentError(
                f"compare: {name!r} cannot do a training step on the example inputs "
                f"({one_line(error)}); give a model whose outputs have gradients, "
                "and a batch of 2 or more"
            ) from error


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


def _energies(
    arms: Mapping[str, nn.Module],
    inputs: tuple[Tensor, ...],
    runs: Mapping[str, Callable[[], object]],
    threads: int,
    seconds: float,
    country: str,
) -> tuple[dict[str, Energy], dict[str, Energy]]:
    """The energy of each call and of a training step of each model, by name."""
    if not seconds:
        return {}, {}
    with flushing_denormals():
        calls = energy_in_turn(runs, seconds, country)
    steps = {name: training_step(copy.deepcopy(arm).train(), inputs) for name, arm in arms.items()}
    with using_threads(threads):
        return calls, energy_in_turn(steps, seconds, country)
