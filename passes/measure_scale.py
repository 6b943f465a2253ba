"""Analysis: the root mean square of every value, for inputs of unit variance.

A rebuilt layer is initialised to the scale of what it will read, so that it starts where the layer
that it replaces started. How large the values are depends on the whole net before them (without
normalisation they shrink from layer to layer), so it is measured: one forward pass, without
gradients, floating-point inputs drawn from a standard normal in the shapes of the example inputs.
Where the model cannot take such inputs (it fails, or gives values that are not finite), the example
inputs themselves are taken; where it cannot take those either, nothing is known.
The shapes that depend on values, which ``PropagateShapes`` cannot know, are written on the way.
Neither the modules' buffers nor torch's random numbers are changed by it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn.utils.rnn import PackedSequence

from lean_fx.packed import with_data
from lean_fx.passes.base import Pass, facts, shallow, sharing_copy


class MeasureScale(Pass):
    """Write ``facts(node).rms`` for every node whose value is floating-point.

    That is one tensor, or packed sequences.

    Args:
        example_inputs: the positional inputs of the model; of the floating-point ones only shape,
            dtype and device count.
    """

    def __init__(self, example_inputs: tuple[Any, ...]) -> None:
        self.example_inputs = example_inputs

    def run(self, graph_module: GraphModule) -> bool:
        """Interpret the graph once, unless a parameter has no data (meta device)."""
        if any(tensor.is_meta for tensor in graph_module.state_dict().values()):
            return False
        tensors = [each for each in self.example_inputs if isinstance(each, torch.Tensor)]
        cuda = {each.device for each in tensors if each.is_cuda}
        with torch.no_grad(), torch.random.fork_rng(devices=list(cuda)):
            torch.manual_seed(0)
            for inputs in (tuple(map(unit_variance, self.example_inputs)), self.example_inputs):
                found = _measure(graph_module, inputs)
                if found.rms and all(map(math.isfinite, found.rms.values())):
                    break
        for node in graph_module.graph.nodes:
            rms = found.rms.get(node.name, math.nan)
            facts(node).rms = rms if math.isfinite(rms) else None
            if facts(node).shape is None:
                facts(node).shape = found.shapes.get(node.name)
        return False


def _measure(graph_module: GraphModule, inputs: tuple[Any, ...]) -> _Measure:
    """What is found of every value; nothing if the model fails on the inputs."""
    measure = _Measure(graph_module)
    try:
        measure.run(*inputs)
    except Exception:  # the model's own code may raise anything, and a scale is no necessity
        return _Measure(graph_module)
    return measure


def unit_variance(value: Any) -> Any:
    """Values of the same shape from a standard normal; what is not floating-point, as it is."""
    if isinstance(value, PackedSequence):
        return with_data(value, unit_variance(value.data))
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return torch.randn_like(value)
    return value


class _Measure(Interpreter):
    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.rms: dict[str, float] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.extra_traceback = False  # its errors are caught

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module: nn.Module = self.fetch_attr(target)
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        return torch.func.functional_call(shallow(module), buffers, args, kwargs)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = super().get_attr(target, args, kwargs)
        if isinstance(value, nn.Module):  # for what runs in one mode only
            return sharing_copy(value, torch.Tensor.clone)
        return value.clone() if isinstance(value, torch.Tensor) else value

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        found = value.data if isinstance(value, PackedSequence) else value
        if isinstance(found, torch.Tensor):
            self.shapes[n.name] = tuple(found.shape)
            if found.is_floating_point() and found.numel():
                self.rms[n.name] = float(found.float().square().mean().sqrt())
        return value
