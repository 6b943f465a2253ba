"""Analysis: the shape of every value, from example inputs.

Runs the graph on fake tensors: shapes, dtypes and devices are computed, numbers are not, so the
cost does not grow with the size of the inputs and no buffer (such as a running mean) changes.
Behind an operation whose shape depends on numbers (packing sequences, ``nonzero``), and behind
packed sequences, it knows no shape.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate
from torch.nn.utils.rnn import PackedSequence

from lean_fx.errors import ArgumentError, one_line
from lean_fx.graph.facts import facts
from lean_fx.graph.patching import patching, without_caches
from lean_fx.graph.reachable import leaving_state
from lean_fx.graph.running import fake_errors_unlogged, fake_of, runnable_parts, without_gradients
from lean_fx.passes.base import Pass

_UNKNOWN = (DataDependentOutputException, DynamicOutputShapeException)


class PropagateShapes(Pass):
    """Write ``facts(node).shape`` for every node whose value is one tensor, and ``packed``.

    Args:
        example_inputs: the positional inputs of the model.

    Raises:
        ArgumentError: the inputs do not fit the model; names the first node that fails.
    """

    def __init__(self, example_inputs: Sequence[Any]) -> None:
        self.example_inputs = tuple(example_inputs)

    def requires(self, graph_module: GraphModule) -> None:
        """The inputs must be as many as the model takes."""
        check_count(graph_module, self.example_inputs)

    def run(self, graph_module: GraphModule) -> bool:
        """Interpret the graph on fake tensors."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fakes = [
            _fake_input(value, place, mode) if isinstance(value, torch.Tensor) else value
            for place, value in enumerate(self.example_inputs)
        ]
        parts = runnable_parts(graph_module, lambda tensor: fake_of(tensor, mode))
        with (
            fake_errors_unlogged(),
            leaving_state(graph_module),
            patching(without_caches(graph_module)),
            mode,
            contextlib.suppress(*_UNKNOWN),
        ):
            without_gradients(lambda: _ShapeWriter(parts, graph_module.graph).run(*fakes))
        return False


def check_count(graph_module: GraphModule, inputs: Sequence[Any]) -> None:
    """Check that a captured model takes so many positional inputs.

    Raises:
        ArgumentError: it takes fewer or more, or any number of them.
    """
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        if str(node.target).startswith("*"):
            raise ArgumentError(
                f"example_inputs: {type(graph_module).__name__} takes {node.target}, any number of "
                "inputs, and a graph takes a fixed one; wrap it in a module that names its inputs"
            )
    needed = [node for node in placeholders if not node.args]
    given = len(inputs)
    if not len(needed) <= given <= len(placeholders):
        names = ", ".join(str(node.target) for node in placeholders)
        raise ArgumentError(
            f"example_inputs: {given} given, but the model takes {len(placeholders)} ({names}); "
            "give one tensor, or a tuple of them"
        )


def cannot_run(node: Node, env: Mapping[Node, Any], error: Exception) -> ArgumentError:
    """The error for a node that fails on the values that the example inputs lead to."""
    what = str(node.target) if node.op == "call_module" else node.name

    def shape_or_self(argument: Any) -> Any:
        value = env.get(argument) if isinstance(argument, Node) else None
        return value.shape if isinstance(value, torch.Tensor) else argument

    shapes = ", ".join(str(each) for each in map_aggregate(node.args, shape_or_self))
    shapes = shapes.replace("torch.Size([", "[").replace("])", "]")
    names = [repr(each) for each in _inputs_behind(node)]
    read = f" on what comes from {' and '.join(names)}" if names else ""
    reason = one_line(error).removesuffix(".")
    return ArgumentError(
        f"example_inputs: the model cannot run on them: {what}({shapes}) failed{read} ({reason}); "
        "give inputs of the shape and dtype that the model takes"
    )


def _inputs_behind(node: Node) -> list[str]:
    """The names of the model's inputs that a node reads, or that others read for it."""
    todo, seen = [node], {node}
    while todo:
        new = [each for each in todo.pop().all_input_nodes if each not in seen]
        seen.update(new)
        todo += new
    order = node.graph.find_nodes(op="placeholder")
    return [str(each.target) for each in order if each in seen]


def _fake_input(value: torch.Tensor, place: int, mode: FakeTensorMode) -> torch.Tensor:
    try:
        return fake_of(value, mode)
    except Exception as error:
        kind = str(value.dtype).removeprefix("torch.")
        raise ArgumentError(
            f"example_inputs: input {place} is a tensor of {kind} whose shapes cannot be followed; "
            "give a tensor of plain numbers"
        ) from error


class _ShapeWriter(Interpreter):
    """Keeps the shape of every value, and says which node could not run."""

    def __init__(self, parts: nn.Module, graph: Graph) -> None:
        super().__init__(parts, graph=graph)
        self.extra_traceback = False  # it would grow the message by many lines

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if any(isinstance(value, PackedSequence) for value in (*args, *kwargs.values())):
            raise DynamicOutputShapeException(target)
        return super().call_module(target, args, kwargs)

    def run_node(self, n: Node) -> Any:
        try:
            value = super().run_node(n)
        except _UNKNOWN:
            raise
        except Exception as error:
            raise cannot_run(n, self.env, error) from error
        if isinstance(value, PackedSequence):
            facts(n).packed, facts(n).shape = True, tuple(value.data.shape)
        if isinstance(value, torch.Tensor):
            facts(n).shape = tuple(value.shape)
        return value
