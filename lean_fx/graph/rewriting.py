"""Small changes to a graph."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

_REPLACES = "lean_fx.replaces"


def add_module(
    graph_module: GraphModule, folder: str, name: str, module: nn.Module, inside: str = ""
) -> str:
    """Add ``module`` as ``folder.name``, or with a number behind either if that is taken.

    Args:
        graph_module: gets the module.
        folder: the name of a container.
        name: of the module in it.
        module: the module.
        inside: the name of the module that gets the folder; the root if it is empty.

    Returns:
        The name that the module got.
    """
    owner: nn.Module = graph_module
    for part in filter(None, inside.split(".")):
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module().train(owner.training))
        owner = getattr(owner, part)
    home = next(
        each
        for each in numbered(folder)
        if type(getattr(owner, each, None)) in (nn.Module, type(None))
    )
    if not hasattr(owner, home):
        owner.add_module(home, nn.Module().train(owner.training))
    there = owner.get_submodule(home)
    free = next(each for each in numbered(name) if not hasattr(there, each))
    there.add_module(free, module)
    return f"{inside}.{home}.{free}".removeprefix(".")


def become(module: nn.Module, made: nn.Module) -> None:
    """Turn a module into another one, in place; the other must not be used any more.

    Whatever refers to the module, by another name or from a list in the model's code, then refers
    to the new one.

    Example:
        >>> layers = [nn.Linear(4, 2)]
        >>> become(layers[0], nn.Linear(3, 2))
        >>> layers
        [Linear(in_features=3, out_features=2, bias=True)]
    """
    module.__class__ = type(made)
    object.__setattr__(module, "__dict__", vars(made))


def home_of(node: Node) -> str:
    """The name of the module whose forward made a call; the root's is empty."""
    stack = node.meta.get("nn_module_stack", {})
    return str(next(reversed(stack.values()))[0]) if stack else ""


def item(graph: Graph, value: Any, index: Any, name: str | None = None) -> Node:
    """A node that reads ``value[index]``."""
    return graph.create_node("call_function", operator.getitem, (value, index), name=name)


def replace_node(node: Node, value: Any, rewritten: str) -> None:
    """Let the users of a node read another value, and erase the node.

    The new node remembers the name of the old one, for :func:`replaced_names`.

    Args:
        node: the node to replace.
        value: what its users read instead: a node, or a tuple of nodes.
        rewritten: the layer or parameter that is being rewritten.
    """
    for user in list(node.users):
        if isinstance(value, tuple) and user.target is operator.getitem and user.args[0] is node:
            replace_node(user, value[user.args[1]], rewritten)  # type: ignore[index]
        else:
            rewire(user, node, value)
    if isinstance(value, Node):
        take_place(value, node, rewritten)
    node.graph.erase_node(node)


def take_place(node: Node, replaced: Node, rewritten: str) -> None:
    """Let a node remember the name of the node that it replaces."""
    node.meta[_REPLACES] = (rewritten, replaced.name)


def replaced_names(graph: Graph, rewritten: Collection[str]) -> dict[str, str]:
    """The names that nodes would have if some layers and parameters had not been rewritten.

    Args:
        graph: the rewritten graph.
        rewritten: the names of these layers and parameters.

    Returns:
        For each node that replaced another, by its name, the name of the other.
    """
    places = {node.name: node.meta.get(_REPLACES, ("", "")) for node in graph.nodes}
    return {name: old for name, (layer, old) in places.items() if layer in rewritten}


def rewire(user: Node, node: Node, value: Any) -> None:
    """Let ``user`` read ``value``, a node or a tuple of nodes, instead of ``node``."""

    def swapped(argument: Node) -> Any:
        return value if argument is node else argument

    user.args = torch.fx.map_arg(user.args, swapped)
    user.kwargs = torch.fx.map_arg(user.kwargs, swapped)


def numbered(name: str) -> Iterator[str]:
    """``name``, ``name_1``, ``name_2``, ..."""
    yield name
    yield from (f"{name}_{number}" for number in itertools.count(1))
