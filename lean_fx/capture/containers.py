"""Containers of a user's own class, which the graph makes anew at every call."""

from __future__ import annotations

from typing import Any

from lean_fx.capture.side_effects import SideEffect
from lean_fx.graph.reachable import NUMBERS

_PLAIN_CONTAINERS = ("builtins", "torch", "torch.fx.immutable_collections")


def is_own_container(value: Any) -> bool:
    """Whether a value is of a subclass of dict, list or tuple that torch.fx does not preserve.

    Example:
        >>> from collections import OrderedDict
        >>> is_own_container(OrderedDict()), is_own_container([])
        (True, False)
    """
    kind = type(value)
    own = issubclass(kind, dict | list | tuple) and kind.__module__ not in _PLAIN_CONTAINERS
    return own and not hasattr(value, "_fields")


def arguments_of(value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with which the class of a container makes an equal one.

    Raises:
        SideEffect: no arguments do.

    Example:
        >>> from collections import OrderedDict
        >>> arguments_of(OrderedDict(x=1))
        ((), {'x': 1})
    """
    plain = dict(value) if isinstance(value, dict) else list(value)
    ways: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((plain,), {})]
    if isinstance(plain, dict) and all(type(key) is str for key in plain):
        ways.insert(0, ((), plain))
    for args, kwargs in ways:
        try:
            if _held_alike(type(value)(*args, **kwargs), value):
                return args, kwargs
        except Exception:  # the class's own code
            continue
    raise SideEffect(f"a {type(value).__name__} of values cannot be made anew")


def _held_alike(made: Any, value: Any) -> bool:
    """Whether two containers hold the same items in the same order, and the same attributes."""
    one, other = (
        [*each, *(each.values() if isinstance(each, dict) else ()), *_attributes(each)]
        for each in (made, value)
    )
    return len(one) == len(other) and all(map(_is_same, one, other))


def _attributes(value: Any) -> list[Any]:
    return [each for pair in sorted(getattr(value, "__dict__", {}).items()) for each in pair]


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and type(one) in NUMBERS and one == other)
