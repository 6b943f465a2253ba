"""Record and restore the state that the forward of a module can reach.

That is the state in its attributes, in the globals that its code reads, in attributes of its class
and in closure variables, and whatever lists, dicts and objects there hold.
"""

from __future__ import annotations

import copyreg
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lean_fx.cloning import MODULE_ATTRIBUTES
from lean_fx.graph.containers import CONTAINERS, contents_of, refill
from lean_fx.graph.model_code import (
    ABSENT,
    LIBRARIES,
    functions_of,
    global_names_in,
    package_of,
    reached_from,
    value_of_cell,
)
from lean_fx.graph.versions import backup_of, version_of

NUMBERS = (bool, int, float, str)
_DEEPEST = 4  # what is deeper inside is not looked into
_MANY = 1000  # a longer container is data, not state


@dataclass(frozen=True)
class _Variable:
    """A variable outside a module.

    Attributes:
        path: of it, of no other.
        read: gives its value.
        assign: gives it another value.
    """

    path: str
    read: Callable[[], Any]
    assign: Callable[[Any], None]


@dataclass(frozen=True)
class Reachable:
    """What a module can reach at one time.

    Attributes:
        module: the module.
        held: the values, by path.
        versions: the versions of values that can change in place, by path (:func:`version_of`).
        holders: the dicts, lists and sets that hold the values, each with a copy.
        variables: those outside the module, each with its value.
        backups: functions that restore values outside the module that can change in place.
    """

    module: nn.Module
    held: dict[str, Any]
    versions: dict[str, Any]
    holders: list[tuple[Any, Any]]
    variables: list[tuple[_Variable, Any]]
    backups: list[Callable[[], Any]]

    @classmethod
    def of(cls, module: nn.Module, backup: bool = False) -> Reachable:
        """Record what a module can reach now; :meth:`restore` needs ``backup``."""
        with torch._C.DisableTorchFunction():  # else a trace would record what is asked here
            found = _found_by(module)
            versions = {path: version_of(value) for path, value in found.values.items()}
        copies = [(each, contents_of(each)) for each in found.holders]
        if not backup:
            return cls(module, found.values, versions, copies, [], [])
        variables = [(each, each.read()) for each in _variables_of(module)]
        return cls(module, found.values, versions, copies, variables, _backups(variables))

    def restore(self) -> None:
        """Restore what was recorded."""
        for variable, before in self.variables:
            if variable.read() is not before and type(before) not in CONTAINERS:
                variable.assign(before)
        for holder, contents in self.holders:
            refill(holder, contents)
        for put_back in self.backups:
            put_back()


@contextmanager
def leaving_state(root: nn.Module) -> Iterator[None]:
    """Restore on exit the globals and the like that the forward of a model can change."""
    kept = reachable_from(root)
    try:
        yield
    finally:
        for each in kept:
            each.restore()


def reachable_from(root: nn.Module) -> list[Reachable]:
    """Record what the user's own modules in a model can reach now."""
    own = [each for each in root.modules() if package_of(type(each)) not in LIBRARIES]
    return [Reachable.of(each, backup=True) for each in own]


def reachable_holders(module: nn.Module) -> list[Any]:
    """The dicts, lists, sets and the like that the forward of a module can reach."""
    return _found_by(module).holders


def holders_of_functions(functions: list[Any]) -> Iterator[Any]:
    """The objects that functions can write to: modules, dicts, lists and sets."""
    found = _Found()
    for function in reached_from(functions, object):
        home = function.__globals__
        named = [home[name] for name in global_names_in(function.__code__) if name in home]
        cells = [value_of_cell(cell) for cell in function.__closure__ or ()]
        for value in (*named, *cells, *(function.__defaults__ or ())):
            if isinstance(value, nn.Module):
                yield value
            elif not isinstance(value, FunctionType | ModuleType | type):
                found.add("", value)
    yield from found.holders


