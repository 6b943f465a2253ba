"""Analysis: which layers read an intermediate value whose channels can be reduced, and where.

A conv reads its value directly, channels on axis 1; a linear layer reads it directly, channels on
the last axis, or through a flatten and dropouts::

    value -> conv                        Read(value, dim=1, in_channels=C)
    value -> linear                      Read(value, dim=-1, in_channels=C)
    value -> flatten -> dropout -> linear
                                         Read(value, dim=1, in_channels=C, spread=H*W,
                                              path=(flatten, dropout))

Every other layer with weights gets its refusal. A layer is refused when

1. its type is not exactly one that can be rebuilt (a subclass may override forward);
2. it is called more than once, or shares a parameter with another layer;
3. it has hooks or parametrizations, which would be lost;
4. it is a grouped (or depthwise) convolution, whose channels are split already;
5. it reads a reduction already;
6. something other than dropout stands between a flatten and the layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.utils.parametrize import is_parametrized

from lean_fx.passes.base import Pass, facts
from lean_fx.passes.track_channels import Channels, is_dropout, is_flatten
from lean_fx.rebuild import REBUILDERS, input_channels
from lean_fx.registry import is_reduction

_NOT_YET = {
    nn.RNN: "recurrent layers are not reduced yet",
    nn.LSTM: "recurrent layers are not reduced yet",
    nn.GRU: "recurrent layers are not reduced yet",
    nn.RNNCell: "recurrent layers are not reduced yet",
    nn.LSTMCell: "recurrent layers are not reduced yet",
    nn.GRUCell: "recurrent layers are not reduced yet",
    nn.MultiheadAttention: "layers inside attention are not reduced yet",
    nn.TransformerEncoderLayer: "layers inside attention are not reduced yet",
    nn.TransformerDecoderLayer: "layers inside attention are not reduced yet",
    nn.Transformer: "layers inside attention are not reduced yet",
    nn.TransformerEncoder: "layers inside attention are not reduced yet",
    nn.TransformerDecoder: "layers inside attention are not reduced yet",
    nn.Bilinear: "bilinear layers read two values",
}
_CALLS = {F.linear, F.conv1d, F.conv2d, F.conv3d}
_CALLS |= {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
_CALLS |= {torch.conv1d, torch.conv2d, torch.conv3d}
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Read:
    """What a layer reads, if that can be reduced.

    Attributes:
        value: the node whose channels are whole.
        dim: the axis of the channels there.
        in_channels: how many channels.
        spread: the features that the layer reads of each channel: 1, or H*W behind a flatten.
        path: the nodes between the value and the layer, in order.
        intermediate: whether a layer with weights stands between the model's inputs and the value.
    """

    value: str
    dim: int
    in_channels: int
    spread: int = 1
    path: tuple[str, ...] = ()
    intermediate: bool = True


class FindConsumers(Pass):
    """Write ``facts(node).read`` or ``facts(node).refusal`` for every call of a layer."""

    def run(self, graph_module: GraphModule) -> bool:
        """Judge every layer that is called."""
        modules = dict(graph_module.named_modules())
        learned = _learned(graph_module, modules)
        calls = Counter(
            id(modules[str(node.target)])
            for node in graph_module.graph.nodes
            if node.op == "call_module"
        )
        owners = _owners(graph_module)
        for node in graph_module.graph.nodes:
            known = facts(node)
            known.read, known.refusal = None, ""
            if node.op == "call_function" and node.target in _CALLS:
                known.refusal = "a functional call; only layers (modules) are rebuilt yet"
            elif node.op == "call_module":
                layer = modules[str(node.target)]
                known.refusal = _refusal(layer, calls[id(layer)], owners)
                if not known.refusal and type(layer) in REBUILDERS:
                    _judge(node, layer, modules, learned)
        return False


def _refusal(layer: nn.Module, calls: int, owners: Mapping[int, list[str]]) -> str:
    kind = next((base for base in REBUILDERS if isinstance(layer, base)), None)
    if kind is None:
        return next((why for base, why in _NOT_YET.items() if isinstance(layer, base)), "")
    if is_parametrized(layer):
        return "its weight is parametrized"
    if type(layer) is not kind:
        return f"{type(layer).__name__} is a subclass of {kind.__name__} and may mean more"
    if calls > 1:
        return f"called {calls} times in one forward pass"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return "it has hooks, which a rebuilt layer would lose"
    for parameter in layer.parameters(recurse=False):
        names = owners[id(parameter)]
        if len(names) > 1:
            return f"shares a parameter: {' = '.join(names)}"
    groups = int(getattr(layer, "groups", 1))
    if groups > 1:
        return f"groups={groups}: its input channels are split already"
    return ""


def _judge(
    node: Node, layer: nn.Module, modules: Mapping[str, nn.Module], learned: set[Node]
) -> None:
    source = layer_input(node)
    if source is None:
        facts(node).refusal = "its input is not a value of the graph"
        return
    if reads_reduction(source, modules):
        facts(node).refusal = "it reads a reduction already"
        return
    known = facts(source).channels
    flattened = isinstance(layer, nn.Linear) and known is not None and known.whole is not None
    if known is not None and flattened and input_channels(layer) % known.count == 0:
        _read_through(node, layer, source, known, modules, learned)
        return
    dim = -1 if isinstance(layer, nn.Linear) else known.axis if known and known.axis == 0 else 1
    facts(node).read = Read(source.name, dim, input_channels(layer), intermediate=source in learned)


def _read_through(
    node: Node,
    layer: nn.Module,
    source: Node,
    channels: Channels,
    modules: Mapping[str, nn.Module],
    learned: set[Node],
) -> None:
    path: list[Node] = []
    step = source
    while step.name != channels.whole:
        if not (is_flatten(step, dict(modules)) or is_dropout(step, dict(modules))):
            facts(
                node
            ).refusal = (
                f"{step.name} stands between the flatten and the layer; put it before the flatten"
            )
            return
        path.insert(0, step)
        step = step.all_input_nodes[0]
    if reads_reduction(step, modules):
        facts(node).refusal = "it reads a reduction already"
        return
    facts(node).read = Read(
        value=step.name,
        dim=channels.axis,
        in_channels=channels.count,
        spread=input_channels(layer) // channels.count,
        path=tuple(each.name for each in path),
        intermediate=step in learned,
    )


def layer_input(node: Node) -> Node | None:
    """The value that a layer's call reads, or None if it is not a node."""
    source = node.args[0] if node.args else node.kwargs.get("input")
    return source if isinstance(source, Node) else None


def reads_reduction(source: Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether ``source`` is the call of a reduction."""
    return source.op == "call_module" and is_reduction(modules[str(source.target)])


def _learned(graph_module: GraphModule, modules: Mapping[str, nn.Module]) -> set[Node]:
    """The nodes behind some weights; normalising the inputs alone does not count."""
    learned: set[Node] = set()
    for node in graph_module.graph.nodes:
        own = node.op == "get_attr"
        if node.op == "call_module":
            module = modules[str(node.target)]
            own = not isinstance(module, _NORMS) and next(module.parameters(), None) is not None
        if own or any(source in learned for source in node.all_input_nodes):
            learned.add(node)
    return learned


def _owners(graph_module: GraphModule) -> dict[int, list[str]]:
    """The names of every parameter, those it is shared under included."""
    owners: dict[int, list[str]] = {}
    for name, parameter in graph_module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners
