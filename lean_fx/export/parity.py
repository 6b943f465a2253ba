"""Whether an ONNX file gives what its module gives, and where it first does not.

A deep net may amplify the rounding of its first layers until its outputs share no digit with those
of the same net in float64. Then two right programs differ too, by as much as
:func:`rounding_error` measures, and :func:`first_difference`, which gives every node of the file
what torch gives it, still tells a wrong node from a right one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lean_fx.errors import ExportError, one_line, require
from lean_fx.export.nodes import TORCH_NAME
from lean_fx.export.replaying import in_float64, moved_by_rounding, values_of

# A file may differ by this many times what rounding alone does: it rounds differently from torch,
# and torch has rounded too.
_ROUNDINGS = 4


def check_parity(
    model: nn.Module,
    program: torch.onnx.ONNXProgram,
    part: str | os.PathLike[str],
    inputs: tuple[Tensor, ...],
    sizes: Mapping[str, int],
    tolerance: float,
) -> str:
    """Check that a file gives what its module gives, for these inputs.

    Args:
        model: as in :func:`greatest_difference`.
        program: the ``torch.onnx.ONNXProgram`` that the file was written from.
        part: the file.
        inputs: a batch.
        sizes: by name what the batch is to check, for messages.
        tolerance: the greatest difference, as a fraction.

    Returns:
        A remark where the file differs by more, but by no more than rounding explains; or "".

    Raises:
        ExportError: the model or the file cannot run on them, or they differ.
    """
    at = " and ".join(f"{name} {size}" for name, size in sizes.items()) or "these inputs"
    try:
        with redirect_stderr(StringIO()):  # torch.fx prints where a graph fails; the error says it
            apart = greatest_difference(model, part, inputs)
    except ExportError:
        raise
    except Exception as error:
        smaller = _with_small_integers(inputs, sizes)
        if smaller is not None:
            return check_parity(model, program, part, smaller, sizes, tolerance)
        reason = one_line(error)
        raise ExportError(
            f"export_onnx: {type(model).__name__} cannot run at {at} ({reason}); "
            "export it with batch='static' and no dynamic_shapes, or with those of fewer axes, or "
            "with tolerance=None, unchecked"
        ) from error
    if apart <= tolerance:
        return ""
    return _explained(apart, type(model).__name__, at, program, part, inputs, tolerance)


def _explained(
    apart: float,
    name: str,
    at: str,
    program: torch.onnx.ONNXProgram,
    part: str | os.PathLike[str],
    inputs: tuple[Tensor, ...],
    tolerance: float,
) -> str:
    """The remark that a file differs by rounding alone; if it does not, an ExportError says why."""
    try:
        with redirect_stderr(StringIO()):
            node = first_difference(program, part, inputs, tolerance)
    except AssertionError as error:  # a guard of torch.export, on a size that the code branches on
        raise ExportError(
            f"export_onnx: {name} takes another branch at {at} than for the example inputs "
            f"({one_line(error)}); export it with batch='static' and no dynamic_shapes, or leave "
            "such branches out"
        ) from error
    rounding = 0.0 if node else rounding_error(program, inputs)
    differs = (
        f"export_onnx: at {at} the file differs from {name} by {apart:.2g} of the greatest output, "
        f"tolerance={tolerance:g}; "
    )
    if apart <= _ROUNDINGS * rounding:
        return (
            f"{differs}every node does what was captured, and rounding alone moves the outputs by "
            f"{rounding:.2g}, so the model is ill-conditioned; compare the file's accuracy, not "
            "its numbers"
        )
    cause = (
        f"the first node that differs is {node}"
        if node
        else "every node does what was captured, so the model acts otherwise from call to call "
        "(state, chance, or a reduction's tol, which a file knows not)"
    )
    raise ExportError(f"{differs}{cause}; mend it, or give a greater tolerance")


def _with_small_integers(
    inputs: tuple[Tensor, ...], sizes: Mapping[str, int]
) -> tuple[Tensor, ...] | None:
    """Inputs whose integers are indices of axes of all these sizes; None if they are already.

    The edges of a graph name its nodes, of which there are fewer at some sizes.
    """
    least = min(sizes.values(), default=1)
    integers = (torch.int64, torch.int32, torch.int16, torch.uint8)
    smaller = tuple(each % least if each.dtype in integers else each for each in inputs)
    same = all(torch.equal(one, other) for one, other in zip(inputs, smaller, strict=True))
    return None if same else smaller


def greatest_difference(
    model: nn.Module, path: str | os.PathLike[str], inputs: tuple[Tensor, ...]
) -> float:
    """The greatest difference of a file's outputs from the module's, as a fraction.

    The module is called as it is, without gradients, and may change its buffers: give a copy. The
    file runs on ONNX Runtime's CPU.

    Returns:
        Over all outputs, the greatest absolute difference by the greatest magnitude of that
        output; NaN at the same place does not count. Infinite where shapes differ.
    """
    with torch.no_grad():
        expected = pytree.tree_leaves(model(*(value.clone() for value in inputs)))
    tensors = [value for value in expected if isinstance(value, Tensor)]
    found = _run(path, inputs)
    if len(tensors) != len(found):
        return float("inf")
    pairs = zip(tensors, found, strict=True)
    return max((difference(ours, theirs) for ours, theirs in pairs), default=0.0)


def difference(expected: Tensor, found: Tensor) -> float:
    """The greatest absolute difference by the greatest magnitude that is expected.

    Example:
        >>> difference(torch.tensor([0.0, 10.0]), torch.tensor([1.0, 10.0]))
        0.1
        >>> difference(torch.ones(2), torch.ones(3))
        inf
    """
    if expected.shape != found.shape:
        return float("inf")
    ours, theirs = expected.detach().cpu().double(), found.double()
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    apart = (ours - theirs).abs().nan_to_num(nan=float("inf"))
    greatest = apart.masked_fill(same, 0.0)
    if not greatest.any():
        return 0.0
    scale = ours[ours.isfinite()].abs()
    return float(greatest.max() / (scale.max() if scale.numel() and scale.any() else 1.0))


def rounding_error(program: Any, inputs: tuple[Tensor, ...]) -> float:
    """How far rounding alone moves the outputs of what torch captured.

    Args:
        program: the ``torch.onnx.ONNXProgram`` that the file was written from.
        inputs: a batch.

    Returns:
        The greatest :func:`difference` from the outputs in float64, of three runs in which every
        value is moved by one unit in the last place at random (the same way at every call).
        0 where that is not known: the graph cannot run in float64, or gives no finite numbers.
    """
    try:
        exact = in_float64(program, inputs)
    except Exception:  # an operator without a kernel of float64 raises whatever it likes
        return 0.0
    moved = (moved_by_rounding(program, inputs, seed) for seed in range(3))
    pairs = (pair for values in moved for pair in zip(exact, values, strict=True))
    greatest = max((difference(*pair) for pair in pairs), default=0.0)
    return greatest if math.isfinite(greatest) else 0.0


def first_difference(
    program: Any, path: str | os.PathLike[str], inputs: tuple[Tensor, ...], tolerance: float
) -> str | None:
    """The first node of a file that makes something else of its inputs than torch does.

    Every node is given what torch computes for it, so no node answers for those before it.

    Args:
        program: the ``torch.onnx.ONNXProgram`` that the file was written from.
        path: the file.
        inputs: of the batch at which it differs.
        tolerance: as a fraction of the value's greatest magnitude.

    Returns:
        The node's name and operator, such as ``"node_relu_1 (Relu)"``; None where every node gives
        what torch captured.
    """
    onnx = require("onnx", purpose="export")
    captured = values_of(program, inputs)
    model = onnx.load(path)
    outputs = {value.name for value in model.graph.output}
    expected = {
        node.output[0]: captured[name]
        for node in model.graph.node
        if (name := _torch_name(node)) in captured
    }
    given = _give(model, expected)
    for name in expected:
        if name not in outputs:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    names = [value.name for value in model.graph.output]
    run = _run(model.SerializeToString(), (*inputs, *given))
    found = dict(zip(names, run, strict=True))
    for node in model.graph.node:
        value = node.output[0]
        if value in expected and difference(expected[value], found[value]) > tolerance:
            return f"{node.name or value} ({node.op_type})"
    return None


def _give(model: Any, values: dict[str, Tensor]) -> list[Tensor]:
    """Make the nodes of a file read these values from new inputs; return the inputs' values.

    A value whose type in the file is another, or unknown, is still passed from node to node.
    """
    onnx = require("onnx", purpose="export")
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    given: dict[str, Tensor] = {}
    for name, value in values.items():
        if value.dtype is torch.bfloat16:  # NumPy has none
            continue
        element = onnx.helper.np_dtype_to_tensor_dtype(value.detach().cpu().numpy().dtype)
        if types.get(name) == element:
            given[name] = value
            described = onnx.helper.make_tensor_value_info(_given(name), element, value.shape)
            model.graph.input.append(described)
    for node in model.graph.node:
        node.input[:] = [_given(name) if name in given else name for name in node.input]
    return list(given.values())


def _given(name: str) -> str:
    return f"given {name}"


def _torch_name(node: Any) -> str:
    stored = (each.value for each in node.metadata_props if each.key == TORCH_NAME)
    return next(stored, str(node.output[0]))


def _run(file: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    runtime = require("onnxruntime", purpose="the check of the file")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    source = file if isinstance(file, bytes) else os.fspath(file)
    try:
        session = runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        arrays = [value.detach().cpu().numpy() for value in inputs]
        feeds = dict(zip(names, arrays, strict=True))
        return [torch.as_tensor(value) for value in session.run(None, feeds)]
    except Exception as error:
        other = any(x.dtype in (torch.float64, torch.bfloat16) for x in inputs)
        remedy = "convert the model to float32" if other else "try another opset"
        raise ExportError(
            "export_onnx: ONNX Runtime cannot run the file "
            f"({one_line(error)}); {remedy}, or "
            "tolerance=None to keep the file unchecked"
        ) from error
