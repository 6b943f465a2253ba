"""Transformation: a MultiheadAttention becomes its linear layers, and what lies between them.

Its projections read weights by hand, so no node of the graph shows them. Before, with one value
for queries, keys and values::

    x -> attention(x, x, x, masks) -> (out, weights)

After::

    x -> attention.in_proj -> chunk -> q, k, v
    q, k, v, masks -> attention.heads -> (y, weights)      y -> attention.out_proj -> out

With several values, of widths of their own perhaps::

    query -> attention.q_proj      key -> attention.k_proj      value -> attention.v_proj

Rules:

1. It acts on layers of exactly nn.MultiheadAttention that it is given by name, called once.
2. Weights are those of the layer, so outputs and weights equal its own; dropout in training draws
   other values from the same distribution.
3. What is read of the result is handed over; where it is read whole, as the pair that it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lean_fx.graph.calls import argument, is_altered
from lean_fx.graph.rewriting import item, replace_node
from lean_fx.layers.attention import AttentionHeads


def can_split(layer: Any) -> bool:
    """Whether a module is exactly a MultiheadAttention, of parts that are exactly torch's."""
    return (
        type(layer) is nn.MultiheadAttention
        and type(layer.out_proj) is NonDynamicallyQuantizableLinear
        and not is_altered(layer)
    )


def is_split(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether ``name`` was a layer of attention, which is split already."""
    return isinstance(modules.get(f"{name}.heads"), AttentionHeads)


def split(graph_module: GraphModule, node: Node) -> None:
    """Split the layer that a node calls."""
    name, graph = str(node.target), node.graph
    layer: Any = graph_module.get_submodule(name)
    inputs = [argument(node, i, key) for i, key in enumerate(("query", "key", "value"))]
    itself = layer.in_proj_weight is not None and len(set(inputs)) == 1
    home = nn.Module().train(layer.training)
    for part, weight, bias in _projections(layer, itself):
        home.add_module(part, _linear(weight, bias, layer.training))
    home.add_module("heads", AttentionHeads(layer))
    out_proj = _linear(layer.out_proj.weight, layer.out_proj.bias, layer.training)
    home.add_module("out_proj", out_proj)
    graph_module.set_submodule(name, home)

    with graph.inserting_before(node):
        if itself:
            projected = graph.call_module(f"{name}.in_proj", (inputs[0],))
            thirds = (projected, 3, -1)
            parts = graph.create_node("call_method", "chunk", thirds, name=f"{node.name}_chunk")
            q, k, v = (
                item(graph, parts, i, name=f"{node.name}_{part}") for i, part in enumerate("qkv")
            )
        else:
            q, k, v = (
                graph.call_module(f"{name}.{part}_proj", (value,))
                for part, value in zip("qkv", inputs, strict=True)
            )
        options = {n: v for n, v in node.kwargs.items() if n not in ("query", "key", "value")}
        heads = graph.call_module(f"{name}.heads", (q, k, v, *node.args[3:]), options)
        attended = item(graph, heads, 0, name=f"{node.name}_attended")
        out = graph.call_module(f"{name}.out_proj", (attended,))
        weights = item(graph, heads, 1, name=f"{node.name}_weights")
        replace_node(node, (out, weights), name)
    for each in reversed(list(heads.users)):
        if not each.users:  # nobody reads the weights
            graph.erase_node(each)


def _projections(layer: Any, itself: bool) -> Iterable[tuple[str, nn.Parameter, nn.Parameter]]:
    """The names, weights and biases of what comes before the heads."""
    bias = layer.in_proj_bias
    if itself:
        yield "in_proj", layer.in_proj_weight, bias
        return
    biases = (None,) * 3 if bias is None else _thirds(bias)
    names = ("q_proj", "k_proj", "v_proj")
    if layer.in_proj_weight is not None:
        weights = _thirds(layer.in_proj_weight)
    else:
        weights = tuple(layer.get_parameter(f"{name}_weight") for name in names)
    yield from zip(names, weights, biases, strict=True)


def _thirds(parameter: nn.Parameter) -> tuple[nn.Parameter, ...]:
    learns = parameter.requires_grad
    return tuple(nn.Parameter(x.clone(), learns) for x in parameter.detach().chunk(3))


def _linear(weight: nn.Parameter, bias: nn.Parameter | None, training: bool) -> nn.Linear:
    """A linear layer of these very parameters."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight, made.bias = weight, bias  # type: ignore[assignment]
    return made.train(training)
