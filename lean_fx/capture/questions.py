"""Replacements for ``isinstance``, ``hasattr``, ``getattr``, ``type`` and the like during a trace.

``isinstance(x, torch.Tensor)`` is false for a proxy. A tracer with values
(:mod:`lean_fx.capture.answers`) answers for the value that the proxy stands for, and adds a check
to the graph; a tracer without values raises. ``int`` and ``float`` of a size become nodes.
The proxy itself must not claim to be a tensor: torch's C++ code would believe it.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterable
from types import FrameType, FunctionType, UnionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node, Proxy, Tracer
from torch.fx.proxy import TraceError

from lean_fx.capture.in_place import is_size
from lean_fx.graph.model_code import functions_of, is_users_code, only_calls
from lean_fx.graph.patching import Patch

_isinstance, _is_tensor = isinstance, torch.is_tensor
_SOME_TENSOR = torch.empty(0)


def asked_by_model(depth: int) -> bool:
    """Whether a function was called by a model's code rather than by torch or this package.

    Args:
        depth: how many frames the call is above the caller of this function.
    """
    return is_users_code(str(sys._getframe(depth + 1).f_globals.get("__name__")))


class AskedTracer(Tracer):
    """A tracer that the model's code asks about values; it does not know them, a subclass may."""

    def __init__(self, autowrap_functions: tuple[Callable[..., Any], ...]) -> None:
        super().__init__(autowrap_functions=autowrap_functions)
        self.held: dict[str, Tensor] = {}  # the parameters and buffers of the model, by name
        self.homes: set[int] = set()  # the ids of the globals of the model's code

    def is_instance(self, proxy: Proxy, kinds: Any, by_model: bool) -> bool | None:
        """Whether a value is an instance of some types; None leaves the answer to Python.

        Raises:
            TraceError: the model's own code asks, and the value is not known.
        """
        if by_model and proxy.node.op == "get_attr":
            return _isinstance(self.held.get(str(proxy.node.target), _SOME_TENSOR), kinds)
        if by_model:
            raise TraceError(
                "forward asks for the type of a value, which example_inputs would tell"
            )
        return None

    def has_attribute(self, proxy: Proxy, name: str) -> bool:
        """Whether a value has an attribute.

        Raises:
            TraceError: the value is not known.
        """
        raise TraceError(
            f"forward asks whether a value has {name}, which example_inputs would tell"
        )

    def type_of(self, proxy: Proxy) -> type:
        """The type of a value.

        Raises:
            TraceError: the value is not known.
        """
        raise TraceError("forward asks for the type of a value, which example_inputs would tell")

    def may_look_up(self, frame: FrameType) -> bool:
        """Whether the code of a frame may use a known number as a key of a dictionary or cache.

        The model's own code may, since its caches are off during the trace. A cache of another
        package would keep the proxy, and hand it to the model later.
        """
        home = frame.f_globals
        return not is_users_code(str(home.get("__name__"))) or id(home) in self.homes


def answering(tracer: AskedTracer, homes: Iterable[dict[str, Any]]) -> list[Patch]:
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

    answers = {"type": type_of, "hasattr": has_attribute, "getattr": read, "print": tell}
    asking: list[Patch] = [
        (builtins, "isinstance", is_instance),
        (torch, "is_tensor", is_tensor),
    ]
    for home in homes:
        asking += [(home, name, answer) for name, answer in answers.items() if name not in home]
        asking += [(home, name, is_tensor) for name, each in home.items() if each is _is_tensor]
    return asking


class Converting:
    """Replaces ``int`` or ``float`` in the code of a model: a size becomes a node.

    Args:
        kind: the builtin.
        as_node: a function of torch that converts as it does.

    Example:
        >>> Converting(int, torch.sym_int)("7")
        7
    """

    def __init__(self, kind: type, as_node: Callable[[Any], Any]) -> None:
        self.kind = kind
        self.as_node = as_node

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Convert a value."""
        size = len(args) == 1 and issubclass(type(args[0]), Proxy) and is_size(args[0].node)
        return self.as_node(args[0]) if size else self.kind(*args, **options)


def converting_sizes(modules: Iterable[nn.Module]) -> list[Patch]:
    """Patches that replace ``int`` and ``float`` by :class:`Converting` in the modules' code.

    Otherwise ``int(x.size(0))`` would be a constant, since Python takes no proxy for an int. Code
    that does more than call them, such as ``isinstance(x, int)``, keeps the builtins.
    """
    users: dict[int, list[FunctionType]] = {}
    for function in (each for module in modules for each in functions_of(module)):
        users.setdefault(id(function.__globals__), []).append(function)
    return [
        (functions[0].__globals__, name, Converting(kind, as_node))
        for functions in users.values()
        for name, kind, as_node in (("int", int, torch.sym_int), ("float", float, torch.sym_float))
        if name not in functions[0].__globals__
        and all(only_calls(each.__code__, name) for each in functions)
    ]


def _names_proxies(kinds: Any) -> bool:
    """Whether the question is about proxies and nodes themselves."""
    if _isinstance(kinds, tuple):
        return any(map(_names_proxies, kinds))
    if _isinstance(kinds, UnionType):
        return any(map(_names_proxies, kinds.__args__))
    return _isinstance(kinds, type) and issubclass(kinds, Proxy | Node)
