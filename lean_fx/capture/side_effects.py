"""Effects of a forward that a graph does not record. A module that has one is not traced.

torch.fx records calls on values. It does not see that a forward

1. computes a value without a gradient (``torch.no_grad()``), or gives it another one by a
   ``torch.autograd.Function``, or recomputes it for the backward (gradient checkpointing);
2. turns autocast on or off around a call, or asks whether it or gradients are on;
3. draws random numbers in Python, or in torch for something other than a value of the graph: the
   graph would keep the numbers of the trace;
4. keeps state for later calls: assigns a buffer, a tensor or its ``data``, counts
   (``self.step += 1``), or stores values in an attribute, list, dict, object or global that it has
   read before.

A cache is not state: an attribute that is None at first and is filled with what follows from sizes
and parameters only. An attribute that forward writes and never reads is not state either; a
captured model does not have it.
"""

from __future__ import annotations

import random
import re
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._functorch import utils
from torch.fx import Node, Proxy
from torch.fx.proxy import TraceError
from torch.utils import checkpoint

_SIZES = ("shape", "dtype", "device", "ndim", "size", "dim", "numel")
_QUESTIONS = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled")
_NUMBERS = (bool, int, float, str)
_CONTAINERS = (list, tuple, dict, deque)
_MANY = 1000  # a longer container is data, not state
_ABSENT = object()
_ATTRIBUTE = re.compile(r"\w+")
_INTERNALS = frozenset(vars(nn.Module()))
_LIBRARIES = ("None", "torch", "builtins", "lean_fx", "numpy", "collections", "functools")
_NAMES: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()


class SideEffect(TraceError):  # noqa: N818
    """A forward does what a graph would lose."""


def autocasting() -> tuple[Any, ...]:
    """What autocast does now."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)


def has_gradient(
    node: Node, root: nn.Module, parameters: Mapping[str, nn.Parameter], known: set[Node]
) -> bool:
    """Whether parameters that learn have a part in a value.

    Args:
        node: what gives it.
        root: the model that is traced.
        parameters: those of the model, by name.
        known: the nodes before it of which this holds.
    """
    if node.op == "get_attr":
        parameter = parameters.get(str(node.target))
        return parameter is not None and parameter.requires_grad
    if node.op == "call_module":
        held = root.get_submodule(str(node.target)).parameters()
        if any(each.requires_grad for each in held):
            return True
    asked = node.args[1] if node.target is getattr else node.target
    return asked not in _SIZES and any(source in known for source in node.all_input_nodes)


@contextmanager
def refusing_functions() -> Iterator[None]:
    """Refuse, while a model is traced, the functions of torch whose effect a graph would lose.

    - A torch.autograd.Function on a proxy: its own gradient would be lost. (All of them unwrap
      their arguments first by one function of torch, even if a model calls ``apply`` by another
      name.)
    - Gradient checkpointing: the values that it drops would be kept.
    - Questions about gradients, inference mode and autocast: the answers would be frozen.

    Raises:
        SideEffect: a model's code calls one of them.
    """
    unwrap = utils.unwrap_dead_wrappers

    def refuse(args: tuple[Any, ...]) -> Any:
        if any(issubclass(type(each), Proxy) for each in args):
            raise SideEffect("a torch.autograd.Function has a gradient of its own")
        return unwrap(args)

    def checkpointing(*_: Any, **__: Any) -> Any:
        raise SideEffect("gradient checkpointing would be lost")

    def refused(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.partition(".")[0] not in ("torch", "lean_fx"):
                raise SideEffect(f"forward asks torch.{name}")
            return function(*args, **kwargs)

        return asked

    patches: list[tuple[Any, str, Any]] = [
        (utils, "unwrap_dead_wrappers", refuse),
        (checkpoint, "_checkpoint_without_reentrant_generator", checkpointing),
        *((torch, name, refused(name, getattr(torch, name))) for name in _QUESTIONS),
    ]
    before = [getattr(home, name) for home, name, _ in patches]
    try:
        for home, name, patched in patches:
            setattr(home, name, patched)
        yield
    finally:
        for (home, name, _), original in zip(patches, before, strict=True):
            setattr(home, name, original)


class KeepsData(Proxy):
    """A proxy to whose ``data`` nothing can be assigned."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            raise SideEffect(f"the data of {self.node.name} is assigned in forward")
        super().__setattr__(name, value)


