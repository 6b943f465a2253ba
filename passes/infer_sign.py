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
   with itself is non-negative, and so is a maximum of which one operand is.
4. An RNN of ReLUs gives values and hidden states that are never negative; packing and padding
   with 0 or more keep what their input is.
5. A concatenation or stack is if all its parts are.
6. If an in-place operation may later change a value, directly or through a view, the value is
   proved only if the result of that operation is proved too.
7. Of a module with hooks, or with a forward of its own, nothing is known.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping
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
# Of two values: nonnegative if both are.
_JOINS: set[Any] = {
    *(operator.add, operator.iadd, operator.mul, operator.imul),
    *(torch.add, torch.mul, torch.minimum, "add", "add_", "mul", "mul_"),
}
_QUOTIENTS: set[Any] = {operator.truediv, operator.itruediv, torch.div, "div", "div_"}
_CLAMPS: set[Any] = {torch.clamp, torch.clip, "clamp", "clamp_", "clip", "clip_"}
_MAX_POOLS: set[Any] = {*MAX_POOLS, *MAX_POOL_CALLS}
_AVERAGE_POOLS: set[Any] = {nn.AvgPool2d, nn.AvgPool3d, F.avg_pool2d, F.avg_pool3d}
_MODES = ("nearest", "nearest-exact", "linear", "bilinear", "trilinear", "area")
_PRODUCTS: set[Any] = {operator.mul, torch.mul, "mul"}


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
    if not isinstance(target, Hashable):
        return False
    source = argument(node, 0, "input")
    module = modules[str(node.target)] if node.op == "call_module" else None

    def option(place: int, name: str, default: Any = None) -> Any:
        """An argument of a function, or the attribute of a module that stands for it."""
        return getattr(module, name) if module else argument(node, place, name, default)

    if target in _NEVER_NEGATIVE:
        return True
    if target in (nn.RNN, nn.RNNCell):
        return bool(option(0, "nonlinearity") == "relu")
    if target is rnn.pad_packed_sequence:
        return _proved(argument(node, 2, "padding_value", 0.0)) and _proved(source)
    if target in (nn.Softplus, F.softplus):
        return (option(1, "beta", 1), option(2, "threshold", 20)) == (1, 20)
    if target in (nn.Upsample, F.interpolate):
        return option(3, "mode", "nearest") in _MODES and _proved(source)
    if target in _MAX_POOLS:
        dilation = option(4, "dilation", 1)
        flat = dilation if isinstance(dilation, tuple | list) else (dilation,)
        return all(each == 1 for each in flat) and _proved(source)
    if target in _AVERAGE_POOLS:
        divisor = option(6, "divisor_override")
        return (divisor is None or _positive(divisor)) and _proved(source)
    if target in _CLAMPS:
        greatest = argument(node, 2, "max")
        return _proved(argument(node, 1, "min")) and (greatest is None or _proved(greatest))
    if target in (torch.clamp_min, "clamp_min", "clamp_min_"):
        return _proved(argument(node, 1, "min"))
    if target in (torch.maximum, torch.max) and len(node.args) == 2:
        return any(isinstance(each, Node) and _proved(each) for each in node.args)
    if target in (operator.pow, torch.pow, "pow"):
        power = argument(node, 1, "exponent")
        even = isinstance(power, int) and power % 2 == 0
        return even or (not isinstance(power, Node) and _proved(power) and _proved(source))
    if target in (torch.cat, torch.concat, torch.stack):
        parts = argument(node, 0, "tensors")
        return isinstance(parts, tuple | list) and all(_proved(part) for part in parts)
    if target in _PRODUCTS and len(node.args) == 2 and node.args[0] is node.args[1]:
        return True
    if target in _QUOTIENTS:
        divisor = argument(node, 1, "other")
        return _positive(divisor) and _proved(source)
    if target in _JOINS:
        operands = (*node.args, *node.kwargs.values())
        return all(_proved(each) for each in operands)
    return target in _KEEPS and _proved(source)


def _positive(value: Any) -> bool:
    return _proved(value) and not isinstance(value, Node) and value > 0


def _proved(value: Any) -> bool:
    """Whether an argument is a number of 0 or more, or a node that is proved."""
    if isinstance(value, Node):
        return facts(value).nonnegative
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
