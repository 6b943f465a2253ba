"""The planner's input: one record for each call of a layer.

Records come from a graph (:func:`graph_records`) or from one observed run of a model that cannot
be traced (:mod:`lean_fx.planning.observed`). The planner treats both alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule, Node

from lean_fx.graph.calls import modules_by_name
from lean_fx.graph.facts import ChannelRead, Facts, facts
from lean_fx.layers.kinds import base_type, input_weights
from lean_fx.planning.options import Options, named_by_user, unwanted
from lean_fx.skip_reason import LeftAlone, SkipReason


@dataclass(frozen=True)
class Record:
    """One call of a layer, with what it reads or why it is left alone.

    Attributes:
        layer: the qualified name of the layer, or of a parameter that multiplies a value.
        kind: the type of the layer, such as ``"Conv2d"``, or the name of the function.
        read: the channels that it reads; None if they cannot be reduced.
        reason: why the layer is left alone; None if it may be reduced.
        node: the node of the call; empty if the layer reduces its own input.
        weights: the number of weights that multiply the input.
        rms: the root mean square of the input.
        nonnegative: whether the input is proved to have no element below 0.
        applied_by: as in :class:`~lean_fx.graph.sites.Consumer`.
        note: for the user.
    """

    layer: str
    kind: str
    read: ChannelRead | None = None
    reason: SkipReason | None = None
    node: str = ""
    weights: int = 0
    rms: float = 1.0
    nonnegative: bool = False
    applied_by: str | None = None
    note: str = ""


def graph_records(graph_module: GraphModule, options: Options) -> list[Record]:
    """The records of an analysed graph, in the order of its calls."""
    modules = modules_by_name(graph_module)
    nodes = {node.name: node for node in graph_module.graph.nodes}
    records = []
    for node in nodes.values():
        known = facts(node)
        if known.skip_reason and node.op != "call_module":
            kind = getattr(node.target, "__name__", str(node.target))
            records.append(Record(known.weight or node.name, kind, reason=known.skip_reason))
        elif known.skip_reason or known.read:
            layer = modules[str(node.target)]
            records.append(_layer_record(node, layer, known, nodes, options))
    return records


def unread_records(left: Iterable[LeftAlone]) -> list[Record]:
    """Records of layers that are left alone whatever they read."""
    return [Record(each.layer, each.kind, reason=each.reason) for each in left]


def _layer_record(
    node: Node, layer: nn.Module, known: Facts, nodes: dict[str, Node], options: Options
) -> Record:
    name = str(node.target)
    if known.read is None:
        wish = named_by_user(name, layer, options) if known.splits else None
        return Record(name, type(layer).__name__, reason=wish or known.skip_reason)
    reason = unwanted(known.read, name, layer, options)
    if reason:
        return Record(name, type(layer).__name__, reason=reason)
    value = facts(nodes[known.read.value])
    return Record(
        name,
        base_type(layer).__name__,
        known.read,
        node=node.name,
        weights=sum(weight.numel() for weight in input_weights(layer).values()),
        rms=value.rms or 1.0,
        nonnegative=value.nonnegative,
    )
