"""How a traced forward gets its arguments, and how containers of them are made anew.

torch.fx leaves out the decorators of forward, passes by position what is taken by name only, and
renames the inputs that are None, so that no caller could pass them by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.fx import Proxy, Tracer
from torch.fx.proxy import TraceError

from lean_fx.capture.example_inputs import Keywords, parameters_of
from lean_fx.capture.guards import check_absent, check_given
from lean_fx.capture.side_effects import SideEffect
from lean_fx.graph.reachable import NUMBERS

_PLAIN_CONTAINERS = ("builtins", "torch", "torch.fx.immutable_collections")


def absent_arguments(root: nn.Module, inputs: Sequence[Any]) -> dict[str, Any]:
    """The parameters of forward that are None, and the empty ``*args`` and ``**kwargs``.

    Args:
        root: the module.
        inputs: example inputs, if there are any.

    Raises:
        TraceError: there are inputs for ``*args`` or ``**kwargs``, or forward has only ``*args``.
    """
    parameters = list(inspect.signature(root.forward).parameters.values())
    by_name = bool(inputs) and isinstance(inputs[-1], Keywords)
    taking = (each.name for each in parameters_of(root.forward))
    given = dict(zip(taking, inputs, strict=False))
    absent: dict[str, Any] = {}
    for each in parameters:
        if each.kind is each.VAR_POSITIONAL:
            if by_name or len(inputs) > len(given) or len(parameters) == 1:
                raise TraceError(f"forward takes *{each.name}, a graph a fixed number of inputs")
            absent[f"*{each.name}"] = ()
        elif each.kind is each.VAR_KEYWORD:
            if by_name:
                raise TraceError(f"forward takes **{each.name}, a graph a fixed number of inputs")
            absent[f"**{each.name}"] = {}
        elif given.get(each.name, each.default) is None:
            absent[each.name] = None
    return absent


def called_by_position(wrapper: Callable[..., Any], bare: Callable[..., Any]) -> Any:
    """A forward that takes all its arguments by position, as torch.fx passes them.

    Args:
        wrapper: the forward, perhaps decorated.
        bare: the forward without decorators, which has the parameters.

    Example:
        >>> def forward(x, *, scale):
        ...     return x * scale
        >>> called_by_position(forward, forward)(2, 3)
        6
    """
    signature = inspect.signature(bare)
    behind = inspect.Parameter.VAR_POSITIONAL  # torch.fx has *args behind what is taken by name
    names = sorted(signature.parameters, key=lambda name: signature.parameters[name].kind == behind)

    def called(*args: Any) -> Any:
        given = dict(zip(names, args, strict=False))
        bound = inspect.BoundArguments(signature, given)
        return wrapper(*bound.args, **bound.kwargs)

    return called


def checked_arguments(tracer: Tracer, proxies: list[Any], absent: Mapping[str, Any]) -> list[Any]:
    """The arguments of a traced forward; the graph gets checks of the inputs that may be None.

    Args:
        tracer: it has made the placeholders.
        proxies: of the placeholders; an absent one is replaced by its value.
        absent: as :func:`absent_arguments`.
    """
    args = list(proxies)
    for place, each in enumerate(proxies):
        if not isinstance(each, Proxy):
            continue
        node, name = each.node, str(each.node.target)
        if node.args == (None,) and name not in absent:
            tracer.create_proxy("call_function", check_given, (each, name), {})
        if name not in absent:
            continue
        args[place] = absent[name]
        if name.startswith("*"):
            tracer.graph.erase_node(node)
        else:
            node.type = None  # generated code cannot hold every annotation
            tracer.create_proxy("call_function", check_absent, (each, name), {})
    return args


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
