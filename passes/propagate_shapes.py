"""Analysis: the shape of every value, from example inputs.

Runs the graph on fake tensors: shapes, dtypes and devices are computed, numbers are not, so the
cost does not grow with the size of the inputs and no buffer (such as a running mean) changes.
Behind an operation whose shape depends on numbers (packing sequences, ``nonzero``), and behind
packed sequences, it knows no shape.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate
from torch.nn.utils.rnn import PackedSequence

from lean_fx.errors import ArgumentError
from lean_fx.passes.base import Pass, facts, shallow, sharing_copy

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
        holes = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        needed = [node for node in holes if not node.args]
        given = len(self.example_inputs)
        if not len(needed) <= given <= len(holes):
            names = ", ".join(node.name for node in holes)
            raise ArgumentError(
                f"example_inputs: {given} given, but the model takes {len(holes)} ({names}); "
                "give one tensor, or a tuple of them"
            )

    def run(self, graph_module: GraphModule) -> bool:
        """Interpret the graph on fake tensors."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fakes = [
            mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for value in self.example_inputs
        ]
        logger = logging.getLogger("torch._subclasses.fake_tensor")
        level = logger.level
        logger.setLevel(logging.CRITICAL)  # what fails is raised, and told in one line
        try:
            with mode, torch.no_grad(), contextlib.suppress(*_UNKNOWN):
                _ShapeWriter(graph_module, mode).run(*fakes)
        finally:
            logger.setLevel(level)
        return False


class _ShapeWriter(Interpreter):
    """Keeps the shape of every value, and says which node could not run."""

    def __init__(self, graph_module: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False  # it would grow the message by many lines
        self._mode = mode
        self._fake_state: dict[torch.Tensor, torch.Tensor] = {}

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor not in self._fake_state:
            self._fake_state[tensor] = self._mode.from_tensor(tensor)
        return self._fake_state[tensor]

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if any(isinstance(value, PackedSequence) for value in args):
            raise DynamicOutputShapeException(target)
        # Fake parameters and buffers: one would otherwise be written to, as batch norm does.
        module: nn.Module = self.fetch_attr(target)
        state = dict(module.named_parameters()) | dict(module.named_buffers())
        fakes = {name: self._fake(tensor) for name, tensor in state.items()}
        return torch.func.functional_call(shallow(module), fakes, args, kwargs)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = super().get_attr(target, args, kwargs)
        if isinstance(value, nn.Module):  # for what runs in one mode only
            return sharing_copy(value, self._fake)
        return self._fake(value) if isinstance(value, torch.Tensor) else value

    def _shape_or_self(self, argument: Any) -> Any:
        value = self.env.get(argument) if isinstance(argument, Node) else None
        return value.shape if isinstance(value, torch.Tensor) else argument

    def run_node(self, n: Node) -> Any:
        try:
            value = super().run_node(n)
        except _UNKNOWN:
            raise
        except Exception as error:
            what = str(n.target) if n.op == "call_module" else n.name
            shapes = map_aggregate(n.args, self._shape_or_self)
            reason = " ".join(str(error).split()).removesuffix(".")
            raise ArgumentError(
                f"example_inputs: the model cannot run on them: {what}{_plain(shapes)} failed "
                f"({reason}); give inputs of the shape and dtype that the model takes"
            ) from error
        if isinstance(value, PackedSequence):
            facts(n).packed, facts(n).shape = True, tuple(value.data.shape)
        if isinstance(value, torch.Tensor):
            facts(n).shape = tuple(value.shape)
        return value


def _plain(shapes: Any) -> str:
    return str(shapes).replace("torch.Size", "").replace("([", "[").replace("])", "]")
