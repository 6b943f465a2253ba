"""Split a MultiheadAttention into its linear layers and the rest of its forward.

It applies the weights of its projections itself, so the graph does not show these as layers.
Before, with one value for queries, keys and values::

    x -> attention(x, x, x, masks) -> (out, weights)

After::

    x -> attention.in_proj -> chunk -> q, k, v
    q, k, v, masks -> attention.heads -> (y, weights)      y -> attention.out_proj -> out

With several values, perhaps of different widths::

    query -> attention.q_proj      key -> attention.k_proj      value -> attention.v_proj

Rules:

1. The layer is exactly an nn.MultiheadAttention, and called once.
2. The parts have its weights, so the outputs are equal. In training, dropout draws other numbers
   from the same distribution.
3. Readers of the output or of the attention weights read the new nodes; a reader of the whole
   result gets a pair of them.
4. In a model that keeps its class there is no graph to rewrite: a ``SplitAttention`` replaces the
   layer.
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
    """Whether a module is exactly torch's MultiheadAttention, with torch's own parts, unaltered."""
    return (
        type(layer) is nn.MultiheadAttention
        and type(layer.out_proj) is NonDynamicallyQuantizableLinear
        and not is_altered(layer)
    )


def is_split(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether the attention ``name`` has been split already."""
    return isinstance(modules.get(f"{name}.heads"), AttentionHeads)


def split(graph_module: GraphModule, node: Node) -> None:
    """Split the layer that a node calls."""
    name, graph = str(node.target), node.graph
    layer: Any = graph_module.get_submodule(name)
    inputs = [argument(node, i, key) for i, key in enumerate(("query", "key", "value"))]
    self_attention = layer.in_proj_weight is not None and len(set(inputs)) == 1
    home = nn.Module().train(layer.training)
    for part, module in attention_parts(layer, self_attention=self_attention):
        home.add_module(part, module)
    graph_module.set_submodule(name, home)

    with graph.inserting_before(node):
        if self_attention:
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
    """The module that replaces an attention layer where there is no graph.

    Args:
        layer: the attention layer.
        name: its name.
        planned: the names of the layers in a plan.
    """
    separate = any(f"{name}.{part}_proj" in planned for part in "qkv")
    return SplitAttention(layer, self_attention=not separate and layer.in_proj_weight is not None)
