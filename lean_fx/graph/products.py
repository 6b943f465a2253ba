"""Which calls multiply a value with a weight that no layer holds, and what it is computed from.

::

    table = self.table[offsets]                              # a weight, computed from "table"
    scores = torch.einsum("bnc,nlc->bnl", x, table)          # a product of a value with it
    mixed = scores @ y                                       # of two values: none

Rules:

1. A node is computed from parameters alone if no input of the model leads to it but by its size,
   shape, dtype or device. Buffers and what forward makes (``torch.arange``) may lead to it too.
2. Of ``w.to(x)`` and its like, only ``w`` leads on.
3. What a value is written into, in place, is no weight any more, nor what that may be a view of.
4. Products are F.linear, convolutions, torch.matmul and its kin, and einsum of two operands that
   sums over an axis of both.
5. That of two weights is a weight again. That of a weight with buffers, or with what is computed
   from sizes, is a product.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from lean_fx.graph.calls import argument
from lean_fx.graph.facts import facts
from lean_fx.layers.kinds import LAYER_OF_CALL
from lean_fx.skip_reason import SkipReason

#: What layers of torch.nn call with their weight.
CALLS = {*LAYER_OF_CALL, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
_PRODUCTS: set[Any] = {operator.matmul, torch.matmul, torch.mm, torch.bmm, torch.mv, torch.inner}
_PRODUCTS |= {torch.tensordot, "matmul", "mm", "bmm", "mv", "inner"}
_ADDED: set[Any] = {torch.addmm, torch.addbmm, torch.baddbmm, "addmm", "addbmm", "baddbmm"}
_ASKED = {"shape", "ndim", "dtype", "device"}
_ASKING = {"size", "dim", "numel", "ndimension"}
#: The methods whose result is their first argument, made like the second.
SAME_AS_INPUT = {"to", "type_as", "expand_as", "view_as", "reshape_as"}


def source_parameters_of(graph_module: GraphModule) -> dict[Node, tuple[str, ...]]:
    """The names of the parameters that nodes are computed from, of those that depend on no value.

    ``TrackWrites`` comes before it.
    """
    parameters = dict(graph_module.named_parameters(remove_duplicate=False))
    origins: dict[Node, tuple[str, ...]] = {}
    for node in graph_module.graph.nodes:
        sources = _sources(node)
        if node.op in ("placeholder", "output") or any(each not in origins for each in sources):
            if facts(node).writes:
                _forget(node.all_input_nodes[0], origins)
            continue
        names = [name for source in sources for name in origins[source]]
        if node.op == "get_attr" and str(node.target) in parameters:
            names.append(str(node.target))
        elif node.op == "call_module":
            own = graph_module.get_submodule(str(node.target)).named_parameters()
            names += [f"{node.target}.{name}" for name, _ in own]
        origins[node] = tuple(dict.fromkeys(names))
    return origins


def _sources(node: Node) -> list[Node]:
    """The nodes whose values lead to that of ``node`` (rules 1 and 2)."""
    if node.op == "call_method":
        given = node.all_input_nodes
        return (
            [] if node.target in _ASKING else given[:1] if node.target in SAME_AS_INPUT else given
        )
    if node.target is getattr and argument(node, 1, "name") in _ASKED:
        return []
    return node.all_input_nodes


def _forget(written: Node, origins: dict[Node, tuple[str, ...]]) -> None:
    """Forget a node that a value is written into, and those that it may be a view of (rule 3)."""
    while written in origins:
        del origins[written]
        written = next(iter(written.all_input_nodes), written)


def factors(called: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a call multiplies and sums (rule 4); nothing of other calls.

    Args:
        called: a function, or the name of a method.
        args: its positional arguments, with the one that a method is called on.
        kwargs: its others.

    Example:
        >>> factors("matmul", ("x", "weight"), {})
        ['x', 'weight']
        >>> factors(torch.einsum, ("nc,c->nc", "x", "scale"), {})
        []
    """
    given = [*args, *kwargs.values()]
    if called in CALLS:
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


def find_weight(node: Node, origins: Mapping[Node, tuple[str, ...]]) -> Node | None:
    """The weight that a call multiplies with something else than a weight, or None."""
    given = [
        each for each in factors(node.target, node.args, node.kwargs) if isinstance(each, Node)
    ]
    weights = [each for each in given if origins.get(each)]
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
