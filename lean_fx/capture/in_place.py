"""Decide whether ``y += 1`` in a model's code adds, or writes into ``y``.

torch.fx's proxies record an addition. That is right unless the old ``y`` is read again: by another
name, through a view, or by the caller who passed it. Then the call becomes an in-place one.
Otherwise it stays an addition, which analyses can look through. A size is never written to.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.fx import Graph, Node, Proxy

from lean_fx.graph.calls import asks_for_meta
from lean_fx.passes.track_writes import shared_storage, written_by

_MARK = "lean_fx.in_place"
_IN_PLACE: dict[Any, Callable[[Any, Any], Any]] = {
    operator.add: operator.iadd,
    operator.sub: operator.isub,
    operator.mul: operator.imul,
    operator.truediv: operator.itruediv,
    operator.floordiv: operator.ifloordiv,
    operator.mod: operator.imod,
    operator.pow: operator.ipow,
    operator.and_: operator.iand,
    operator.or_: operator.ior,
    operator.xor: operator.ixor,
}


def write_in_place(graph: Graph, modules: Mapping[str, nn.Module]) -> None:
    """Make a marked call in-place if something else reads, after it, the storage that it writes.

    Args:
        graph: as it was traced.
        modules: the modules of the graph, by name.
    """
    marked = [node for node in graph.nodes if node.meta.pop(_MARK, False) and not is_size(node)]
    order = {node: place for place, node in enumerate(graph.nodes)}
    settled = False
    while marked and not settled:
        writing = set(marked)

        def written(node: Node, modules: Mapping[str, nn.Module]) -> Iterator[Node]:
            if node in writing:  # noqa: B023 (used within this turn)
                yield from node.all_input_nodes[:1]
            else:
                yield from written_by(node, modules)

        homes = shared_storage(graph, modules, written)
        left = [node for node in marked if _read_again(node, homes, order)]
        settled, marked = left == marked, left
    for node in marked:
        node.target = _IN_PLACE[node.target]


def is_size(node: Node) -> bool:
    """Whether a value is a size, or computed only from sizes."""
    if asks_for_meta(node):
        return True
    computing = node.target is operator.getitem or node.target in _IN_PLACE
    sources = node.all_input_nodes
    return computing and bool(sources) and all(map(is_size, sources))


def _read_again(call: Node, homes: Mapping[Node, str], order: Mapping[Node, int]) -> bool:
    """Whether the storage that a call would write into is read again other than by its result."""
    target = call.args[0]
    assert isinstance(target, Node)
    place = order[call]
    for node, home in homes.items():
        if home != homes[target] or order[node] >= place:
            continue
        lives_on = node.op in ("placeholder", "get_attr")
        if lives_on or any(order[user] > place for user in node.users):
            return True
    return False


class AugmentedAssignments(Proxy):
    """A proxy that marks the nodes made by ``proxy += other`` and the like."""

    def augment(self, other: Any, function: Callable[[Any, Any], Any]) -> Any:
        """The result of an assignment whose function is, for example, operator.add."""
        made = function(self, other)
        if issubclass(type(made), Proxy):
            made.node.meta[_MARK] = True
        return made


def _method(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda self, other: self.augment(other, function)


for _function, _in_place in _IN_PLACE.items():
    setattr(AugmentedAssignments, f"__{_in_place.__name__}__", _method(_function))
