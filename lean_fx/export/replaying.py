"""Run an exported graph: keep all its values, run it in float64, or perturb its rounding.

Reductions and recurrent layers are symbols in such a graph; here they are computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lean_fx.export.recurrent import recurrence
from lean_fx.reduction.functional import lean_reduction


def values_of(program: Any, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Every tensor that the captured graph computes, by the name of its node.

    Args:
        program: the ``torch.onnx.ONNXProgram`` that a file was written from.
        inputs: of the graph; they stay as they are.
    """
    replay = _Values(program.exported_program.module())
    replay.outputs(inputs)
    return replay.values


def in_float64(program: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The outputs of the captured graph with every floating-point value in float64.

    Raises:
        RuntimeError: an operator of the graph has no kernel of float64, or asks for another dtype.
    """
    return _InFloat64(program.exported_program.module()).outputs(inputs)


def moved_by_rounding(program: Any, inputs: tuple[Tensor, ...], seed: int) -> list[Tensor]:
    """The outputs of the captured graph with every value moved by one unit in the last place.

    Each moves up or down at random, by ``seed``: Monte Carlo arithmetic, in the dtypes of the
    graph.

    References:
        Parker: Monte Carlo Arithmetic, exploiting randomness in floating-point arithmetic, UCLA
        report CSD-970002, 1997.
    """
    return _Moved(program.exported_program.module(), seed).outputs(inputs)


class _Replay(torch.fx.Interpreter):
    """Runs an exported graph, and computes the reductions in it."""

    def outputs(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        with torch.no_grad():
            found = self.run(*(value.clone() for value in inputs))
        return [value for value in pytree.tree_leaves(found) if isinstance(value, Tensor)]

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "onnx_symbolic" in str(target):
            return _symbolic(args, kwargs)
        return super().call_function(target, args, kwargs)


class _Values(_Replay):
    """Keeps every tensor that is computed, by the name of its node."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op == "call_function":
            self.values[n.name] = value
        return value


class _InFloat64(_Replay):
    """Every floating-point value in float64, those that the graph casts too."""

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _widened(super().placeholder(target, args, kwargs))

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _widened(super().get_attr(target, args, kwargs))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = pytree.tree_map(_widened, (args, kwargs))
        return super().call_function(target, args, kwargs)


class _Moved(_Replay):
    """Every floating-point value moved by one unit in the last place, up or down at random."""

    def __init__(self, module: torch.fx.GraphModule, seed: int) -> None:
        super().__init__(module)
        self.chance = torch.Generator().manual_seed(seed)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return pytree.tree_map(self.moved, super().call_function(target, args, kwargs))

    def moved(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        up = torch.randint(0, 2, value.shape, generator=self.chance).to(value.device)
        factor = 1 + torch.finfo(value.dtype).eps * (2 * up - 1).to(value.dtype)
        found = value * factor
        return torch.where(found.isfinite(), found, value)  # a mask may hold the greatest number


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value


def _symbolic(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute a symbolic node; the exporter's own operator returns no numbers."""
    inputs, operator, *_ = args
    stored = {"i": kwargs["attr_ints"], "f": kwargs["attr_floats"], "s": kwargs["attr_strs"]}
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
