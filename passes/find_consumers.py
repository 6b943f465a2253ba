"""Analysis: which layers read an intermediate value whose channels can be reduced, and where.

A conv reads a value directly, with the channels on axis 1. A recurrent layer reads it directly,
with the channels on the last axis (of packed sequences: of their data). A linear layer reads it
directly, with the channels on the last axis, or through a flatten and dropouts::

    value -> conv                        ChannelRead(value, dim=1, in_channels=C)
    value -> conv in G groups            ChannelRead(value, dim=1, in_channels=C/G, groups=G)
    value -> gru                         ChannelRead(value, dim=-1, in_channels=C)
    value -> linear                      ChannelRead(value, dim=-1, in_channels=C)
    value -> flatten -> dropout -> linear
        ChannelRead(value, dim=1, in_channels=C, features_per_channel=H*W, path=(flatten, dropout))

Every other conv, linear, recurrent or attention layer gets a
:class:`~lean_fx.skip_reason.SkipReason`. A layer is skipped if

1. it cannot be rebuilt: its type is an unregistered subclass that is not linear in its channels
   (:mod:`lean_fx.layers.subclasses`), or its weight has a parametrization other than torch's
   weight norm or spectral norm;
2. another module or node reads one of its parameters, or memory of it; the weight is frozen, not
   floating-point, or of a subclass of torch's parameters; or the layer is called more than once
   and reads through a flatten, along different axes, or one of its calls is skipped;
3. it has hooks other than those by which torch gives a weight a norm: a rebuilt layer would lose
   them;
4. it is a depthwise convolution, with one input channel in each group;
5. it is attention: :class:`SplitLayers` splits that into its linear layers first;
6. it reads a reduction already, or a value that is not in the graph;
7. it reads through a flatten, and the channels before the flatten are unknown, or an operation
   other than dropout stands between, or an in-place operation changes the value between. A flatten
   of a value with one position counts as nothing. An in-place dropout may stand between if no
   other node reads what it changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.utils import parametrize

from lean_fx.graph import split_attention
from lean_fx.graph.calls import argument, has_hooks, source_of
from lean_fx.graph.context import GraphContext, attribute_of
from lean_fx.graph.facts import ChannelRead, Facts, facts
from lean_fx.graph.flattens import is_flatten
from lean_fx.graph.ops import is_dropout
from lean_fx.graph.products import LAYER_CALLS, find_weight, why_computed
from lean_fx.layers.kinds import (
    LayerKind,
    channel_axis,
    groups_of,
    input_channels,
    input_weights,
    kind_of,
)
from lean_fx.layers.known_layers import is_quantized_layer
from lean_fx.layers.legacy_norms import as_parametrization
from lean_fx.layers.rebuild import why_not_rebuilt
from lean_fx.layers.transformers import UNFUSED
from lean_fx.passes.base import Pass
from lean_fx.passes.modularize_calls import readers
from lean_fx.passes.modularize_weights import behind_transpose, weights_of_products
from lean_fx.reduction.packed import with_data
from lean_fx.reduction.registry import is_reduction
from lean_fx.skip_reason import SkipReason

NO_PART_REDUCED = SkipReason("parts_not_reduced", "none of its layers is reduced")
NO_GRAPH_VALUE = SkipReason("no_graph_value", "its input is not a value of the graph")
ALREADY_REDUCED = SkipReason("already_reduced", "it reads a reduction already")

_CONVOLUTIONS = LAYER_CALLS - {F.linear}
_STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_post_hooks")


class FindConsumers(Pass):
    """Write ``facts(node).read`` or ``facts(node).skip_reason`` for every call of a layer.

    ``TrackChannels`` and ``TrackWrites`` come before it.
    """

    def run(self, graph_module: GraphModule) -> bool:
        """Go through the graph once, then through the layers that are called more than once."""
        graph = GraphContext.of(graph_module)
        several: dict[int, list[Facts]] = {}
        products = weights_of_products(graph_module)
        weights = {product.node: name for name, product in products.items()}
        for node in graph_module.graph.nodes:
            known = facts(node)
            known.read, known.skip_reason, known.splits = None, None, False
            known.weight = weights.get(node, "")
            if node.op != "call_module":
                if not known.weight:
                    known.weight, known.skip_reason = _check_product(node, graph)
                continue
            layer = graph.modules[str(node.target)]
            known.skip_reason = skip_reason_of(layer, graph.owners)
            if known.skip_reason:
                continue
            kind, count = kind_of(layer), graph.calls[id(layer)]
            if kind is not None:
                known.read, known.skip_reason = _channels_read(node, layer, kind, graph)
                if count > 1:
                    several.setdefault(id(layer), []).append(known)
            elif split_attention.can_split(layer):
                known.splits = count == 1
                known.skip_reason = NO_PART_REDUCED if count == 1 else called_repeatedly(count)
        for calls in several.values():
            _refuse_unlike_calls(calls)
        return False


def _check_product(node: Node, graph: GraphContext) -> tuple[str, SkipReason | None]:
    """The parameter that a call multiplies a value with, and why it does not become a layer."""
    found = find_weight(node, graph.source_parameters)
    if found is None:
        return "", _why_no_product(node, graph) if node.target in LAYER_CALLS else None
    weight, _ = behind_transpose(found)
    name, *more = graph.source_parameters[weight]
    if weight.op == "get_attr":
        return name, _why_no_layer(node, found, weight, graph)
    return name, why_computed(more)


def _why_no_product(node: Node, graph: GraphContext) -> SkipReason:
    """Why a call like a layer's does not multiply a value with a parameter."""
    learned = graph.source_parameters.get(argument(node, 1, "weight"))
    if learned:
        return NO_GRAPH_VALUE
    return SkipReason("weight_computed", "its weight is not a parameter")


