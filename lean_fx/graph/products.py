"""Find calls that multiply a value with a weight outside any layer, and the weight's parameters.

::

    table = self.table[offsets]                              # a weight, computed from "table"
    scores = torch.einsum("bnc,nlc->bnl", x, table)          # a product of a value with it
    mixed = scores @ y                                       # a product of two values: not one

Rules:

1. A node counts as a weight if it is computed only from parameters, buffers and tensors that
   forward makes (``torch.arange``). It may also use the size, shape, dtype or device of a value.
2. In ``w.to(x)`` and similar methods, only ``w`` is a source.
3. A weight into which a value is written in place is no longer one, nor is any tensor that it may
   be a view of.
4. Products are F.linear, convolutions, torch.matmul and its variants, and einsum of two operands
   that sums over an axis of both.
5. A product of two weights is a weight. A product of a weight with a buffer, or with a tensor
   computed from sizes, is a product.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from lean_fx.graph.calls import asks_for_meta
from lean_fx.graph.facts import facts
from lean_fx.layers.kinds import LAYER_OF_CALL
from lean_fx.skip_reason import SkipReason

#: The functions that layers of torch.nn call with their weight.
LAYER_CALLS = {*LAYER_OF_CALL, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
_PRODUCTS: set[Any] = {
    *(operator.matmul, torch.matmul, torch.mm, torch.bmm, torch.mv, torch.inner, torch.tensordot),
    *("matmul", "mm", "bmm", "mv", "inner"),
}
_ADDED: set[Any] = {torch.addmm, torch.addbmm, torch.baddbmm, "addmm", "addbmm", "baddbmm"}
#: The methods whose result is their first argument, made like the second.
SAME_AS_INPUT = {"to", "type_as", "expand_as", "view_as", "reshape_as"}


def source_parameters_of(graph_module: GraphModule) -> dict[Node, tuple[str, ...]]:
    """For each node that depends on no value, the names of the parameters it is computed from.

    ``TrackWrites`` must have run.
    """
    parameters = dict(graph_module.named_parameters(remove_duplicate=False))
    known: dict[Node, tuple[str, ...]] = {}
    for node in graph_module.graph.nodes:
        sources = _sources(node)
        if node.op in ("placeholder", "output") or any(each not in known for each in sources):
            if facts(node).writes:
                _forget(node.all_input_nodes[0], known)
            continue
        names = [name for source in sources for name in known[source]]
        if node.op == "get_attr" and str(node.target) in parameters:
            names.append(str(node.target))
        elif node.op == "call_module":
            own = graph_module.get_submodule(str(node.target)).named_parameters()
            names += [f"{node.target}.{name}" for name, _ in own]
        known[node] = tuple(dict.fromkeys(names))
    return known


def _sources(node: Node) -> list[Node]:
    """The nodes whose numbers ``node`` depends on (rules 1 and 2)."""
    if asks_for_meta(node):
        return []
    given = node.all_input_nodes
    same = node.op == "call_method" and node.target in SAME_AS_INPUT
    return given[:1] if same else given


def _forget(written: Node, known: dict[Node, tuple[str, ...]]) -> None:
    """Forget a node that a value is written into, and those that it may be a view of (rule 3)."""
    while written in known:
        del known[written]
        written = next(iter(written.all_input_nodes), written)


def operands(called: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The operands that a call multiplies and sums over (rule 4); empty for other calls.

    Args:
        called: a function, or the name of a method.
        args: its positional arguments; for a method, the object comes first.
        kwargs: its keyword arguments.

    Example:
        >>> operands("matmul", ("x", "weight"), {})
        ['x', 'weight']
        >>> operands(torch.einsum, ("nc,c->nc", "x", "scale"), {})
        []
    """
    given = [*args, *kwargs.values()]
    if called in LAYER_CALLS:
        keys = ("input", "weight")
        return [args[i] if i < len(args) else kwargs.get(key) for i, key in enumerate(keys)]
    if called in _PRODUCTS:
        return given[:2]
    if called in _ADDED:
        return given[1:3]
    return given[1:] if called is torch.einsum and _sums_shared_axis(given) else []


def _sums_shared_axis(given: list[Any]) -> bool:
    """Whether an einsum of two operands sums over an axis of both."""
    if len(given) != 3 or not isinstance(given[0], str):
        return False
    terms, arrow, result = given[0].partition("->")
    left, _, right = terms.partition(",")
    shared = {axis for axis in left if axis in right and axis.isalpha()}
    return bool(shared - set(result) if arrow else shared)


def find_weight(node: Node, source_parameters: Mapping[Node, tuple[str, ...]]) -> Node | None:
    """The weight that a call multiplies with something else, or None."""
    given = [
        each for each in operands(node.target, node.args, node.kwargs) if isinstance(each, Node)
    ]
    weights = [each for each in given if source_parameters.get(each)]
    return weights[0] if 0 < len(weights) < len(given) else None


def why_computed(more: Sequence[str]) -> SkipReason:
    """Why a parameter that a weight is computed from does not become a layer.

    Args:
        more: the names of the other parameters that the weight is computed from.

    Example:
        >>> print(why_computed(["gain"]))
        the weight is computed from it and gain in forward, which no layer would do
    """
    others = f" and {more[0]}" if len(more) == 1 else f" and {len(more)} others" if more else ""
    text = f"the weight is computed from it{others} in forward, which no layer would do"
    return SkipReason("weight_computed", text)
