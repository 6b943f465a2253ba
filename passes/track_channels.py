"""Analysis: along which axis the channels of a value lie, and how many they are.

No example inputs are needed: layers say how many channels they give, and the rules below carry
that through what follows. The fact that matters most is what stands before a flatten::

    conv -> relu -> pool -> flatten -> dropout -> linear
            (1, C)  (1, C)  (1, C) flattened ... flattened

so that a reduction can be put where the C channels are still whole, and the linear layer shrinks
from C*H*W to C'*H*W features.

Rules:

1. Conv and ConvTranspose give ``out_channels`` on axis 1; Linear gives ``out_features`` on axis -1;
   a layer of a registered type gives what its kind says (:mod:`lean_fx.layers.kinds`); an
   input of the model that is known to have four axes or more has its channels on axis 1 (one of
   three may be a sequence, whose channels are last, or a picture without a batch).
2. Elementwise layers and dropout keep what their input has; batch, instance, group and layer norms
   too. Pooling does if the channels are on axis 1 (or 0, without a batch), not where it pools.
3. Arithmetic on values (sums, differences, products, quotients), and a ``ByMode`` that chooses
   between two values, have the channels on which all operands with known channels agree.
4. ``cat`` along the channel axis adds up.
5. A permutation or transposition moves the axis.
6. Flattening all axes but the first (``nn.Flatten``, ``flatten(x, 1)``,
   ``x.view(x.size(0), -1)``, or what known shapes show to be the same) marks the value as
   flattened and remembers where it was whole; elementwise layers and dropout keep that mark.
7. What recurrent layers return has its channels on the last axis: the values of all time steps,
   and the hidden states. Packed sequences have theirs on the last axis of their ``data``; packing,
   padding and recurrent layers keep them. ``SequenceDropout`` does too.
8. Where the shape is known and contradicts the rules, nothing is said.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.utils import rnn

from lean_fx.graph.calls import argument, modules_by_name, source_of
from lean_fx.graph.facts import Channels, facts
from lean_fx.graph.flattens import is_flatten
from lean_fx.graph.ops import (
    ADAPTIVE_POOL_CALLS,
    ADAPTIVE_POOLS,
    ALPHA_DROPOUTS,
    AVERAGE_POOL_CALLS,
    AVERAGE_POOLS,
    DROPOUT_CALLS,
    DROPOUTS,
    MAX_POOL_CALLS,
    MAX_POOLS,
)
from lean_fx.layers.kinds import channel_axis, kind_of
from lean_fx.layers.modes import ByMode
from lean_fx.passes.base import Pass
from lean_fx.reduction.packed import SequenceDropout

_ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU),
    *(nn.Mish, nn.Softplus, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Hardtanh, nn.Hardsigmoid),
    *(nn.Hardswish, nn.Softsign, nn.Identity, nn.Softmax, *DROPOUTS, *ALPHA_DROPOUTS),
)
_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm),
)
# These act along the axes behind the channels, so they keep axis 1 but none behind it.
_SPATIAL = (
    *(*MAX_POOLS, *AVERAGE_POOLS, *ADAPTIVE_POOLS),
    *(nn.LPPool1d, nn.LPPool2d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    *(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
)
_ELEMENTWISE_CALLS: set[Any] = {
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus),
    *(F.hardtanh, F.hardsigmoid, F.hardswish, F.sigmoid, F.tanh, F.softsign, F.logsigmoid),
    *(torch.relu, torch.sigmoid, torch.tanh, torch.abs, torch.clamp, torch.square, torch.sqrt),
    *(*DROPOUT_CALLS, F.alpha_dropout, F.softmax, torch.softmax),
    *(torch.exp, torch.pow, operator.pow, operator.neg),
    *(F.batch_norm, F.instance_norm, F.group_norm, F.layer_norm, F.rms_norm, torch.batch_norm),
    *("pow", "exp", "softmax", "to", "half", "type"),
    *("relu", "relu_", "sigmoid", "tanh", "abs", "clamp", "square", "sqrt"),
    *("contiguous", "clone", "detach", "float"),
}
_SPATIAL_CALLS: set[Any] = {
    *(*MAX_POOL_CALLS, *AVERAGE_POOL_CALLS, *ADAPTIVE_POOL_CALLS, F.interpolate),
}
_JOINS: set[Any] = {
    *(operator.add, operator.iadd, operator.mul, operator.imul, operator.sub, operator.truediv),
    *(torch.add, torch.mul, torch.sub, torch.div, "add", "sub", "mul", "div", "add_", "mul_"),
}


class TrackChannels(Pass):
    """Write ``facts(node).channels`` where the rules in the module docstring know it."""

    def run(self, graph_module: GraphModule) -> bool:
        """Go through the graph once, from the inputs on."""
        modules = modules_by_name(graph_module)
        for node in graph_module.graph.nodes:
            found = _channels_of(node, modules)
            facts(node).channels = found if _agrees(found, facts(node).shape) else None
        return False


def _channels_of(node: Node, modules: Mapping[str, nn.Module]) -> Channels | None:
    shape = facts(node).shape
    if facts(node).packed and shape is not None:
        return Channels(-1, shape[-1], packed=True)
    if node.op == "placeholder":
        return Channels(1, shape[1]) if shape is not None and len(shape) > 3 else None
    if is_flatten(node, modules):
        return _flattened(node)
    if node.op == "call_module":
        return _of_module(node, modules[str(node.target)])
    if node.target is operator.getitem:
        return _of_item(node, modules)
    if node.op in ("call_function", "call_method"):
        return _of_call(node)
    return None


def _flattened(node: Node) -> Channels | None:
    source, before = source_of(node), _input(node)
    if before is None or source is None or before.unflattened_at:
        return before
    if before.axis == 0:  # no batch: flattening leaves this axis alone
        return None
    return replace(before, unflattened_at=source.name)


def _of_module(node: Node, module: nn.Module) -> Channels | None:
    kind = kind_of(module)
    if kind and kind.out_channels:
        axis = channel_axis(module, facts(node).shape)
        return Channels(axis, kind.out_channels(module)) if axis >= -1 else None
    if isinstance(module, nn.Embedding):
        return Channels(-1, module.embedding_dim)
    if isinstance(module, (*_ELEMENTWISE, *_NORMS, SequenceDropout)):
        return _input(node)
    if isinstance(module, _SPATIAL):
        return _before_positions(_input(node))
    if type(module) is nn.Flatten:
        return _in_front_of(_input(node), module.start_dim)
    if type(module) is ByMode:
        return _agreed(node)
    return None


def _of_item(node: Node, modules: Mapping[str, nn.Module]) -> Channels | None:
    """Of what a recurrent layer, or padding, returns in a tuple (rule 7)."""
    path: list[Any] = []
    source: Any = node
    while isinstance(source, Node) and source.target is operator.getitem:
        path.insert(0, source.args[1])
        source = source.args[0]
    if not isinstance(source, Node):
        return None
    if source.target is rnn.pad_packed_sequence and path == [0]:
        packed = _input(source)
        return Channels(-1, packed.count) if packed else None
    layer: Any = modules.get(str(source.target)) if source.op == "call_module" else None
    if isinstance(layer, nn.LSTMCell) and path in ([0], [1]):
        return Channels(-1, layer.hidden_size)
    if not isinstance(layer, nn.RNNBase):
        return None
    width = layer.proj_size or layer.hidden_size
    if path == [0]:
        read = _input(source)
        count = width * (2 if layer.bidirectional else 1)
        return Channels(-1, count, packed=bool(read and read.packed))
    if path == ([1, 0] if layer.mode == "LSTM" else [1]):
        return Channels(-1, width)
    return Channels(-1, layer.hidden_size) if path == [1, 1] and layer.mode == "LSTM" else None


def _of_call(node: Node) -> Channels | None:
    if node.target in _ELEMENTWISE_CALLS:
        return _input(node)
    if node.target in _SPATIAL_CALLS:
        return _before_positions(_input(node))
    if node.target in _JOINS:
        return _agreed(node)
    if node.target in (torch.cat, torch.concat):
        return _concatenated(node)
    if node.target in (torch.permute, "permute", torch.transpose, "transpose"):
        return _moved(node)
    if node.target is rnn.pack_padded_sequence:
        padded = _input(node)
        return Channels(-1, padded.count, packed=True) if padded else None
    if node.target in (torch.flatten, "flatten"):
        return _in_front_of(_input(node), argument(node, 1, "start_dim", 0))
    return None


def _agreed(node: Node) -> Channels | None:
    known = {facts(each).channels for each in node.all_input_nodes}
    known.discard(None)
    return known.pop() if len(known) == 1 else None


def _input(node: Node) -> Channels | None:
    source = source_of(node)
    return facts(source).channels if source else None


def _only_front(channels: Channels | None) -> Channels | None:
    return channels if channels and channels.axis >= 0 and not channels.unflattened_at else None


def _before_positions(channels: Channels | None) -> Channels | None:
    """What pooling leaves: channels before the axes along which it pools, the first of a sample."""
    kept = _only_front(channels)
    return kept if kept and kept.axis < 2 else None


def _in_front_of(channels: Channels | None, start: Any) -> Channels | None:
    """What a flatten of the axes from ``start`` on leaves: channels that lie before it."""
    kept = _only_front(channels)
    return kept if kept and isinstance(start, int) and kept.axis < start else None


def _concatenated(node: Node) -> Channels | None:
    listed, axis = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    if not isinstance(listed, tuple | list):
        return None
    parts = [facts(part).channels for part in listed if isinstance(part, Node)]
    known = [part for part in parts if part and part.axis == axis and not part.unflattened_at]
    if len(known) < len(listed):
        return None
    return Channels(known[0].axis, sum(part.count for part in known))


def _moved(node: Node) -> Channels | None:
    source, before = source_of(node), _input(node)
    if source is None or before is None or before.unflattened_at:
        return None
    permuting = node.target in (torch.permute, "permute")
    if permuting:
        order = node.args[1:] or (node.kwargs.get("dims"),)
        if len(order) == 1 and isinstance(order[0], tuple | list):
            order = tuple(order[0])
        rank = len(order)
    else:
        order = (argument(node, 1, "dim0"), argument(node, 2, "dim1"))
        shape = facts(source).shape
        rank = len(shape) if shape is not None else 0
    axes = [axis % rank for axis in order if isinstance(axis, int) and rank]
    if not axes or len(axes) < len(order):
        return None
    if not permuting:
        swapped = list(range(rank))
        swapped[axes[0]], swapped[axes[1]] = swapped[axes[1]], swapped[axes[0]]
        axes = swapped
    axis = axes.index(before.axis % rank)
    return replace(before, axis=-1 if axis == rank - 1 else axis)


def _agrees(channels: Channels | None, shape: tuple[int, ...] | None) -> bool:
    if channels is None or shape is None or channels.unflattened_at or channels.packed:
        return True
    return -len(shape) <= channels.axis < len(shape) and shape[channels.axis] == channels.count
