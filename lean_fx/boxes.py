"""The boxes of a picture: the calls of a graph, folded into modules until they are few enough."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from lean_fx.capture.capturing import capture, clone_graph
from lean_fx.capture.example_inputs import as_inputs, copied_inputs
from lean_fx.cloning import clone
from lean_fx.graph.calls import modules_by_name
from lean_fx.graph.facts import facts
from lean_fx.graph.rewriting import home_of
from lean_fx.measure.costs import costs_of_graph
from lean_fx.measure.costs_table import NodeCost
from lean_fx.passes import PropagateShapes
from lean_fx.reduction.registry import is_reduction


@dataclass(frozen=True)
class Box:
    """A box of a picture: one node, or a module with all its nodes, which run in a row.

    Attributes:
        name: of the module or the node.
        kind: of the module or the function.
        shape: of its result, where that is one tensor of known shape.
        parameters: elements that are first read here.
        macs: multiply-adds.
        parts: how many nodes it stands for.
        reductions: how many reductions there are among these, and inside of modules that are called
            whole.
        sources: the places of the boxes whose values it reads.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    parameters: int
    macs: int
    parts: int
    reductions: int
    sources: tuple[int, ...]


def boxes_of(model: nn.Module, example_inputs: Any, most: int) -> list[Box]:
    """The boxes of a model, in the order in which they run.

    Args:
        model: stays as it is.
        example_inputs: as for :func:`~lean_fx.leanify`; MACs are those of the whole batch.
        most: modules are folded until there are no more boxes than this, or none can be folded.
    """
    inputs = copied_inputs(as_inputs(example_inputs, model))
    captured = _captured(model, inputs)
    PropagateShapes(inputs)(captured)
    modules = modules_by_name(captured)
    calls = [node for node in captured.graph.nodes if node.op.startswith("call_")]
    counted = costs_of_graph(captured, inputs, type(model).__name__).nodes
    costs = dict(zip(calls, counted, strict=True))
    groups = _folded([node for node in calls if _is_shown(node, costs[node])], modules, most)
    place = {node: number for number, (_, nodes) in enumerate(groups) for node in nodes}
    return [_box(name, nodes, place, modules, costs) for name, nodes in groups]


def _captured(model: nn.Module, inputs: tuple[Any, ...]) -> GraphModule:
    if not isinstance(model, GraphModule):
        return capture(model, inputs, purpose="evaluation")
    own = clone(model)  # counting changes it
    assert isinstance(own, GraphModule)
    return clone_graph(own)


def _folded(
    calls: list[Node], modules: dict[str, nn.Module], most: int
) -> list[tuple[str, list[Node]]]:
    """The calls of each box, and its name; the innermost modules are folded first."""
    paths = _paths([node for node in calls if not _is_reduction(node, modules)])
    groups = [(node.name, [node]) for node in calls]
    depth = max((len(path.split(".")) for path in paths.values()), default=1)
    while len(groups) > most and depth >= 0:
        groups = _groups(calls, depth, paths)
        depth -= 1
    return groups


def _is_shown(node: Node, cost: NodeCost) -> bool:
    """Whether a call is more than arithmetic on sizes, or the unpacking of several values."""
    known = facts(node).shape is not None or node.op == "call_module"
    return known or cost.parameters > 0 or cost.macs > 0


def _sources(node: Node, shown: Mapping[Node, int]) -> set[int]:
    """The places of the values that a node reads, through calls that are not shown."""
    found: set[int] = set()
    for source in node.all_input_nodes:
        if source in shown:
            found.add(shown[source])
        elif source.target not in (getattr, "size", "dim"):
            found |= _sources(source, shown)
    return found


def _groups(nodes: list[Node], depth: int, paths: dict[Node, str]) -> list[tuple[str, list[Node]]]:
    """Group neighbours by their module, at a depth of names; a reduction goes with its reader."""

    def key(node: Node) -> str:
        if node not in paths:
            return key(next(iter(node.users))) if node.users else node.name
        return ".".join(paths[node].split(".")[:depth]) or node.name

    return [(name, list(group)) for name, group in itertools.groupby(nodes, key)]


def _paths(calls: list[Node]) -> dict[Node, str]:
    """The module that each node is a call of, or is a part of; empty outside any.

    A node without a note, such as one that a pass has made, belongs to the module that holds the
    nodes before and behind it.
    """
    noted = {node: _noted_path(node) for node in calls}
    ahead = dict(zip(calls, _last_paths(noted, calls), strict=True))
    behind = dict(zip(reversed(calls), _last_paths(noted, reversed(calls)), strict=True))
    return {node: noted[node] or _shared(ahead[node], behind[node]) for node in calls}


def _noted_path(node: Node) -> str:
    return str(node.target) if node.op == "call_module" else home_of(node)


def _last_paths(noted: dict[Node, str], calls: Iterable[Node]) -> Iterator[str]:
    """For each node, the last path that it or a node before it notes."""
    return itertools.accumulate((noted[node] for node in calls), lambda last, own: own or last)


def _shared(one: str, other: str) -> str:
    pairs = zip(one.split("."), other.split("."), strict=False)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
    return ".".join(name for name, _ in same)


def _is_reduction(node: Node, modules: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and is_reduction(modules[str(node.target)])


def _box(
    name: str,
    nodes: list[Node],
    place: dict[Node, int],
    modules: dict[str, nn.Module],
    costs: dict[Node, NodeCost],
) -> Box:
    only = nodes[0] if len(nodes) == 1 else None
    if only is not None and only.op == "call_module":
        name = str(only.target)
    shape = facts(nodes[-1]).shape
    sources = set().union(*(_sources(each, place) for each in nodes)) - {place[nodes[0]]}
    return Box(
        name,
        _kind(modules[name]) if name in modules else costs[nodes[-1]].kind,
        None if shape is None else tuple(shape),
        sum(costs[each].parameters for each in nodes),
        sum(costs[each].macs for each in nodes),
        len(nodes),
        sum(
            is_reduction(held)
            for each in nodes
            if each.op == "call_module"
            for held in modules[str(each.target)].modules()
        ),
        tuple(sorted(sources)),
    )


def _kind(module: nn.Module) -> str:
    return str(module._get_name())  # type: ignore[no-untyped-call]