def _why_no_layer(node: Node, found: Node, weight: Node, graph: GraphContext) -> SkipReason:
    """Why the parameter that a call multiplies a value with does not become a layer."""
    name = str(weight.target)
    parameter = attribute_of(graph.modules[""], name)
    if node.target not in _CONVOLUTIONS and parameter.dim() != 2:
        text = f"its shape {list(parameter.shape)} is not that of a linear layer's weight"
        return SkipReason("unsupported_product", text)
    ours = (name, f"read by {weight.name}")
    elsewhere = [each for each in graph.owners[id(parameter)] if each not in ours]
    elsewhere += [
        f"read by {each.name}"
        for each in dict.fromkeys((*readers(weight), *found.users))
        if each not in (node, found)
    ]
    if elsewhere:
        return _shared(elsewhere)
    if any(each.op == "get_attr" for each in node.all_input_nodes if each is not weight):
        return NO_GRAPH_VALUE
    owner = name.rpartition(".")[0]
    if kind_of(graph.modules[owner]):
        text = f"it is the weight of {owner}, which forward applies otherwise"
        return SkipReason("weight_read_in_forward", text)
    text = "only in x @ weight, F.linear and F.conv with fixed settings does it become a layer"
    return SkipReason("unsupported_product", text)


def _refuse_unlike_calls(calls: list[Facts]) -> None:
    """Refuse the calls of one layer that cannot share a reduction inside it (rule 2)."""
    reasons = [str(known.skip_reason) for known in calls if not known.read]
    reads = [known.read for known in calls if known.read]
    if len({read.dim for read in reads}) > 1 or any(read.path for read in reads):
        reasons.append("on unlike values")
    if reasons:
        for known in calls:
            known.read = None
            known.skip_reason = called_repeatedly(len(calls), reasons[0])


def skip_reason_of(layer: nn.Module, owners: Mapping[int, list[str]]) -> SkipReason | None:
    """Why a layer is refused, whatever it reads (rules 1 to 4), or None.

    Args:
        layer: any module.
        owners: the names of each parameter, by its id.
    """
    attention = isinstance(layer, nn.MultiheadAttention)
    if not attention and kind_of(layer) is None:
        return _why_no_kind(layer)
    if is_reduction(getattr(layer, "reduction", None)):
        return ALREADY_REDUCED
    layer = as_parametrization(layer)
    if has_hooks(layer) or _has_state_hooks(layer):
        return SkipReason("hooks", "it has hooks, which a rebuilt layer would lose")
    if "forward" in vars(layer):
        text = "its forward is replaced on the instance, which a rebuilt layer would lose"
        return SkipReason("own_forward", text)
    reason = _why_keep_parameters(layer, owners)
    if reason:
        return reason
    if attention:
        if split_attention.can_split(layer):
            return None
        return SkipReason("unsupported_layer", "its out_proj is not torch's own")
    reason = why_not_rebuilt(layer)
    if not reason and 1 < groups_of(layer) == input_channels(layer):
        text = f"groups={groups_of(layer)}: one input channel a group, nothing to reduce"
        return SkipReason("nothing_to_reduce", text)
    return reason


def _why_no_kind(layer: nn.Module) -> SkipReason | None:
    """Why a module of no kind is left alone, if a user would take it for a layer; else None."""
    if is_quantized_layer(layer):
        text = "its weights are quantised; reduce the float model, then quantise that"
        return SkipReason("quantized", text)
    if type(layer) in UNFUSED:  # capture has looked into all others
        return SkipReason("own_forward", "it has hooks or a forward of its own, so it stays whole")
    if isinstance(layer, nn.Bilinear):
        return SkipReason("unsupported_layer", "bilinear layers read two values")
    return None


