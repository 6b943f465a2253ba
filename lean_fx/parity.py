"""Whether an ONNX file gives what its module gives, and where it first does not."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lean_fx.errors import ExportError, require
from lean_fx.functional import lean_reduction
from lean_fx.onnx_nodes import TORCH_NAME
from lean_fx.onnx_recurrent import recurrence


def greatest_difference(
    model: nn.Module, path: str | os.PathLike[str], inputs: tuple[Tensor, ...]
) -> float:
    """The greatest difference of a file's outputs from the module's, as a fraction.

    The module is called as it is, without gradients, and may change its buffers: give a copy. The
    file runs on ONNX Runtime's CPU.

    Returns:
        Over all outputs, the greatest absolute difference by the greatest magnitude of that
        output; NaN at the same place is no difference. Infinite where shapes differ.
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


def first_difference(
    program: Any, path: str | os.PathLike[str], inputs: tuple[Tensor, ...], tolerance: float
) -> str | None:
    """The first node of a file, in the order of the run, whose value differs from torch's.

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
    expected = _Values(program.exported_program.module()).values_of(inputs)
    model = onnx.load(path)
    outputs = {value.name for value in model.graph.output}
    names_in_torch = {node.output[0]: _torch_name(node) for node in model.graph.node}
    nodes = [node for node in model.graph.node if names_in_torch[node.output[0]] in expected]
    for node in nodes:
        if node.output[0] not in outputs:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.output[0]))
    names = [value.name for value in model.graph.output]
    found = dict(zip(names, _run(model.SerializeToString(), inputs), strict=True))
    for node in nodes:
        value = node.output[0]
        if difference(expected[names_in_torch[value]], found[value]) > tolerance:
            return f"{node.name or value} ({node.op_type})"
    return None


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
            f"({' '.join(str(error).split())[:300]}); {remedy}, or "
            "tolerance=None to keep the file unchecked"
        ) from error


class _Values(torch.fx.Interpreter):
    """Runs an exported graph and keeps every tensor by the name of its node."""

    def values_of(self, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        self.values: dict[str, Tensor] = {}
        with torch.no_grad():
            self.run(*(value.clone() for value in inputs))
        return self.values

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and "onnx_symbolic" in str(n.target):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            value = _symbolic(args, kwargs)
        if isinstance(value, Tensor) and n.op == "call_function":
            self.values[n.name] = value
        return value


def _symbolic(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an ONNX node of ours stands for; the exporter's own operator computes nothing."""
    inputs, operator, *_ = args
    stored = {"i": kwargs["attr_ints"], "s": kwargs["attr_strs"]}
    places = zip(kwargs["attr_keys"], kwargs["attr_types"], kwargs["attr_pos"], strict=True)
    options = {
        key: stored[kind[0]][slice(*place)] if len(kind) > 1 else stored[kind][place[0]]
        for key, kind, place in places
    }
    if operator in ("RNN", "LSTM", "GRU"):
        return recurrence(operator, inputs, options)
    x, seed = inputs
    options["nonnegative"] = bool(options["nonnegative"])
    return lean_reduction(x, seed, options.pop("axis"), **options)
