"""Small changes to a graph."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node


def add_module(graph_module: GraphModule, folder: str, name: str, module: nn.Module) -> str:
    """Add ``module`` as ``folder.name``, or with a number behind either if that is taken.

    Returns:
        The name that it got.
    """
    home = next(
        each
        for each in numbered(folder)
        if type(getattr(graph_module, each, None)) in (nn.Module, type(None))
    )
    if not hasattr(graph_module, home):
        graph_module.add_module(home, nn.Module().train(graph_module.training))
    there = graph_module.get_submodule(home)
    free = next(each for each in numbered(name) if not hasattr(there, each))
    there.add_module(free, module)
    return f"{home}.{free}"


def item(graph: Graph, value: Any, index: Any, name: str | None = None) -> Node:
    """A node that reads ``value[index]``."""
    return graph.create_node("call_function", operator.getitem, (value, index), name=name)


def replace_node(node: Node, value: Any) -> None:
    """Put ``value``, a node or a tuple of nodes, in the place of ``node``, and erase that."""
    for user in list(node.users):
        if isinstance(value, tuple) and user.target is operator.getitem and user.args[0] is node:
            replace_node(user, value[user.args[1]])  # type: ignore[index]
        else:
            rewire(user, node, value)
    node.graph.erase_node(node)


def rewire(user: Node, node: Node, value: Any) -> None:
    """Give ``user`` ``value``, a node or a tuple of nodes, where it read ``node``."""

    def swapped(argument: Node) -> Any:
        return value if argument is node else argument

    user.args = torch.fx.map_arg(user.args, swapped)
    user.kwargs = torch.fx.map_arg(user.kwargs, swapped)


def numbered(name: str) -> Iterator[str]:
    """A name, and the names with a number behind it."""
    yield name
    yield from (f"{name}_{number}" for number in itertools.count(1))
