"""Replacements for ``isinstance``, ``hasattr``, ``getattr``, ``type`` and the like during a trace.

``isinstance(x, torch.Tensor)`` is false for a proxy. A tracer with values answers for the value
that the proxy stands for, and adds a check to the graph; a tracer without values raises.
The proxy itself must not claim to be a tensor: torch's C++ code would believe it.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterable
from types import UnionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node, Proxy

from lean_fx.capture.guards import Converting

if TYPE_CHECKING:
    from lean_fx.capture.tracing import LeanTracer
    from lean_fx.graph.patching import Patch

_isinstance, _is_tensor = isinstance, torch.is_tensor


def asked_by_model(depth: int) -> bool:
    """Whether a function was called by a model's code rather than by torch or this package.

    Args:
        depth: how many frames the call is above the caller of this function.
    """
    caller = sys._getframe(depth + 1).f_globals.get("__name__", "")
    return str(caller).partition(".")[0] not in ("torch", "lean_fx")


def answering(tracer: LeanTracer, homes: Iterable[dict[str, Any]]) -> list[Patch]:
    """Patches that send questions about a proxy to the tracer.

    Args:
        tracer: answers them with ``is_instance``, ``has_attribute`` and ``type_of``.
        homes: the globals of the model's code.
    """

    def is_instance(value: Any, kinds: Any) -> bool:
        kinds = with_type(kinds)
        answer = None
        if issubclass(type(value), Proxy) and not _names_proxies(kinds):
            answer = tracer.is_instance(value, kinds, asked_by_model(1))
        return _isinstance(value, kinds) if answer is None else answer

    def has_attribute(value: Any, name: str) -> bool:
        asks = issubclass(type(value), Proxy)
        return tracer.has_attribute(value, name) if asks else hasattr(value, name)

    def read(value: Any, name: str, *default: Any) -> Any:
        asks = default and issubclass(type(value), Proxy)
        if asks and not tracer.has_attribute(value, name):
            return default[0]
        return getattr(value, name, *default)

    def is_tensor(value: Any) -> bool:
        answer = None
        if issubclass(type(value), Proxy):
            answer = tracer.is_instance(value, Tensor, asked_by_model(1))
        return _is_tensor(value) if answer is None else answer

    def type_of(*args: Any) -> Any:
        asks = len(args) == 1 and issubclass(type(args[0]), Proxy)
        return tracer.type_of(args[0]) if asks else type(*args)

    def tell(*values: Any, **options: Any) -> None:
        print(*values, **options)  # called from here, str(proxy) does not ask for its value

    def with_type(kinds: Any) -> Any:
        if type(kinds) is tuple:
            return tuple(map(with_type, kinds))
        if type(kinds) is Converting:  # in a thread that runs other code of the same file
            return kinds.kind
        return type if kinds is type_of else kinds

    asking: list[Patch] = [
        (builtins, "isinstance", is_instance),
        (torch, "is_tensor", is_tensor),
    ]
    for home in homes:
        for name, answer in (("type", type_of), ("hasattr", has_attribute), ("getattr", read)):
            asking += [(home, name, answer)] if name not in home else []
        asking += [(home, "print", tell)] if "print" not in home else []
        asking += [(home, name, is_tensor) for name, each in home.items() if each is _is_tensor]
    return asking


def _names_proxies(kinds: Any) -> bool:
    """Whether the question is about proxies and nodes themselves."""
    if _isinstance(kinds, tuple):
        return any(map(_names_proxies, kinds))
    if _isinstance(kinds, UnionType):
        return any(map(_names_proxies, kinds.__args__))
    return _isinstance(kinds, type) and issubclass(kinds, Proxy | Node)
