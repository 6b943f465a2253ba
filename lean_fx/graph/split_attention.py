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
4. In a model that keeps its class there is no graph to change: a ``SplitAttention`` takes the
   layer's place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lean_fx.graph.calls import argument, is_altered
from lean_fx.graph.rewriting import item, replace_node
from lean_fx.layers.attention import AttentionHeads, SplitAttention, attention_parts


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
    for part, module in attention_parts(layer, itself=itself):
        home.add_module(part, module)
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


def split_module(layer: Any, name: str, planned: Collection[str]) -> nn.Module:
    """The module that takes the place of a layer where there is no graph.

    Args:
        layer: of attention.
        name: of the layer.
        planned: the names of the layers that a plan speaks of.
    """
    separate = any(f"{name}.{part}_proj" in planned for part in "qkv")
    return SplitAttention(layer, itself=not separate and layer.in_proj_weight is not None)
