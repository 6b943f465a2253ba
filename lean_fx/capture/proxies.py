"""The proxies that the code of a model meets during a trace.

A proxy without a value refuses what would need one. A proxy of a known value answers what Python
asks of it, or passes it on to the tracer.
"""

from __future__ import annotations

import dis
import functools
import inspect
import operator
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Node, Proxy
from torch.fx.proxy import Attribute, ParameterProxy, TraceError

from lean_fx.capture.guards import round_number
from lean_fx.capture.in_place import AugmentedAssignments
from lean_fx.capture.questions import asked_by_model
from lean_fx.capture.side_effects import SideEffect

if TYPE_CHECKING:
    from lean_fx.capture.answers import AnsweringTracer

#: Attributes that tell whether a value has a gradient.
LEARNING = frozenset(("requires_grad", "is_leaf", "grad_fn"))
#: Stands for a value that is not known.
UNKNOWN = object()
#: The key under which a node records whether its value follows only from the parameters.
FIXED = "lean_fx.fixed"
#: The key under which a node has its value for the example inputs, during a trace.
VALUE = "lean_fx.value"


class UnknownKeyError(TraceError, TypeError):
    """A dictionary or set is asked for a value that the trace does not know."""


class _UnknownProxy(AugmentedAssignments):
    """A proxy that the model's code may neither look up nor make a string."""

    def __hash__(self) -> int:
        if asked_by_model(1):
            raise UnknownKeyError(
                f"{self.node.name} is looked up, which example_inputs would allow"
            )
        return object.__hash__(self)

    def __str__(self) -> str:
        if asked_by_model(1):
            raise TraceError(f"{self.node.name} is made a string, which example_inputs would allow")
        return repr(self)

    def __format__(self, spec: str) -> str:  # torch._assert formats messages that no one reads
        return super().__format__(spec) if spec else repr(self)


class KeepsData(_UnknownProxy):
    """A proxy that refuses an assignment to ``data`` and questions about its gradient."""

    def __getattr__(self, k: str) -> Any:
        if k in LEARNING:
            raise SideEffect(f"forward asks for {k} of {self.node.name}")
        return KeyedAttribute(self, k)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            raise SideEffect(f"the data of {self.node.name} is assigned in forward")
        super().__setattr__(name, value)


class KeyedAttribute(_UnknownProxy, Attribute):
    """An attribute of a proxy, which may be a view, and refuses to be a key as the proxy does."""


class WeightProxy(KeepsData, ParameterProxy):
    """torch.fx's proxy of a parameter, which lacks ``size(0)``."""

    def size(self, dim: int | None = None) -> Any:
        """As the parameter's."""
        return self.param.size() if dim is None else self.param.size(dim)


def value_of(node: Node) -> Any:
    """The value of a node for the example inputs, during a trace; UNKNOWN if it has none."""
    return node.meta.get(VALUE, UNKNOWN)


class ValueProxy(KeepsData):
    """A proxy of a known value without items."""

    tracer: AnsweringTracer
    __iter__: Any = None  # it is not a collections.abc.Iterable
    __len__: Any = None

    def __getattr__(self, k: str) -> Any:
        value = value_of(self.node)
        if k in LEARNING or value is UNKNOWN:  # the latter after the trace
            return super().__getattr__(k)
        if isinstance(value, Tensor) and k in ("ndim", "dim", "ndimension"):
            axes = functools.partial(self.tracer.count_axes, self)
            return axes() if k == "ndim" else axes
        with torch._C.DisableTorchFunction():
            found = getattr(value, k)
        if k == "_is_param":
            return found
        if callable(found) and not isinstance(found, type | nn.Module):
            return lambda *args, **kwargs: self.tracer.create_proxy(
                "call_method", k, (self, *args), kwargs
            )
        return self.tracer.create_proxy("call_function", getattr, (self, k), {})

    def augment(self, other: Any, function: Callable[[Any, Any], Any]) -> Any:
        """As the base class, but numbers, strings and tuples are immutable."""
        immutable = isinstance(value_of(self.node), int | float | str | tuple)
        return function(self, other) if immutable else super().augment(other, function)

    def __int__(self) -> int:
        return int(self.tracer.decide(self, int))

    def __index__(self) -> int:
        return int(self.tracer.decide(self, operator.index))

    def __float__(self) -> float:
        return float(self.tracer.decide(self, float))

    def __round__(self, digits: int | None = None) -> Any:
        return round_number(self, digits)

    def __str__(self) -> str:
        known = value_of(self.node) is not UNKNOWN
        return str(self.tracer.decide(self, str)) if known and asked_by_model(1) else repr(self)

    def __hash__(self) -> int:
        value = value_of(self.node)
        if value is UNKNOWN or isinstance(value, Tensor):
            return object.__hash__(self)
        if not self.tracer.may_look_up(sys._getframe(1)):
            raise UnknownKeyError(f"{self.node.name} is looked up by code that may keep it")
        return hash(self.tracer.decide(self, lambda each: each))

    def __deepcopy__(self, memo: dict[int, Any]) -> Proxy:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_method", "__setitem__", (self, key, value), {})


class ItemsProxy(ValueProxy):
    """A proxy of a known value with items, such as a tensor or a dict."""

    def __getattr__(self, k: str) -> Any:
        value = value_of(self.node)
        if isinstance(value, dict) and k in ("keys", "values", "items"):
            self.tracer.check_keys(self)
            return getattr({key: operator.getitem(self, key) for key in value}, k)
        if isinstance(value, dict) and k == "get":
            return functools.partial(_item, self)
        return super().__getattr__(k)

    def __contains__(self, key: Any) -> bool:
        if isinstance(value_of(self.node), dict):
            return self.tracer.holds(self, key)
        return any(bool(each == key) for each in self)

    def __iter__(self) -> Iterator[Any]:
        frame = inspect.currentframe()
        caller = frame.f_back if frame else None
        counted = caller is None or not _unpacks(caller)  # unpacking checks the count itself
        if isinstance(value_of(self.node), dict):
            self.tracer.check_keys(self)
            return iter(value_of(self.node))
        places = range(self.tracer.count(self, counted))
        return iter([operator.getitem(self, place) for place in places])

    def __len__(self) -> int:
        return self.tracer.count(self)


def _item(items: ItemsProxy, key: Any, default: Any = None) -> Any:
    """``dict.get``; the graph checks whether the key is there."""
    return operator.getitem(items, key) if key in items else default


def _unpacks(frame: FrameType) -> bool:
    """Whether a frame is about to unpack something into a known number of names."""
    return bool(dis.opname[frame.f_code.co_code[frame.f_lasti]] == "UNPACK_SEQUENCE")