def _why_keep_parameters(layer: nn.Module, owners: Mapping[int, list[str]]) -> SkipReason | None:
    """Why new parameters cannot take the place of a layer's (rule 2), or None."""
    for parameter in layer.parameters():
        names = owners[id(parameter)]
        if len(names) > 1:
            return _shared(names)
        if parameter._backward_hooks:
            return SkipReason("hooks", "its parameter has hooks, which a rebuilt layer would lose")
    weights = input_weights(layer).values()
    for weight in weights:
        if type(weight) is not nn.Parameter:
            text = f"its weight is a {type(weight).__name__}, which a rebuilt layer would lose"
            return SkipReason("weight_type", text)
        if not weight.is_floating_point():
            text = f"its weight is {weight.dtype}, which is not floating-point"
            return SkipReason("weight_type", text)
    if not all(weight.requires_grad for weight in weights):
        return SkipReason("frozen", "its weight is frozen, so a new one could not learn")
    return None


def called_repeatedly(count: int, why: str = "") -> SkipReason:
    """The reason for a layer whose calls cannot share a reduction inside it."""
    text = f"called {count} times in one forward pass"
    return SkipReason("repeated_call", f"{text}: {why}" if why else text)


def _shared(names: Sequence[str]) -> SkipReason:
    return SkipReason("shared_parameter", f"its parameter is used elsewhere: {', '.join(names)}")


def _has_state_hooks(layer: nn.Module) -> bool:
    """Whether hooks run when the layer's state is saved or loaded, but for torch's own norms'."""
    loads = layer._load_state_dict_pre_hooks and not parametrize.is_parametrized(layer)
    return bool(loads) or any(getattr(layer, hooks) for hooks in _STATE_HOOKS)


def _channels_read(
    node: Node, layer: nn.Module, kind: LayerKind, graph: GraphContext
) -> tuple[ChannelRead | None, SkipReason | None]:
    """What a layer that can be rebuilt reads, or why that cannot be reduced."""
    source = source_of(node)
    if source is None:
        return None, NO_GRAPH_VALUE
    path, before = path_back(source, graph.modules)
    if reads_reduction(before, graph.modules):
        return None, ALREADY_REDUCED
    known = facts(source).channels
    width, groups = kind.in_channels(layer), kind.groups(layer)
    dim = channel_axis(layer, facts(source).shape)
    if kind.recurrent or dim != -1:
        packed = kind.recurrent and known is not None and known.packed
        read = ChannelRead(source.name, dim, width // groups, packed=packed, groups=groups)
        return graph.with_position(read, source, node), None
    through = known is not None and known.unflattened_at is not None
    flattens = any(is_flatten(step, graph.modules) for step in path)
    if flattens and not through and not _one_position(before):
        text = "the channels of what is flattened before it are unknown"
        return None, SkipReason("unknown_channels", text)
    if not through or known is None or width % known.count:
        return graph.with_position(ChannelRead(source.name, -1, width), source, node), None
    if before.name != known.unflattened_at:
        text = f"{before.name} stands between the flatten and it; put it before"
        return None, SkipReason("not_adjacent", text)
    read = ChannelRead(
        value=before.name,
        dim=known.axis,
        in_channels=known.count,
        features_per_channel=width // known.count,
        path=tuple(step.name for step in path),
    )
    moving = {step for step in path if graph.moves_with_path(step, path, node)}
    between = graph.writes_before(before, node) - graph.writes_before(before, path[0])
    if between > len(moving):
        text = "an in-place operation stands between the flatten and it"
        return None, SkipReason("written_in_place", text)
    return graph.with_position(read, before, path[0] if path else node), None


def _one_position(value: Node) -> bool:
    """Whether a value is known to have one element a channel: a flatten changes nothing there."""
    shape = facts(value).shape
    return shape is not None and math.prod(shape[2:]) == 1


def path_back(source: Node, modules: Mapping[str, nn.Module]) -> tuple[list[Node], Node]:
    """The flatten and dropouts that end in ``source``, in order, and what they start from."""
    path: list[Node] = []
    step = source
    while is_dropout(step, modules) or is_flatten(step, modules):
        path.insert(0, step)
        step = step.all_input_nodes[0]
    while path and not is_flatten(path[0], modules):  # dropout before the flatten stays there
        step = path.pop(0)
    return path, step


def reads_reduction(source: Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether ``source`` is the call of a reduction, or holds its result packed or by groups."""
    held: Any = source
    if source.target is with_data:
        held = source.args[1]
    elif source.target is torch.flatten:
        held = argument(source, 0, "input")
    return held.op == "call_module" and is_reduction(modules[str(held.target)])
