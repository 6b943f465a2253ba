"""What :class:`~lean_fx.passes.FindConsumers` needs to know of a whole graph, and finds."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from lean_fx.cloning import memory_of
from lean_fx.graph.calls import modules_by_name
from lean_fx.graph.facts import ChannelRead, facts
from lean_fx.graph.ops import is_dropout
from lean_fx.graph.products import source_parameters_of

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class GraphContext:
    """What the rules need to know of the whole graph.

    Attributes:
        modules: by qualified name.
        calls: of each module, by its id.
        owners: the names of each parameter, by its id: of modules, of what shares memory with it,
            and of nodes that read it.
        after_weights: the nodes behind a layer with weights; normalising the inputs does not
            count.
        position: the place of each node in the graph.
        writes: the places of the in-place operations on each storage, ascending.
        source_parameters: for a node that no input of the model leads to, the names of the
            parameters that it is computed from (:mod:`lean_fx.graph.products`).
    """

    modules: Mapping[str, nn.Module]
    calls: Mapping[int, int]
    owners: Mapping[int, list[str]]
    after_weights: frozenset[Node]
    position: Mapping[Node, int]
    writes: Mapping[str, list[int]]
    source_parameters: Mapping[Node, tuple[str, ...]]

    @classmethod
    def of(cls, graph_module: GraphModule) -> GraphContext:
        """That of a graph whose in-place operations are known (``TrackWrites``)."""
        modules = modules_by_name(graph_module)
        calls: Counter[int] = Counter()
        owners = owners_of(graph_module)
        after_weights: set[Node] = set()
        position = {node: place for place, node in enumerate(graph_module.graph.nodes)}
        writes: dict[str, list[int]] = {}
        for node, place in position.items():
            own = False
            if node.op == "get_attr":
                value = attribute_of(graph_module, str(node.target))
                own = isinstance(value, nn.Parameter)
                if own and not all(map(_asks, node.users)):
                    owners[id(value)].append(f"read by {node.name}")
            elif node.op == "call_module":
                module = modules[str(node.target)]
                calls[id(module)] += 1
                weighted = next(module.parameters(), None) is not None
                own = weighted and not isinstance(module, _NORMS)
            if own or any(source in after_weights for source in node.all_input_nodes):
                after_weights.add(node)
            if facts(node).writes:
                writes.setdefault(facts(node).storage, []).append(place)
        sources = source_parameters_of(graph_module)
        return cls(modules, calls, owners, frozenset(after_weights), position, writes, sources)

    def writes_before(self, value: Node, reader: Node) -> int:
        """How many in-place operations have changed ``value`` when ``reader`` reads it."""
        return bisect_left(self.writes.get(facts(value).storage, []), self.position[reader])

    def moves_with_path(self, step: Node, path: list[Node], reader: Node) -> bool:
        """Whether an in-place dropout on the way to a layer changes nothing that others read."""
        ours = {*path, reader}
        module = self.modules.get(str(step.target)) if step.op == "call_module" else None
        return (
            facts(step).writes
            and module is not None
            and is_dropout(step, self.modules)
            and self.calls[id(module)] == 1
            and all(
                user in ours or self.position[user] < self.position[step]
                for node in self.position
                if facts(node).storage == facts(step).storage
                for user in node.users
            )
        )

    def with_position(self, read: ChannelRead, value: Node, reader: Node) -> ChannelRead:
        """``read``, with what depends on where in the graph it happens."""
        return replace(
            read, intermediate=value in self.after_weights, writes=self.writes_before(value, reader)
        )


def _asks(node: Node) -> bool:
    """Whether a node asks for the type of a parameter, and does not read its numbers."""
    return node.target is getattr and node.args[1] in ("dtype", "device")


def attribute_of(root: nn.Module, name: str) -> Any:
    """What a ``get_attr`` reads; None if it is not there."""
    owner, _, attribute = name.rpartition(".")
    return getattr(root.get_submodule(owner), attribute, None)


def owners_of(module: nn.Module) -> dict[int, list[str]]:
    """The names of every parameter, and of what shares memory with it, by its id."""
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    owners: dict[int, list[str]] = {}
    places = []
    for name, tensor in named:
        owners.setdefault(id(tensor), []).append(name)
        if memory := memory_of(tensor):
            places.append((memory, id(tensor), name))
    places.sort(key=lambda place: place[0])
    for index, ((storage, _, end), ours, name) in enumerate(places):
        for (other_storage, start, _), theirs, other in places[index + 1 :]:
            if other_storage != storage or start >= end:
                break
            if ours != theirs:
                owners[ours].append(other)
                owners[theirs].append(name)
    return owners
