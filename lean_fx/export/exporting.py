"""Export a module to an ONNX file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from lean_fx.capture.example_inputs import as_inputs
from lean_fx.cloning import clone
from lean_fx.errors import ArgumentError, CaptureError, one_line, require, warn
from lean_fx.export.function_body import DOMAIN, INLINED
from lean_fx.export.inputs import (
    Axes,
    batch_axes,
    check_axes,
    sizes_to_check,
    with_sizes,
    without_ones,
)
from lean_fx.export.int8_accuracy import accuracy_of, check_int8
from lean_fx.export.of_tensors import of_tensors
from lean_fx.export.options import (
    Batch,
    Functions,
    check_int8_options,
    check_model,
    check_options,
)
from lean_fx.export.parity import check_parity
from lean_fx.export.program import PACKED, exported_program
from lean_fx.export.quantization import Int8Target, Quantize, quantize_onnx
from lean_fx.export.stored_plan import attached_plan
from lean_fx.files import replacing
from lean_fx.locks import SHARED_STATE
from lean_fx.planning.plans import PLAN


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    batch: Batch = "dynamic",
    dynamic_shapes: Sequence[Mapping[int, str]] | None = None,
    opset: int | None = None,
    functions: Functions = "keep",
    quantize: Quantize | None = None,
    calibration: Iterable[Any] | None = None,
    evaluation: Iterable[Any] | None = None,
    int8_target: Int8Target = "portable",
    tolerance: float | None = 1e-3,
) -> Exported:
    """Write a model to an ONNX file, in eval mode.

    Every LEAN reduction becomes one node of the domain ``lean_fx``: ``LEAN``, ``LEANSimplex`` or
    ``LEANGated``; a function in the same file defines it by standard operators. Inputs are named
    ``input`` (or ``input_0``, ``input_1``, ...).
    A reduced model's plan is stored in the file (:func:`~lean_fx.plan_of`). The model's mode and
    the CPU's random state are restored. A file at ``path`` is replaced only when the new one is
    complete and computes what the model computes. Weights of more than 1.5 GB do not fit into the
    file; they go beside it, into ``net.onnx.data`` for ``net.onnx``.

    ONNX has no packed sequences, and ONNX Runtime's CPU has no RNN, LSTM or GRU in float64.

    Args:
        model: a module, such as leanify's result.
        path: where to write; its folder must exist.
        example_inputs: a tensor, a tuple of the positional inputs, or a mapping of their names,
            batch first. Tensors inside lists, tuples, dicts and dataclasses become inputs of the
            file, in order; None and numbers become part of it. A batch of 1, or any axis of
            ``dynamic_shapes`` that is 1, is doubled, since torch's exporter would freeze it.
        batch: ``"dynamic"`` for any batch, checked at 1, 2 and 5; ``"static"`` for that of the
            example inputs.
        dynamic_shapes: for each input, names of the axes that may have any size, such as
            ``({0: "batch", 1: "length"}, {1: "batch"})``; by default axis 0 is the batch. Recurrent
            layers, for one, read the length on axis 0 by default. Equal names mean equal sizes.
            ``"batch"`` is checked at 1, 2 and 5, other names at half, once and twice the size in
            the example inputs.
        opset: the ONNX opset, 18 or more; None for the exporter's own.
        functions: ``"keep"`` for LEAN nodes; ``"inline"`` for standard operators only. Inline for
            runtimes without functions, or without overloads of functions such as onnx's
            ``ReferenceEvaluator``: nodes of other sizes are overloads of one operator.
        quantize: ``"dynamic"`` or ``"static"`` to also write an INT8 twin beside the file, see
            :func:`~lean_fx.export.quantization.quantize_onnx`.
        calibration: batches of inputs, for ``"static"`` only.
        evaluation: batches ``(inputs, labels)``, to measure the accuracy that the twin loses.
        int8_target: the processors for a static twin: ``"portable"`` for all of them, or
            ``"vnni"`` for those that multiply 8-bit weights exactly
            (:mod:`lean_fx.export.quantization`). A LeanWarning says if the twin's outputs differ
            from the file's by more than a tenth of their mean magnitude on the given data.
        tolerance: the greatest allowed difference from the model's outputs, as a fraction of their
            greatest magnitude, above 0; None to skip the check. If the file exceeds it although
            each node keeps to it, and rounding alone (measured against float64) accounts for a
            quarter of the difference or more, the model is ill-conditioned: then a LeanWarning
            takes the place of the error.

    Returns:
        Where the files are, and their accuracy if evaluation data were given.

    Raises:
        ArgumentError: the inputs are not a tensor, tuple or mapping, or one has no batch; or an
            option or ``dynamic_shapes`` does not fit; or the model is on the meta device, or has
            lazy layers without a shape.
        ExportError: torch cannot export the model, for example quantised layers; the message says
            why. Or the file differs from the model; the message names the first node that does.
        MissingDependencyError: onnx or onnxscript is not installed; or onnxruntime, for the check.
        WriteError: the path cannot be written.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "net.onnx"
        >>> exported = export_onnx(nn.Linear(4, 2), path, torch.rand(2, 4))
        >>> exported.path.exists()
        True
    """
    check_model(model)
    check_options(path, batch, functions, opset, tolerance)
    check_int8_options(quantize, calibration, evaluation, int8_target)
    for package in ("onnx", "onnxscript"):
        require(package, purpose="export")
    if tolerance is not None or quantize is not None:
        require("onnxruntime", purpose="export")
    whole, (model, given) = model, of_tensors(model, as_inputs(example_inputs, model))
    if any(isinstance(value, PackedSequence) for value in given):
        raise ArgumentError(f"example_inputs: {PACKED}")
    axes = _free_axes(given, batch, dynamic_shapes)
    inputs = without_ones(given, axes)
    with SHARED_STATE, _evaluating(model):
        _check_runs(model, inputs)
    remark = ""
    with SHARED_STATE, replacing(path) as part, _evaluating(model):
        program = exported_program(model, inputs, axes, None if opset is None else int(opset))
        plan = attached_plan(whole)
        if plan is not None and isinstance(plan.reduction, str):
            program.model.metadata_props[PLAN] = plan.to_json()
        program.save(part)
        if functions == "inline":
            _inline(part)
        if tolerance is not None:
            for checked in sizes_to_check(inputs, axes):
                values = with_sizes(inputs, axes, checked)
                found = check_parity(_copy(model), program, part, values, checked, tolerance)
                remark = remark or found
    if remark:
        warn(remark)
    exported = Exported(Path(path))
    if quantize is not None:
        # Both may be iterators, and are read more than once.
        seen, tried = (None if data is None else list(data) for data in (calibration, evaluation))
        exported = _with_int8_twin(exported, quantize, seen or [], tried, int8_target, inputs)
    return exported


@dataclass(frozen=True)
class Exported:
    """What :func:`export_onnx` wrote.

    Attributes:
        path: the file.
        int8_path: its INT8 twin, if there is one.
        accuracy: the accuracy of the file, in [0, 1], if evaluation data were given.
        int8_accuracy: the accuracy of the twin.
        int8_target: the processors that the twin is for.
        int8_difference: how far the twin's outputs differ from the file's on this machine and the
            given data: the mean difference, as a fraction of the mean magnitude.
    """

    path: Path
    int8_path: Path | None = None
    accuracy: float | None = None
    int8_accuracy: float | None = None
    int8_target: Int8Target | None = None
    int8_difference: float | None = None


def _free_axes(inputs: Sequence[Any], batch: Batch, dynamic_shapes: Any) -> Axes:
    if dynamic_shapes is None:
        return batch_axes(inputs, batch == "dynamic")
    if batch == "static":
        raise ArgumentError("export_onnx: batch='static' and dynamic_shapes exclude each other")
    return check_axes(inputs, dynamic_shapes)


def _with_int8_twin(
    exported: Exported,
    quantize: Quantize,
    calibrating: list[Any],
    tried: list[Any] | None,
    int8_target: Int8Target,
    inputs: tuple[torch.Tensor, ...],
) -> Exported:
    """Write the INT8 twin of a file, and measure what it loses.

    Args:
        exported: the file.
        quantize: as in :func:`export_onnx`.
        calibrating: batches of inputs.
        tried: batches of inputs and labels; None to measure no accuracy.
        int8_target: as in :func:`export_onnx`.
        inputs: the example inputs, for comparing the two if there are no batches.
    """
    path = exported.path
    twin = quantize_onnx(path, quantize, calibrating, int8_target)
    made = dataclasses.replace(exported, int8_path=twin, int8_target=int8_target)
    if tried is not None:
        made = dataclasses.replace(
            made, accuracy=accuracy_of(path, tried), int8_accuracy=accuracy_of(twin, tried)
        )
    seen = calibrating or [batch[0] for batch in tried or []] or [inputs]
    return dataclasses.replace(made, int8_difference=check_int8(path, twin, seen, int8_target))


def _inline(part: Path) -> None:
    onnx, inliner = require("onnx", purpose="export"), require("onnx.inliner", purpose="export")
    model = inliner.inline_local_functions(onnx.load(part, load_external_data=False))
    kept = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    for node in model.graph.node:
        node.name = node.name or INLINED + node.output[0]  # nodes of functions have no names
    onnx.save(model, part)


def _check_runs(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Run a copy once: the exporter's own error for inputs that do not fit is hard to read."""
    try:
        with torch.no_grad():
            _copy(model)(*(value.clone() for value in inputs))
    except Exception as error:
        shapes = ", ".join(str(list(value.shape)) for value in inputs) or "none"
        reason = one_line(error)
        raise ArgumentError(
            f"example_inputs: {type(model).__name__} cannot run on {shapes} ({reason}); give "
            "inputs of the shape and dtype that the model takes"
        ) from error


def _copy(model: nn.Module) -> nn.Module:
    """A copy, whose buffers may change; the model itself if it cannot be copied."""
    try:
        return clone(model)
    except CaptureError:
        return model


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
