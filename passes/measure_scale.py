"""Analysis: the root mean square of every value, for inputs of unit variance.

A rebuilt layer is initialised to the scale of what it will read, so that it starts where the layer
that it replaces started. How large the values are depends on the whole net before them (without
normalisation they shrink from layer to layer), so it is measured: one forward pass, without
gradients, floating-point inputs drawn from a standard normal in the shapes of the example inputs.
It is a pass of training, whatever the mode of the model: the statistics that an untrained batch
norm would use in evaluation are those of no data. Where the model cannot take such inputs (it
fails, or gives values that are not finite), the example inputs themselves are taken; where it
cannot train on them, as batch norm on a single value, it runs in its own mode. Nothing is known of
what has no numbers, on the meta device, and of what the device has no code for.
What depends on values, and ``PropagateShapes`` cannot know (some shapes, and which values are
packed sequences), is written on the way.
Neither the modules' buffers nor torch's random numbers are changed by it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn.utils.rnn import PackedSequence

from lean_fx.graph.clones import clone_sharing_state, shallow
from lean_fx.graph.facts import facts
from lean_fx.graph.reachable import leaving_state
from lean_fx.passes.base import Pass
from lean_fx.passes.propagate_shapes import cannot_run
from lean_fx.reduction.packed import with_data


class MeasureScale(Pass):
    """Write ``facts(node).rms`` for every node whose value is floating-point.

    That is one tensor, or packed sequences.

    Args:
        example_inputs: the positional inputs of the model; of the floating-point ones only shape,
            dtype and device count, unless the model cannot take others.

    Raises:
        ArgumentError: the model cannot run on the example inputs; names the first node that fails.
    """

    def __init__(self, example_inputs: tuple[Any, ...]) -> None:
        self.example_inputs = example_inputs

    def run(self, graph_module: GraphModule) -> bool:
        """Interpret the graph, unless a tensor has no numbers (meta device)."""
        tensors = [each for each in self.example_inputs if isinstance(each, torch.Tensor)]
        held = (*graph_module.parameters(), *graph_module.buffers())
        if any(tensor.is_meta for tensor in (*tensors, *held)):
            return False
        cuda = {each.device for each in tensors if each.is_cuda}
        with torch.no_grad(), torch.random.fork_rng(devices=list(cuda)):
            torch.manual_seed(0)
            found = self._found(graph_module)
        for node in graph_module.graph.nodes:
            rms = found.rms.get(node.name, math.nan)
            facts(node).rms = rms if math.isfinite(rms) else None
            if facts(node).shape is None:
                facts(node).shape = found.shapes.get(node.name)
                facts(node).packed |= node.name in found.packed
        return False

    def _found(self, graph_module: GraphModule) -> _Measure:
        """What the first run finds that gives finite numbers."""
        for training in (True, None):
            with contextlib.suppress(Exception):  # the model's code may refuse such numbers
                found = _measure(graph_module, unit_variances(self.example_inputs), training)
                if found.rms and all(map(math.isfinite, found.rms.values())):
                    return found
        with contextlib.suppress(NotImplementedError):  # such as half precision on a CPU
            return _measure(graph_module, map(_fresh, self.example_inputs), None)
        return _Measure(graph_module)


def _measure(graph_module: GraphModule, inputs: Iterable[Any], training: bool | None) -> _Measure:
    """What is found of every value in training or evaluation; None is the model's own mode."""
    measure = _Measure(graph_module)
    with leaving_state(graph_module), in_mode(graph_module, training):
        measure.run(*inputs)
    return measure


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool | None) -> Iterator[None]:
    """Within it all modules of a model are in a mode; None leaves each in its own."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, mode in before:
            module.training = mode if training is None else training
        yield
    finally:
        for module, mode in before:
            module.training = mode


def unit_variances(inputs: Iterable[Any]) -> list[Any]:
    """Inputs of the same shapes from a standard normal, the same each time; copies of the rest."""
    numbers = torch.Generator().manual_seed(0)  # another thread may draw from torch's own

    def drawn(value: Any) -> Any:
        if isinstance(value, PackedSequence):
            return with_data(value, drawn(value.data))
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            normal = torch.randn(value.shape, generator=numbers, dtype=value.dtype)
            return normal.to(value.device)
        return _fresh(value)

    return list(map(drawn, inputs))


def _fresh(value: Any) -> Any:
    """A copy of tensors, which the model may write to."""
    if isinstance(value, PackedSequence):
        return with_data(value, value.data.clone())
    return value.clone() if isinstance(value, torch.Tensor) else value


class _Measure(Interpreter):
    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.rms: dict[str, float] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.packed: set[str] = set()
        self.extra_traceback = False  # it would grow the message by many lines

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module: nn.Module = self.fetch_attr(target)
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        return torch.func.functional_call(shallow(module), buffers, args, kwargs)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = super().get_attr(target, args, kwargs)
        if isinstance(value, nn.Module):  # for what runs in one mode only
            return clone_sharing_state(value, torch.Tensor.clone)
        return value.clone() if isinstance(value, torch.Tensor) else value

    def run_node(self, n: Node) -> Any:
        try:
            value = super().run_node(n)
        except NotImplementedError:
            raise
        except Exception as error:
            raise cannot_run(n, self.env, error) from error
        found = value
        if isinstance(value, PackedSequence):
            self.packed.add(n.name)
            found = value.data
        if isinstance(found, torch.Tensor):
            self.shapes[n.name] = tuple(found.shape)
            if found.is_floating_point() and found.numel():
                self.rms[n.name] = float(found.float().square().mean().sqrt())
        return value
