"""Analysis: which values are proved to have no element below zero.

A LEAN reduction of such a value is cheaper: its sums factor (:mod:`lean_fx.reduction.walk`). A
wrong proof would be silent, so a rule says yes only where the mathematics does, and no otherwise.

Values are taken to be real and floating, as everything is that a reduction reads. Rules:

1. ReLU, ReLU6, sigmoid, hardsigmoid, softmax, abs, square, exp, sqrt, softplus with its usual
   arguments, and a clamp to bounds of 0 or more are never negative, whatever they read.
2. Pooling, dropout, padding with zeros, interpolation without overshoot, and whatever only moves
   or picks elements (flatten, view, permute, chunk, index, ...) keep what their input is; so do
   sums and means. Pooling does not if it divides by a negative number, or if dilated, when a
   window may lie in the padding alone and give minus infinity.
3. Sums, products and minima of non-negative values and numbers are non-negative. So is a quotient
   by a positive number, but not one by a value: 1 / -0.0 is minus infinity. A product of a value
   with itself is non-negative, and so is a maximum if one operand is.
4. An RNN of ReLUs gives values and hidden states that are never negative; packing and padding
   with 0 or more keep what their input is.
5. A concatenation or stack is if all its parts are.
6. If an in-place operation may later change a value, directly or through a view, the value is
   proved only if the result of that operation is proved too.
7. Of a module with hooks, or with a forward of its own, nothing is known.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.utils import rnn

from lean_fx.graph.calls import argument, called, modules_by_name
from lean_fx.graph.facts import facts
from lean_fx.graph.ops import (
    ADAPTIVE_POOL_CALLS,
    ADAPTIVE_POOLS,
    DROPOUT_CALLS,
    DROPOUTS,
    MAX_POOL_CALLS,
    MAX_POOLS,
)
from lean_fx.passes.base import Pass
from lean_fx.reduction.packed import SequenceDropout

_NEVER_NEGATIVE: set[Any] = {
    *(nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softmax2d),
    *(F.relu, F.relu6, F.sigmoid, F.hardsigmoid, F.softmax, F.relu_),
    *(torch.relu, torch.relu_, torch.sigmoid, torch.softmax, torch.exp, torch.abs, torch.square),
    torch.sqrt,
    *("relu", "relu_", "sigmoid", "sigmoid_", "softmax", "exp", "exp_", "abs", "abs_"),
    *("square", "square_", "sqrt", "sqrt_"),
}
_KEEPS: set[Any] = {
    *(nn.AvgPool1d, F.avg_pool1d, *ADAPTIVE_POOLS, *ADAPTIVE_POOL_CALLS),
    *(*DROPOUTS, *DROPOUT_CALLS, nn.Identity),
    *(nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    *(SequenceDropout, rnn.pack_padded_sequence, F.pixel_shuffle, F.pixel_unshuffle),
    *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze),
    *(torch.unsqueeze, torch.movedim, torch.chunk, torch.split, torch.narrow, torch.clone),
    *(torch.mean, torch.sum, torch.amax, torch.amin, operator.getitem),
    *("flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "contiguous"),
    *("clone", "chunk", "split", "narrow", "expand", "repeat", "movedim", "detach"),
    *("mean", "sum", "amax", "amin", "t"),
}
_MODES = ("nearest", "nearest-exact", "linear", "bilinear", "trilinear", "area")


class InferSign(Pass):
    """Write ``facts(node).nonnegative`` for every node; ``TrackWrites`` comes before."""

    def run(self, graph_module: GraphModule) -> bool:
        """Prove forwards; while an in-place operation undoes a proof, prove again without it."""
        modules = modules_by_name(graph_module)
        spoiled: set[str] = set()
        while True:
            for node in graph_module.graph.nodes:
                known = facts(node)
                known.nonnegative = known.storage not in spoiled and _is_nonnegative(node, modules)
            written = [facts(node) for node in graph_module.graph.nodes if facts(node).writes]
            more = {known.storage for known in written if not known.nonnegative}
            if more <= spoiled:
                return False
            spoiled |= more


def _is_nonnegative(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    target = called(node, modules)
    rule = _RULES.get(target) if isinstance(target, Hashable) else None
    module = modules[str(node.target)] if node.op == "call_module" else None
    return rule is not None and rule(_Call(node, module))


@dataclass(frozen=True)
class _Call:
    """A call of a function, a method or a module."""

    node: Node
    module: nn.Module | None

    def option(self, index: int, name: str, default: Any = None) -> Any:
        """An argument of a function, or the attribute of a module that stands for it."""
        if self.module is not None:
            return getattr(self.module, name)
        return argument(self.node, index, name, default)

    @property
    def input(self) -> bool:
        """Whether the input is proved."""
        return _is_proved(argument(self.node, 0, "input"))

    @property
    def operands(self) -> list[Any]:
        """All arguments."""
        return [*self.node.args, *self.node.kwargs.values()]


def _is_proved(value: Any) -> bool:
    """Whether an argument is a number of 0 or more, or a node that is proved."""
    if isinstance(value, Node):
        return facts(value).nonnegative
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _is_positive(value: Any) -> bool:
    return _is_proved(value) and not isinstance(value, Node) and value > 0


def _always(call: _Call) -> bool:
    return True


def _if_input(call: _Call) -> bool:
    return call.input


def _if_all(call: _Call) -> bool:
    return all(map(_is_proved, call.operands))


def _product(call: _Call) -> bool:
    values = call.operands
    return _if_all(call) or (len(values) == 2 and values[0] is values[1])


def _quotient(call: _Call) -> bool:
    return _is_positive(argument(call.node, 1, "other")) and call.input


def _power(call: _Call) -> bool:
    exponent = argument(call.node, 1, "exponent")
    if isinstance(exponent, int) and exponent % 2 == 0:
        return True
    return _is_proved(exponent) and not isinstance(exponent, Node) and call.input


def _clamp(call: _Call) -> bool:
    greatest = argument(call.node, 2, "max")
    return _lower_clamp(call) and (greatest is None or _is_proved(greatest))


def _lower_clamp(call: _Call) -> bool:
    return _is_proved(argument(call.node, 1, "min"))


def _maximum(call: _Call) -> bool:
    """Of two values; torch.max has other forms."""
    return len(call.node.args) == 2 and any(
        isinstance(each, Node) and _is_proved(each) for each in call.node.args
    )


def _concatenation(call: _Call) -> bool:
    parts = argument(call.node, 0, "tensors")
    return isinstance(parts, tuple | list) and all(map(_is_proved, parts))


def _max_pool(call: _Call) -> bool:
    dilation = call.option(4, "dilation", 1)
    flat = dilation if isinstance(dilation, tuple | list) else (dilation,)
    return all(each == 1 for each in flat) and call.input


def _average_pool(call: _Call) -> bool:
    divisor = call.option(6, "divisor_override")
    return (divisor is None or _is_positive(divisor)) and call.input


def _interpolation(call: _Call) -> bool:
    return call.option(3, "mode", "nearest") in _MODES and call.input


def _softplus(call: _Call) -> bool:
    return (call.option(1, "beta", 1), call.option(2, "threshold", 20)) == (1, 20)


def _recurrence(call: _Call) -> bool:
    return bool(call.option(0, "nonlinearity") == "relu")


def _padded_sequence(call: _Call) -> bool:
    return _is_proved(argument(call.node, 2, "padding_value", 0.0)) and call.input


def _rule(rule: Callable[[_Call], bool], *targets: Any) -> dict[Any, Callable[[_Call], bool]]:
    return dict.fromkeys(targets, rule)


_RULES = {
    **_rule(_always, *_NEVER_NEGATIVE),
    **_rule(_if_input, *_KEEPS),
    **_rule(_if_all, operator.add, operator.iadd, torch.add, "add", "add_", torch.minimum),
    **_rule(_product, operator.mul, operator.imul, torch.mul, "mul", "mul_"),
    **_rule(_quotient, operator.truediv, operator.itruediv, torch.div, "div", "div_"),
    **_rule(_power, operator.pow, torch.pow, "pow"),
    **_rule(_clamp, torch.clamp, torch.clip, "clamp", "clamp_", "clip", "clip_"),
    **_rule(_lower_clamp, torch.clamp_min, "clamp_min", "clamp_min_"),
    **_rule(_maximum, torch.maximum, torch.max),
    **_rule(_concatenation, torch.cat, torch.concat, torch.stack),
    **_rule(_max_pool, *MAX_POOLS, *MAX_POOL_CALLS),
    **_rule(_average_pool, nn.AvgPool2d, nn.AvgPool3d, F.avg_pool2d, F.avg_pool3d),
    **_rule(_interpolation, nn.Upsample, F.interpolate),
    **_rule(_softplus, nn.Softplus, F.softplus),
    **_rule(_recurrence, nn.RNN, nn.RNNCell),
    **_rule(_padded_sequence, rnn.pad_packed_sequence),
}
