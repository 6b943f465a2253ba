"""Recognise a flatten of all axes but the first, however it is written."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from lean_fx.graph.calls import argument, called, source_of
from lean_fx.graph.facts import facts


def is_flatten(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node flattens all axes but the first."""
    if called(node, modules) is nn.Flatten:
        module = modules[str(node.target)]
        return _flattens_all(node, module.start_dim, module.end_dim)
    if node.target in (torch.flatten, "flatten"):
        return _flattens_all(
            node, argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1)
        )
    sizes = view_sizes(node)
    return sizes is not None and len(sizes) == 2 and _keeps_first_axis(node, sizes)


def view_sizes(node: Node) -> tuple[Any, ...] | None:
    """The sizes that a view or reshape asks for, or None if the node is neither."""
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target not in (torch.reshape, "reshape", "view"):
        return None
    sizes = node.args[1:] or (node.kwargs.get("shape", node.kwargs.get("size")),)
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = tuple(sizes[0])
    return sizes


def _flattens_all(node: Node, start: Any, end: Any) -> bool:
    source = source_of(node)
    shape = facts(source).shape if source else None
    if shape == ():
        return False
    if shape is not None and isinstance(start, int) and isinstance(end, int):
        return (start % len(shape), end % len(shape)) == (1, len(shape) - 1)
    return (start, end) == (1, -1)


def _keeps_first_axis(node: Node, sizes: tuple[Any, ...]) -> bool:
    """Whether ``view(rows, features)`` keeps the first axis, by the shapes or else by ``rows``."""
    source = source_of(node)
    before = facts(source).shape if source else None
    after = facts(node).shape
    if before is not None and after is not None:
        return before[:1] == after[:1]
    return _is_first_size(sizes[0])


def _is_first_size(rows: Any) -> bool:
    """Whether ``rows`` is ``x.size(0)`` or ``x.shape[0]`` of some value."""
    if not isinstance(rows, Node):
        return False
    if rows.target == "size":
        return bool(argument(rows, 1, "dim") == 0)
    if rows.target is not operator.getitem or rows.args[1] != 0:
        return False
    sizes = rows.args[0]
    if not isinstance(sizes, Node):
        return False
    return bool(sizes.target == "size" or sizes.args[1:] == ("shape",))