@dataclass(frozen=True)
class StateSnapshot:
    """The state that a forward may change, before it runs.

    Attributes:
        held: everything that the module holds besides submodules, by its path: attributes, and
            what is inside lists, dicts and objects; and the globals that its class reads.
        rng_states: of torch's generator of random numbers, and of Python's; or None, where the
            code around the module checks them.
    """

    held: dict[str, Any]
    rng_states: tuple[Tensor, Any] | None

    @classmethod
    def of(cls, module: nn.Module, *, rng_states: bool = True) -> StateSnapshot:
        """The state of a module."""
        return cls(_state_of(module), _rng_states() if rng_states else None)

    def check(self, module: nn.Module, read_as_none: Collection[str] = ()) -> None:
        """Check, after its forward, that a module has no state for later calls.

        Args:
            module: the module.
            read_as_none: the attributes that forward has read while they were None.

        Raises:
            SideEffect: it has.
        """
        name, now = type(module).__name__, _state_of(module)
        for path, value in now.items():
            before = self.held.get(path, _ABSENT)
            if before is value:
                continue
            attribute = _ATTRIBUTE.match(path)
            own = attribute is not None and attribute.end() == len(path)
            if before is _ABSENT and own:  # forward has made it, and so has not read it before
                continue
            if issubclass(type(value), Proxy):
                kept = isinstance(before, Tensor) or _depends_on_values(value.node)
                if kept and (before is not None or not own or path in read_as_none):
                    raise SideEffect(f"{name} assigns {path!r} in forward")
            elif before is _ABSENT or (type(before) in _NUMBERS and before != value):
                raise SideEffect(f"{name} changes {path!r} in forward")
        for path in self.held.keys() - now.keys():
            if not any(each.startswith((f"{path}.", f"{path}[")) for each in now):
                raise SideEffect(f"{name} changes {path!r} in forward")
        if self.rng_states is None:
            return
        (drawn, others), (state, rest) = self.rng_states, _rng_states()
        with torch._C.DisableTorchFunction():
            same = torch.equal(drawn, state)
        if not same or others != rest:
            raise SideEffect(f"{name} draws random numbers that are not values of the graph")


def _state_of(module: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in vars(module).items():
        if key not in _INTERNALS:
            _add(found, key, value, set())
    for key, value in (*module._buffers.items(), *module._parameters.items()):
        found[key] = value
    names = _names_read(type(module))
    for home in globals_of(type(module)):
        for name in names & home.keys():
            if isinstance(home[name], _CONTAINERS) or home[name] is None:
                _add(found, f"{home['__name__']}.{name}", home[name], set())
    return found


def _add(found: dict[str, Any], path: str, value: Any, above: set[int]) -> None:
    """Add what a value holds, or the value itself if it holds nothing."""
    items: Iterable[tuple[str, Any]] = ()
    if len(above) < 4 and id(value) not in above:
        if isinstance(value, list | tuple | deque) and len(value) < _MANY:
            items = ((f"{path}[{index}]", each) for index, each in enumerate(value))
        elif isinstance(value, dict) and len(value) < _MANY:
            items = [(f"{path}[{key!r}]", each) for key, each in value.items()]
        elif _is_plain_object(value):
            items = [(f"{path}.{key}", each) for key, each in vars(value).items()]
    count = len(found)
    for name, each in items:
        _add(found, name, each, above | {id(value)})
    if len(found) == count and not isinstance(value, _CONTAINERS):
        found[path] = value


def _is_plain_object(value: Any) -> bool:
    """Whether a value is an instance of a class of the user's own, neither a module nor a type."""
    kind = type(value)
    known = issubclass(kind, nn.Module | Tensor | type | Proxy | Enum) or callable(value)
    home = kind.__module__.partition(".")[0]
    return not known and hasattr(value, "__dict__") and home not in _LIBRARIES


def _names_read(kind: type) -> frozenset[str]:
    """The names that the functions of a class read, of those that are not torch's."""
    if kind not in _NAMES:
        _NAMES[kind] = frozenset(
            name for function in _functions_of(kind) for name in function.__code__.co_names
        )
    return _NAMES[kind]


def globals_of(kind: type) -> list[dict[str, Any]]:
    """The globals of the methods of a class that no library has written."""
    return list({id(f.__globals__): f.__globals__ for f in _functions_of(kind)}.values())


def _functions_of(kind: type) -> list[FunctionType]:
    """The methods of a class that no library has written."""
    found = (each for base in kind.__mro__ for each in vars(base).values())
    functions = [each for each in found if isinstance(each, FunctionType)]
    return [each for each in functions if str(each.__module__).partition(".")[0] not in _LIBRARIES]


def _depends_on_values(node: Node) -> bool:
    """Whether a value of the model's inputs leads to a node by more than its size or type."""
    todo, seen = [node], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder":
            return True
        asked = node.args[1] if node.target is getattr else node.target
        if asked not in _SIZES:
            todo += node.all_input_nodes
    return False


def keep(module: nn.Module) -> Callable[[], None]:
    """Note what a module, and those in it, hold before a forward on proxies.

    Returns:
        What puts it back.
    """
    dicts = [
        held
        for each in module.modules()
        for held in (vars(each), each._buffers, each._parameters, each._modules)
    ]
    kept = [(held, dict(held)) for held in dicts]

    def restore() -> None:
        for held, before in kept:
            held.clear()
            held.update(before)

    return restore


def _rng_states() -> tuple[Tensor, Any]:
    numpy = sys.modules.get("numpy")
    state, place = numpy.random.get_state()[1:3] if numpy else (None, 0)
    drawn = None if state is None else state.tobytes()
    return torch.default_generator.get_state(), (random.getstate(), drawn, place)


@contextmanager
def keeping_rng_state() -> Iterator[None]:
    """Within it, random numbers may be drawn: their generators are put back in the end."""
    (state, _), ours = _rng_states(), random.getstate()
    numpy = sys.modules.get("numpy")
    theirs = numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
        random.setstate(ours)
        if numpy:
            numpy.random.set_state(theirs)