class _Found:
    """What variables hold.

    Attributes:
        values: the values, by path.
        holders: the dicts, lists, sets and the like that hold them.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.holders: list[Any] = []

    def add(self, path: str, value: Any) -> None:
        """Add the values that a variable holds, at most ``_MANY``: a table of tables is data."""
        self._add(path, value, frozenset(), len(self.values) + _MANY)

    def _add(self, path: str, value: Any, above: frozenset[int], most: int) -> None:
        """Add what is inside a value, or the value itself if that is nothing.

        Args:
            path: of the value.
            value: the value.
            above: the ids of what holds the value.
            most: how many values there may be.
        """
        if len(self.values) >= most:
            return
        before = len(self.values)
        if len(above) < _DEEPEST and id(value) not in above:
            holders, items = _inside(path, value)
            self.holders += holders
            for name, each in items:
                self._add(name, each, above | {id(value)}, most)
        if len(self.values) == before and not isinstance(value, CONTAINERS):
            self.values[path] = value


def _inside(path: str, value: Any) -> tuple[list[Any], list[tuple[str, Any]]]:
    """What holds the items or attributes of a value, and these by path; empty if it has none."""
    if version_of(value) is not None:
        return [], []
    if isinstance(value, CONTAINERS) and len(value) < _MANY:
        contents = contents_of(value)
        keyed: Iterable[tuple[Any, Any]] = enumerate(contents)
        if isinstance(value, dict):
            keyed = contents.items()
        elif isinstance(value, set):
            keyed = ((each, each) for each in contents)
        holders = [] if isinstance(value, tuple) else [value]
        return holders, [(f"{path}[{key!r}]", each) for key, each in keyed]
    if is_plain_object(value) or isinstance(value, FunctionType):
        holders = [vars(value)] if hasattr(value, "__dict__") else []
        return holders, [(f"{path}.{key}", each) for key, each in fields_of(value)]
    return [], []


def _found_by(module: nn.Module) -> _Found:
    """What a module can reach."""
    found = _Found()
    for key, value in vars(module).items():
        if key not in MODULE_ATTRIBUTES:
            found.add(key, value)
    for held in (module._buffers, module._parameters):
        found.holders.append(held)
        found.values.update(held)
    for variable in _variables_of(module):
        found.add(variable.path, variable.read())
    return found


def is_plain_object(value: Any) -> bool:
    """Whether a value is an object of a class of the user's, and no module."""
    kind = type(value)
    known = issubclass(kind, nn.Module | Tensor | type | Proxy | Enum | ModuleType | FunctionType)
    if known or package_of(kind) in LIBRARIES:
        return False
    return hasattr(value, "__dict__") or bool(_slots(kind))


def fields_of(value: Any) -> list[tuple[str, Any]]:
    """The attributes of an object, by name."""
    fields = [(name, getattr(value, name)) for name in _slots(type(value)) if hasattr(value, name)]
    return [*getattr(value, "__dict__", {}).items(), *fields]


def _slots(kind: type) -> list[str]:
    slots: list[str] = copyreg._slotnames(kind)  # type: ignore[attr-defined]
    return slots


def _backups(variables: list[tuple[_Variable, Any]]) -> list[Callable[[], Any]]:
    """Functions that restore the contents of variables outside a module."""
    found = _Found()
    for variable, value in variables:
        found.add(variable.path, value)
    return [each for value in found.values.values() if (each := backup_of(value))]


def _variables_of(module: nn.Module) -> Iterator[_Variable]:
    """The variables outside a module: globals that its code reads, class attributes, closures."""
    kind, seen = type(module), set()
    paths: Counter[str] = Counter()

    def variable(path: str, read: Callable[[], Any], assign: Callable[[Any], None]) -> _Variable:
        paths[path] += 1  # functools.wraps gives several functions one name
        return _Variable(f"{path} ({paths[path]})" if paths[path] > 1 else path, read, assign)

    for function in functions_of(module):
        home = function.__globals__
        for name in global_names_in(function.__code__):
            if (
                name in home
                and (id(home), name) not in seen
                and _may_be_state(home[name], function)
            ):
                seen.add((id(home), name))
                path = f"{home['__name__']}.{name}"
                yield variable(path, partial(home.get, name), partial(home.__setitem__, name))
        for place, value in enumerate(function.__defaults__ or ()):
            if isinstance(value, CONTAINERS):  # a mutable default lives on
                path = f"{function.__qualname__}.default_{place}"
                yield variable(path, partial(_same, value), _same)
        free = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in free:
            value = value_of_cell(cell)
            if value is not ABSENT and _may_be_state(value, function):
                path = f"{function.__qualname__}.{name}"
                assign = partial(setattr, cell, "cell_contents")
                yield variable(path, partial(value_of_cell, cell), assign)
    for base in reversed(kind.__mro__):  # what a subclass holds counts
        if package_of(base) in LIBRARIES:
            continue
        for name, value in list(vars(base).items()):
            if not name.startswith("__") and _may_be_state(value, base):
                path = f"{base.__qualname__}.{name}"
                yield variable(path, partial(vars(base).get, name), partial(setattr, base, name))


def _same(value: Any) -> Any:
    return value


def _may_be_state(value: Any, user: Any) -> bool:
    """Whether a variable of the user's holds numbers or tensors, or something that may."""
    kind = type(value)
    if issubclass(kind, Proxy | Tensor) or value is None or kind in NUMBERS:
        return True
    if isinstance(value, CONTAINERS) or version_of(value) is not None:
        return True
    if isinstance(value, FunctionType):
        return not isinstance(user, type) and package_of(value) == package_of(user)
    known = isinstance(value, ModuleType | type | property | staticmethod | classmethod)
    return not known and is_plain_object(value) and package_of(kind) == package_of(user)
