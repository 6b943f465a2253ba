"""What :class:`~lean_fx.passes.FindConsumers` needs to know about a graph as a whole."""

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
    """Facts about a whole graph that the rules use.

    Attributes:
        modules: the modules, by qualified name.
        calls: how often each module is called, by its id.
        owners: for each parameter, by id: its names, those of tensors that share memory with it,
            and the nodes that read it.
        after_weights: the nodes that depend on a layer with weights; a normalisation of the
            inputs does not count.
        position: the place of each node in the graph.
        writes: the places of the in-place operations on each storage, ascending.
        source_parameters: for a node that depends on no input of the model, the names of the
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
        """Collect the facts of a graph; ``TrackWrites`` must have run."""
        modules = modules_by_name(graph_module)
        calls: Counter[int] = Counter()
        owners = owners_of(graph_module)
        after_weights: set[Node] = set()
        position = {node: place for place, node in enumerate(graph_module.graph.nodes)}
        writes: dict[str, list[int]] = {}
        for node, place in position.items():
            has_weights = False
            if node.op == "get_attr":
                value = attribute_of(graph_module, str(node.target))
                has_weights = isinstance(value, nn.Parameter)
                if has_weights and not all(map(_asks, node.users)):
                    owners[id(value)].append(f"read by {node.name}")
            elif node.op == "call_module":
                module = modules[str(node.target)]
                calls[id(module)] += 1
                has_parameters = next(module.parameters(), None) is not None
                has_weights = has_parameters and not isinstance(module, _NORMS)
            if has_weights or any(source in after_weights for source in node.all_input_nodes):
                after_weights.add(node)
            if facts(node).writes:
                writes.setdefault(facts(node).storage, []).append(place)
        sources = source_parameters_of(graph_module)
        return cls(modules, calls, owners, frozenset(after_weights), position, writes, sources)

    def writes_before(self, value: Node, reader: Node) -> int:
        """How many in-place operations have changed ``value`` when ``reader`` reads it."""
        return bisect_left(self.writes.get(facts(value).storage, []), self.position[reader])

    def moves_with_path(self, step: Node, path: list[Node], reader: Node) -> bool:
        """Whether ``step`` is an in-place dropout that changes nothing that other nodes read."""
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
        """``read``, with the fields that depend on its place in the graph."""
        return replace(
            read, intermediate=value in self.after_weights, writes=self.writes_before(value, reader)
        )


def _asks(node: Node) -> bool:
    """Whether a node reads only the dtype or device of a parameter."""
    return node.target is getattr and node.args[1] in ("dtype", "device")


def attribute_of(root: nn.Module, name: str) -> Any:
    """The attribute that a ``get_attr`` reads; None if it is missing."""
    owner, _, attribute = name.rpartition(".")
    return getattr(root.get_submodule(owner), attribute, None)


def owners_of(module: nn.Module) -> dict[int, list[str]]:
    """For each parameter and buffer, by id: its names, and those of tensors that share memory."""
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
