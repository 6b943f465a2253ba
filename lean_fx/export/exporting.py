"""From a module to an ONNX file."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from lean_fx.capture.example_inputs import as_inputs
from lean_fx.checks import (
    check_choice,
    check_int,
    check_shapes,
    check_values,
    quantized_by_torch,
)
from lean_fx.cloning import clone
from lean_fx.errors import (
    ArgumentError,
    CaptureError,
    ExportError,
    LeanWarning,
    one_line,
    require,
)
from lean_fx.export.inputs import (
    batch_axes,
    check_axes,
    sizes_to_check,
    with_sizes,
    without_ones,
)
from lean_fx.export.lean_function import DOMAIN, INLINED
from lean_fx.export.of_tensors import of_tensors
from lean_fx.export.parity import check_parity
from lean_fx.export.program import PACKED, exported_program
from lean_fx.export.quantization import (
    Int8Target,
    Quantize,
    accuracy_of,
    check_int8,
    gives_batches,
    quantize_onnx,
)
from lean_fx.export.stored_plan import held_plan
from lean_fx.files import replacing
from lean_fx.locks import SHARED_STATE
from lean_fx.planning.plans import PLAN

Batch = Literal["dynamic", "static"]
Functions = Literal["keep", "inline"]


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

    Every reduction is one node ``LEAN`` of the domain ``lean_fx``, defined in the same file by a
    function of standard operators. Inputs are named ``input`` (or ``input_0``, ``input_1``, ...);
    the first axis of each is the batch, unless ``dynamic_shapes`` says otherwise: of layers that
    take sequences first, as recurrent ones do by default, it is the length. A reduced model's plan
    is stored with it, see :func:`~lean_fx.plan_of`. The model's own mode is restored, and so is the
    state of the CPU's random numbers. A file at ``path`` is replaced only when the new one is whole
    and gives what the model gives. Weights of more than 1.5 GB, which such a file cannot hold,
    stand beside it: ``net.onnx.data`` for ``net.onnx``.

    ONNX has no packed sequences, and ONNX Runtime's CPU no RNN, LSTM or GRU of float64.

    Args:
        model: a module, such as leanify's result.
        path: where to write; its folder must exist.
        example_inputs: a tensor, or a tuple of the positional inputs or a mapping of their names,
            batch first. A batch of 1,
            or any axis of ``dynamic_shapes`` that is 1, is doubled, since torch's exporter would
            freeze it. The tensors in lists, tuples, dicts and dataclasses are the inputs of the
            file, one after another; None and numbers are part of it.
        batch: ``"dynamic"``, any batch, checked at 1, 2 and 5; or ``"static"``, that of the
            example inputs alone.
        dynamic_shapes: for each input the axes that may have any size, by name, such as
            ``({0: "batch", 1: "length"}, {1: "batch"})``: in place of axis 0 of all. One name is
            one size. ``"batch"`` is checked at 1, 2 and 5, other names at half, once and twice the
            size in the example inputs.
        opset: the ONNX opset, 18 or more, or None for the exporter's own.
        functions: ``"keep"`` for LEAN nodes, ``"inline"`` for only standard operators, for
            runtimes that know no functions, or no overloads of them, as onnx's own
            ``ReferenceEvaluator``: reductions of different forms share the name LEAN.
        quantize: ``"dynamic"`` or ``"static"`` to write an INT8 twin beside the file too, see
            :func:`~lean_fx.export.quantization.quantize_onnx`.
        calibration: batches of inputs, only for ``"static"``.
        evaluation: batches ``(inputs, labels)``, to say what the twin costs in accuracy.
        int8_target: the processors that a static twin is for: ``"portable"``, all of them; or
            ``"vnni"``, those that multiply 8-bit weights exactly, see
            :mod:`lean_fx.export.quantization`. A twin that differs from the file by more than a
            tenth of the mean output, on the data given, brings a LeanWarning.
        tolerance: the greatest difference from the model's own outputs, as a fraction of their
            greatest magnitude, above 0; None to write the file unchecked. Where rounding alone,
            measured against float64, moves the outputs by more than a quarter of what the file
            differs, and each node keeps to the tolerance, a LeanWarning says so in place of an
            error: the model is ill-conditioned.

    Returns:
        Where the files are, and their accuracy if that was asked for.

    Raises:
        ArgumentError: the inputs are neither a tensor nor a tuple, or one is not a batch; or an
            option or ``dynamic_shapes`` does not fit; or the model is on the meta device, or has
            lazy layers without a shape.
        ExportError: torch cannot export the model, such as quantised layers; says why. Or the file
            differs from the model; names the first node that does.
        MissingDependencyError: onnx or onnxscript is not installed; or onnxruntime, for the check.
        WriteError: the path cannot be written.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "net.onnx"
        >>> exported = export_onnx(nn.Linear(4, 2), path, torch.rand(2, 4))
        >>> exported.path.exists()
        True
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"export_onnx: model={type(model).__name__} object is not a module")
    check_shapes(model, "export_onnx")
    check_values(model, "export_onnx")
    _check_float(model)
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError(f"export_onnx: path={path!r} is not a path; give the name of a file")
    if opset is not None:
        opset = check_int("export_onnx: opset", opset, 18)
    check_choice("export_onnx: batch", batch, get_args(Batch))
    check_choice("export_onnx: functions", functions, get_args(Functions))
    if quantize is not None:
        check_choice("export_onnx: quantize", quantize, get_args(Quantize))
    elif calibration is not None or evaluation is not None:
        raise ArgumentError(
            "export_onnx: calibration and evaluation are for quantize; give that too, or neither"
        )
    if quantize == "static" and calibration is None:
        raise ArgumentError("export_onnx: quantize='static' needs calibration; give batches")
    if quantize == "dynamic" and calibration is not None:
        raise ArgumentError(
            "export_onnx: calibration is for quantize='static'; give that, or leave calibration out"
        )
    for name, batches in (("calibration", calibration), ("evaluation", evaluation)):
        if batches is not None and not gives_batches(batches):
            raise ArgumentError(
                f"export_onnx: {name}={type(batches).__name__} object gives no batches; give them "
                "in a list or a loader"
            )
    check_choice("export_onnx: int8_target", int8_target, get_args(Int8Target))
    if int8_target != "portable" and quantize != "static":
        raise ArgumentError(
            f"export_onnx: int8_target={int8_target!r} is for quantize='static'; give that, or "
            "leave int8_target out"
        )
    if tolerance is not None and not (isinstance(tolerance, float) and tolerance > 0):
        raise ArgumentError(f"export_onnx: tolerance={tolerance!r} is not a float above 0 or None")
    for package in ("onnx", "onnxscript") + ("onnxruntime",) * (
        tolerance is not None or quantize is not None
    ):
        require(package, purpose="export")
    whole, (model, given) = model, of_tensors(model, as_inputs(example_inputs, model))
    if any(isinstance(value, PackedSequence) for value in given):
        raise ArgumentError(f"example_inputs: {PACKED}")
    if dynamic_shapes is None:
        axes = batch_axes(given, batch == "dynamic")
    elif batch == "static":
        raise ArgumentError("export_onnx: batch='static' and dynamic_shapes exclude each other")
    else:
        axes = check_axes(given, dynamic_shapes)
    inputs = without_ones(given, axes)
    with SHARED_STATE, _evaluating(model):
        _check_runs(model, inputs)
    remark = ""
    with SHARED_STATE, replacing(path) as part, _evaluating(model):
        program = exported_program(model, inputs, axes, opset)
        plan = held_plan(whole)
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
        warnings.warn(remark, LeanWarning, stacklevel=2)
    target = Path(path)
    if quantize is None:
        return Exported(target)
    # Both may be iterators, and are read more than once.
    calibrating, tried = ([] if data is None else list(data) for data in (calibration, evaluation))
    twin = quantize_onnx(target, quantize, calibrating, int8_target)
    made = Exported(target, twin, int8_target=int8_target)
    if evaluation is not None:
        made = dataclasses.replace(
            made, accuracy=accuracy_of(target, tried), int8_accuracy=accuracy_of(twin, tried)
        )
    seen = calibrating or [batch[0] for batch in tried] or [inputs]
    return dataclasses.replace(made, int8_difference=check_int8(target, twin, seen, int8_target))


@dataclass(frozen=True)
class Exported:
    """What :func:`export_onnx` wrote.

    Attributes:
        path: the file.
        int8_path: its INT8 twin, if that was asked for.
        accuracy: of the file, in [0, 1], if evaluation data were given.
        int8_accuracy: of the twin.
        int8_target: the processors that the twin is for, if there is one.
        int8_difference: of the twin from the file on this machine and the data given: the mean
            difference of the outputs, as a fraction of their mean magnitude.
    """

    path: Path
    int8_path: Path | None = None
    accuracy: float | None = None
    int8_accuracy: float | None = None
    int8_target: Int8Target | None = None
    int8_difference: float | None = None


def _inline(part: Path) -> None:
    onnx, inliner = require("onnx", purpose="export"), require("onnx.inliner", purpose="export")
    model = inliner.inline_local_functions(onnx.load(part, load_external_data=False))
    kept = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    for node in model.graph.node:
        node.name = node.name or INLINED + node.output[0]  # those of functions have none
    onnx.save(model, part)


def _check_float(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if quantized_by_torch(module):
            kind = type(module)
            raise ExportError(
                f"export_onnx: layer {name!r} ({kind.__module__}.{kind.__qualname__}) is of "
                "torch.ao.quantization, which has no ONNX form; export the float model, with "
                "quantize='dynamic' or 'static' for an INT8 file"
            )


def _check_runs(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Run a copy once: the exporter's own word on inputs that do not fit is hard to read."""
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
    """A copy, whose buffers may change; of what cannot be copied, the model itself."""
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
