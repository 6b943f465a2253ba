"""Record which attributes a forward reads, and parameters that it does not read by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from lean_fx.capture.proxies import LEARNING
from lean_fx.capture.questions import asked_by_model
from lean_fx.capture.side_effects import SideEffect
from lean_fx.cloning import MODULE_ATTRIBUTES
from lean_fx.graph.calls import META_ATTRIBUTES, META_METHODS
from lean_fx.graph.parts import NO_ATTRIBUTE, OBJECT
from lean_fx.graph.reachable import is_plain_object

if TYPE_CHECKING:
    from lean_fx.capture.tracing import LeanTracer

_PLAIN = (bool, int, float, str, type(None), range, slice, frozenset)
_MANY = 100  # more are data
_FUNCTIONS = (FunctionType, BuiltinFunctionType)
_INTERNALS = MODULE_ATTRIBUTES - {"training"}
_ASKING = META_METHODS | {"data_ptr", "register_hook", "__hash__"}
#: What the class of a watched module defines itself.
_OWN = frozenset(("__getattribute__", "__getattr__", "__module__", "__qualname__", "__doc__"))
#: What has been read of the modules that are being watched, by id.
_READS: dict[int, dict[str, Any]] = {}
_WATCHED: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class AttributeReads:
    """The numbers, strings, functions, Nones and lists of these that a forward reads of modules.

    An attribute that forward asks for and that is missing counts too.
    """

    def __init__(self) -> None:
        self._read: dict[int, dict[str, Any]] = {}

    def by_name(self, root: nn.Module) -> dict[str, dict[str, Any]]:
        """What has been read of each module: the attributes with the values of the first reads."""
        found = {name: self._read.get(id(module)) for name, module in root.named_modules()}
        return {name: read for name, read in found.items() if read}

    @contextmanager
    def watching(self, modules: list[nn.Module]) -> Iterator[None]:
        """Watch modules; within the context each has a subclass of its own class."""
        kinds = [type(module) for module in modules]
        for module, kind in zip(modules, kinds, strict=True):
            _READS[id(module)] = self._read.setdefault(id(module), {})
            module.__class__ = _watched(kind)
        try:
            yield
        finally:
            for module, kind in zip(modules, kinds, strict=True):
                module.__class__ = kind
                del _READS[id(module)]
            for kind in set(kinds):  # forward may have set attributes of its class
                for name in vars(_watched(kind)).keys() - _OWN:
                    delattr(_watched(kind), name)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Enum) or type(value).__module__ == "numpy":
        return not hasattr(type(value), "__setitem__")  # scalars, and no arrays
    if type(value) in (tuple, list):
        return len(value) < _MANY and all(map(_is_plain, value))
    if type(value) is dict:
        return len(value) < _MANY and all(map(_is_plain, value.values()))
    return type(value) in _PLAIN


def _watched(kind: Any) -> Any:
    if kind not in _WATCHED:

        def read(self: Any, name: str) -> Any:
            value = kind.__getattribute__(self, name)
            if id(self) in _READS and not name.startswith("__") and name not in _INTERNALS:
                held = name in object.__getattribute__(self, "__dict__")
                if _is_plain(value) or (held and type(value) in _FUNCTIONS):
                    _READS[id(self)].setdefault(name, value)
                elif held and is_plain_object(value):
                    _READS[id(self)].setdefault(name, OBJECT)
            elif name == "__dict__" and id(self) in _READS and _asked_by_forward():
                raise SideEffect("forward reads the __dict__ of a module")
            return value

        def read_held(self: Any, name: str) -> Any:  # a parameter, buffer or module, or nothing
            value = NO_ATTRIBUTE
            try:
                value = kind.__getattr__(self, name)
            finally:
                asked = id(self) in _READS and _asked_by_model()
                if asked and (value is None or value is NO_ATTRIBUTE):
                    _READS[id(self)].setdefault(name, value)
            if asked and value is not None and (_is_plain(value) or is_plain_object(value)):
                raise SideEffect(f"forward reads {name}, which __getattr__ computes")
            return value

        body = {"__getattribute__": read, "__getattr__": read_held, "__module__": kind.__module__}
        body["__qualname__"] = kind.__qualname__
        _WATCHED[kind] = type(kind.__name__, (kind,), body)
    return _WATCHED[kind]


def _asked_by_model() -> bool:
    """Whether the model's code reads the attribute, perhaps by hasattr or getattr."""
    answers = sys._getframe(2).f_globals.get("__name__") == "lean_fx.capture.questions"
    return asked_by_model(3 if answers else 2)


def _asked_by_forward() -> bool:
    """Whether the model's code reads the attribute, and not to answer for another attribute."""
    return asked_by_model(2) and sys._getframe(2).f_code.co_name != "__getattr__"


class ParameterReads(TorchFunctionMode):
    """Turns parameters and buffers that reach a function of torch into nodes.

    ``sum(p.norm() for p in self.parameters())`` does not read them by name, so the tracer does not
    see the reads.

    Args:
        tracer: knows the names.
    """

    def __init__(self, tracer: LeanTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        getter = getattr(getattr(func, "__self__", None), "__name__", "")
        asking = name in _ASKING or (
            name in ("__get__", "__set__") and getter in META_ATTRIBUTES | LEARNING
        )
        learning = name == "__get__" and getter in LEARNING
        if learning and not self._tracer.computing and asked_by_model(1):
            raise SideEffect(f"forward asks for {getter} of a parameter")
        if asking or self._tracer.computing or not self._known((args, kwargs)):
            return func(*args, **kwargs)
        args, kwargs = self._proxies(args), self._proxies(kwargs)
        if name == "__get__":
            return getattr(args[0], getter)
        if is_tensor_method_or_property(func):
            return self._tracer.create_proxy("call_method", name, args, kwargs)
        return self._tracer.create_proxy("call_function", func, args, kwargs)

    def _known(self, value: Any) -> bool:
        if type(value) in (tuple, list):
            return any(map(self._known, value))
        if type(value) is dict:
            return any(map(self._known, value.values()))
        return self._tracer.is_held(value)

    def _proxies(self, value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(map(self._proxies, value))
        if type(value) is dict:
            return {key: self._proxies(each) for key, each in value.items()}
        return self._tracer.proxy_of(value) if self._known(value) else value
