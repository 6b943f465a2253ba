"""Transformation: functional calls become calls of the modules whose work they do.

Tracing freezes ``self.training``: a graph captured in training mode would always drop out::

    dropout = torch.nn.functional.dropout(x, p = 0.5, training = True)      # before
    dropout = self.calls.dropout(x)                                         # after, nn.Dropout

If the model's code applies the weight of a layer instead of calling the layer, the graph calls it::

    linear = torch.nn.functional.linear(x, self.qkv.weight, bias)           # before
    qkv = self.qkv(x);  add = qkv + bias                                    # after

Rules:

1. It acts on calls whose ``training`` flag capture found to follow the mode of a module
   (``facts(node).mode_home``). ``F.dropout(x, training=True)``, which always drops out, stays.
2. It acts on F.dropout, dropout1d, dropout2d, dropout3d, alpha_dropout and feature_alpha_dropout.
3. The module starts in the mode that the call was captured in.
4. It acts on F.linear and F.conv1d, conv2d, conv3d with the weight of a layer. The layer is exactly
   an nn.Linear, or an nn.Conv1d, Conv2d, Conv3d of the same settings, without hooks. Forward calls
   neither it nor a module around it, and nothing else reads the weight.
5. A bias that is not the layer's is added behind the call (along the channel axis of a
   convolution). The layer's own, if it has one, becomes a parameter beside it, ``qkv_bias``.
6. ``F.multi_head_attention_forward`` is first written out as such calls
   (:mod:`lean_fx.graph.written_attention`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, Node

from lean_fx.graph.calls import (
    argument,
    bound_arguments,
    called_modules,
    is_altered,
    modules_by_name,
)
from lean_fx.graph.facts import facts
from lean_fx.graph.rewriting import add_module, numbered, replace_node
from lean_fx.graph.written_attention import write_out
from lean_fx.layers.kinds import LAYER_OF_CALL
from lean_fx.passes.base import Pass

_MODULES: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
#: Functions that it makes modules of.
FUNCTIONS = frozenset(_MODULES)
#: The arguments of a convolution behind its bias, and their defaults.
SETTINGS = (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))


class ModularizeCalls(Pass):
    """Give functional dropout that follows the mode a module; call layers that are written out."""

    def run(self, graph_module: GraphModule) -> bool:
        """Replace such calls one by one."""
        found = [node for node in graph_module.graph.nodes if can_follow_mode(node)]
        for node in found:
            arguments = _arguments(node)
            module = _MODULES[node.target](p=arguments["p"], inplace=arguments["inplace"])
            module.train(arguments["training"])
            home = facts(node).mode_home or ""
            target = add_module(graph_module, "calls", node.name, module, home)
            with graph_module.graph.inserting_before(node):
                call = graph_module.graph.call_module(target, (arguments["input"],))
            node.replace_all_uses_with(call)
            graph_module.graph.erase_node(node)
        split = write_out(graph_module)
        modules = modules_by_name(graph_module)
        called = {id(modules[name]) for name in called_modules(graph_module.graph)}
        written_out = [
            (node, layer)
            for node in graph_module.graph.nodes
            if (layer := _written_out(node, modules))
            and id(modules[layer]) not in called
            and not within_called(layer, graph_module.graph)
        ]
        for node, layer in written_out:
            _call_layer(graph_module, node, layer)
        return bool(found or split or written_out)


def can_follow_mode(node: Node) -> bool:
    """Whether a call that follows the mode is one that this pass can make a module of."""
    if facts(node).mode_home is None or node.target not in _MODULES:
        return False
    return not isinstance(_arguments(node)["p"], Node)


def flag_of(node: Node) -> Any:
    """What functional dropout is given as its mode."""
    return _arguments(node)["training"]


def _arguments(node: Node) -> dict[str, Any]:
    return bound_arguments(node, node.target)  # type: ignore[arg-type]


def _written_out(node: Node, modules: Mapping[str, nn.Module]) -> str:
    """The name of the layer whose forward a call writes out (rules 4 and 5), or ""."""
    weight = argument(node, 1, "weight")
    if node.target not in LAYER_OF_CALL or not isinstance(weight, Node) or weight.op != "get_attr":
        return ""
    name, _, attribute = str(weight.target).rpartition(".")
    layer = modules.get(name)
    if type(layer) is not LAYER_OF_CALL[node.target] or is_altered(layer) or attribute != "weight":
        return ""
    if not name or readers(weight) != [node] or not isinstance(argument(node, 0, "input"), Node):
        return ""
    if isinstance(layer, nn.Linear):
        return name
    rank = len(layer.kernel_size)  # type: ignore[arg-type]
    given = (argument(node, 3 + i, key, usual) for i, (key, usual) in enumerate(SETTINGS))
    same = all(
        _each(value, rank) == _each(getattr(layer, key), rank)
        for value, (key, _) in zip(given, SETTINGS, strict=True)
    )
    return name if same and layer.padding_mode == "zeros" else ""


def readers(weight: Node) -> list[Node]:
    """The nodes that read what a ``get_attr`` does."""
    same = [
        each for each in weight.graph.nodes if (each.op, each.target) == ("get_attr", weight.target)
    ]
    return [user for each in same for user in each.users]


def within_called(name: str, graph: Graph) -> bool:
    """Whether a layer, or a parameter, is of a module that is called whole: that reads it too."""
    return any(name.startswith(f"{each}.") for each in called_modules(graph))


def _each(value: Any, rank: int) -> Any:
    if isinstance(value, int):
        return (value,) * rank
    return value if isinstance(value, str) else tuple(value)


def _call_layer(graph_module: GraphModule, node: Node, name: str) -> None:
    graph, layer = node.graph, graph_module.get_submodule(name)
    source, weight, bias = (
        argument(node, i, key) for i, key in enumerate(("input", "weight", "bias"))
    )
    own = isinstance(bias, Node) and (bias.op, bias.target) == ("get_attr", f"{name}.bias")
    if layer.bias is not None and not own:
        _move_bias(graph_module, name, layer)
    with graph.inserting_before(node):
        call = graph.call_module(name, (source,))
        if not own and bias is not None:
            call = add_bias(call, bias, layer)
    replace_node(node, call, name)
    erase_unread([weight, bias])


def erase_unread(nodes: Iterable[Any]) -> None:
    """Erase those of ``nodes`` that nobody reads any more, but calls of modules and inputs."""
    for node in nodes:
        if (
            isinstance(node, Node)
            and not node.users
            and node.op not in ("call_module", "placeholder")
        ):
            node.graph.erase_node(node)


def add_bias(call: Node, bias: Any, layer: nn.Module) -> Node:
    """A node that adds a bias to the call of a linear layer or a convolution."""
    if not isinstance(layer, nn.Linear):
        shape = (-1, *(1,) * len(layer.kernel_size))  # type: ignore[arg-type]
        bias = call.graph.create_node(
            "call_function", torch.reshape, (bias, shape), name=f"{call.name}_bias"
        )
    return call.graph.create_node(
        "call_function", operator.add, (call, bias), name=f"{call.name}_biased"
    )


def _move_bias(graph_module: GraphModule, name: str, layer: nn.Module) -> None:
    """Make the bias of a layer a parameter beside it."""
    owner, _, leaf = name.rpartition(".")
    home = graph_module.get_submodule(owner)
    free = next(each for each in numbered(f"{leaf}_bias") if not hasattr(home, each))
    home.register_parameter(free, layer.bias)  # type: ignore[arg-type]
    layer.register_parameter("bias", None)
    for node in graph_module.graph.nodes:
        if (node.op, node.target) == ("get_attr", f"{name}.bias"):
            node.target = f"{owner}.{free}".removeprefix(".")
