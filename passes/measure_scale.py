"""Analysis: the root mean square of every value, for inputs of unit variance.

A rebuilt layer is initialised to the scale of what it will read, so that it starts where the layer
that it replaces started. How large the values are depends on the whole net before them (without
normalisation they shrink from layer to layer), so it is measured, in one forward pass without
gradients. The floating-point inputs are drawn from a standard normal, in the shapes of the example
inputs. The model runs in training mode, whatever its own: in evaluation an untrained batch norm
would use statistics that come from no data.

If that fails or gives values that are not finite, the model runs on the same inputs in its own mode
(batch norm cannot train on a single value), and then on the example inputs themselves. Nothing is
measured on the meta device, which has no numbers, or where the device lacks an operation.

The pass also writes what only real values show and ``PropagateShapes`` cannot know: some shapes,
and which values are packed sequences. It changes neither buffers nor torch's random numbers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from lean_fx.graph.facts import facts
from lean_fx.graph.reachable import leaving_state
from lean_fx.graph.running import runnable_parts, without_gradients
from lean_fx.passes.base import Pass
from lean_fx.passes.propagate_shapes import cannot_run


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
        with torch.random.fork_rng(devices=list(cuda)):
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
            return _measure(graph_module, self.example_inputs, None)
        return _Measure(graph_module, graph_module.graph)


def _measure(graph_module: GraphModule, inputs: Iterable[Any], training: bool | None) -> _Measure:
    """What is found of every value in training or evaluation; None is the model's own mode."""
    parts = runnable_parts(graph_module, _copy_of_buffer)
    for module in parts.modules():
        module.training = module.training if training is None else training
    given = list(inputs)

    def run() -> _Measure:
        measure = _Measure(parts, graph_module.graph)
        measure.run(*pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, given))
        return measure

    with leaving_state(graph_module):
        return without_gradients(run)


def _copy_of_buffer(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if isinstance(tensor, nn.Parameter) else tensor.clone()


def unit_variances(inputs: Iterable[Any]) -> list[Any]:
    """Inputs of the same shapes from a standard normal, the same each time; copies of the rest."""
    numbers = torch.Generator().manual_seed(0)  # another thread may draw from torch's own

    def drawn(value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point():
            return value.clone()
        normal = torch.randn(value.shape, generator=numbers, dtype=value.dtype)
        return normal.to(value.device)

    drawn_inputs: list[Any] = pytree.tree_map_only(torch.Tensor, drawn, list(inputs))
    return drawn_inputs


class _Measure(Interpreter):
    def __init__(self, parts: nn.Module, graph: Graph) -> None:
        super().__init__(parts, graph=graph)
        self.rms: dict[str, float] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.packed: set[str] = set()
        self.extra_traceback = False  # it would grow the message by many lines

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = super().get_attr(target, args, kwargs)
        return value.clone() if isinstance(value, nn.Parameter) else value  # a graph may write

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
                self.rms[n.name] = float(found.detach().float().square().mean().sqrt())
        return value
