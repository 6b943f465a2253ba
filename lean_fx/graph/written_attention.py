"""Replace calls of ``F.multi_head_attention_forward`` by linear calls and the attention itself.

Such a call gets the weights of layers and applies them itself. Before, in a module that holds four
linear layers::

    x, q.weight, k.weight, v.weight, c.weight -> multi_head_attention_forward -> (out, weights)

After, with a call of F.linear for each weight::

    x -> linear(q.weight) -> q      x -> linear(k.weight) -> k      x -> linear(v.weight) -> v
    q, k, v, masks -> calls.heads -> (y, weights)      y -> linear(c.weight) -> out

Rules:

1. It acts on calls whose settings are constants, without ``bias_k``, ``bias_v``, ``static_k`` and
   ``static_v``, and without dropout.
2. There is a weight for each projection, or one weight that projects a single value three times.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node

from lean_fx.graph.calls import bound_arguments
from lean_fx.graph.rewriting import add_module, home_of, item, replace_node
from lean_fx.layers.attention import AttentionHeads

_ABSENT = ("bias_k", "bias_v", "static_k", "static_v")
_SETTINGS = ("num_heads", "add_zero_attn", "use_separate_proj_weight")
_HANDED_ON = (
    *("key_padding_mask", "need_weights", "attn_mask"),
    *("average_attn_weights", "is_causal"),
)


def write_out(graph_module: GraphModule) -> bool:
    """Replace the calls that can be replaced; whether there were any."""
    attend = F.multi_head_attention_forward
    calls = graph_module.graph.find_nodes(op="call_function", target=attend, sort=True)
    found = [(node, given) for node in calls if _can_be(given := bound_arguments(node, attend))]
    for node, given in found:
        _write_out(graph_module, node, given)
    return bool(found)


def _can_be(given: dict[str, Any]) -> bool:
    settings = all(not isinstance(given[name], Node) for name in _SETTINGS)
    plain = settings and all(given[name] is None for name in _ABSENT)
    one_value = given["query"] is given["key"] is given["value"]
    drops = isinstance(given["dropout_p"], Node) or given["dropout_p"] > 0
    return plain and not drops and (given["use_separate_proj_weight"] or one_value)


def _write_out(graph_module: GraphModule, node: Node, given: dict[str, Any]) -> None:
    graph, read = node.graph, node.all_input_nodes
    settings = SimpleNamespace(
        num_heads=given["num_heads"],
        add_zero_attn=given["add_zero_attn"],
        dropout=0.0,
        batch_first=False,
        bias_k=None,
        bias_v=None,
        training=graph_module.training,
    )
    heads = AttentionHeads(settings)  # type: ignore[arg-type]
    target = add_module(graph_module, "calls", "heads", heads, home_of(node))
    with graph.inserting_before(node):
        parts = _separate(graph, given) if given["use_separate_proj_weight"] else _one(graph, given)
        handed_on = {name: given[name] for name in _HANDED_ON}
        attended = graph.call_module(target, parts, handed_on)
        inner = item(graph, attended, 0)
        out = _linear(graph, inner, given["out_proj_weight"], given["out_proj_bias"])
        value = (out, item(graph, attended, 1))
        replace_node(node, value, target)
    if not value[1].users:
        graph.erase_node(value[1])
    for each in read:  # such as a bias put together
        if not each.users and each.op in ("call_function", "get_attr"):
            graph.erase_node(each)


def _separate(graph: Graph, given: dict[str, Any]) -> tuple[Node, ...]:
    biases = _biases(graph, given["in_proj_bias"])
    parts = zip(("query", "key", "value"), "qkv", biases, strict=True)
    return tuple(
        _linear(graph, given[value], given[f"{letter}_proj_weight"], bias)
        for value, letter, bias in parts
    )


def _one(graph: Graph, given: dict[str, Any]) -> tuple[Node, ...]:
    projected = _linear(graph, given["query"], given["in_proj_weight"], given["in_proj_bias"])
    thirds = graph.call_method("chunk", (projected, 3, -1))
    return tuple(item(graph, thirds, index) for index in range(3))


def _biases(graph: Graph, bias: Any) -> tuple[Any, ...]:
    """The three parts of a bias; the operands themselves if it is a concatenation of three."""
    if bias is None:
        return (None,) * 3
    parts = bias.args[0] if bias.target in (torch.cat, torch.concat) else ()
    if len(parts) == 3 and bias.args[1:] in ((), (0,)) and not bias.kwargs:
        return tuple(parts)
    thirds = graph.call_method("chunk", (bias, 3))
    return tuple(item(graph, thirds, index) for index in range(3))


def _linear(graph: Graph, value: Any, weight: Any, bias: Any) -> Node:
    return graph.call_function(F.linear, (value, weight, bias))
