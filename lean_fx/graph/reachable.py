"""What the forward of a module can reach besides its inputs and submodules, and putting it back.

That is what is in its attributes; the globals that its code reads, attributes of its class, and
variables of functions around it; and what lists, dicts and objects there hold.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache, partial
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

NUMBERS = (bool, int, float, str)
_CONTAINERS = (list, tuple, dict, deque, set)
_MANY = 1000  # a longer container is data, not state
_ABSENT = object()
_INTERNALS = frozenset(vars(nn.Module()))
_LIBRARIES = ("None", "torch", "builtins", "lean_fx", "numpy", "collections", "functools")

#: A variable outside of a module: its path, its value, and what assigns another one.
_Variable = tuple[str, Any, Callable[[Any], None]]


@dataclass(frozen=True)
class Reachable:
    """What a module can reach at a time.

    Attributes:
        module: the module.
        held: everything, by its path.
        holders: the dicts, lists and sets that hold it, each with a copy.
    """

    module: nn.Module
    held: dict[str, Any]
    holders: list[tuple[Any, Any]]

    @classmethod
    def of(cls, module: nn.Module) -> Reachable:
        """What a module can reach now."""
        holders: list[Any] = []
        held = _held_by(module, holders)
        return cls(module, held, [(each, _contents(each)) for each in holders])

    def restore(self) -> None:
        """Put it back."""
        for path, value, assign in _variables_of(self.module):
            before = self.held.get(path, value)
            if before is not value and type(before) not in _CONTAINERS:
                assign(before)
        for holder, contents in self.holders:
            refill(holder, contents)


@contextmanager
def leaving_state(root: nn.Module) -> Iterator[None]:
    """Within it the forward of a copy of a model may run: globals and the like are put back."""
    kept = reachable_from(root)
    try:
        yield
    finally:
        for each in kept:
            each.restore()


def reachable_from(root: nn.Module) -> list[Reachable]:
    """What the modules of a model that no library has written can reach now."""
    own = [each for each in root.modules() if _home(type(each)) not in _LIBRARIES]
    return [Reachable.of(each) for each in own]


def globals_of(kind: type) -> list[dict[str, Any]]:
    """The globals that the forward of a class, and what it calls, may read."""
    return list({id(each.__globals__): each.__globals__ for each in _functions_of(kind)}.values())


def _held_by(module: nn.Module, holders: list[Any]) -> dict[str, Any]:
    """What a module can reach, by its path; ``holders`` get what holds it."""
    found: dict[str, Any] = {}
    for key, value in vars(module).items():
        if key not in _INTERNALS:
            _add(found, holders, key, value, set())
    for held in (module._buffers, module._parameters):
        holders.append(held)
        found.update(held)
    for path, value, _ in _variables_of(module):
        _add(found, holders, path, value, set())
    return found


def _add(found: dict[str, Any], holders: list[Any], path: str, value: Any, above: set[int]) -> None:
    """Add what a value holds, or the value itself if it holds nothing."""
    items: Iterable[tuple[str, Any]] = ()
    if len(above) < 4 and id(value) not in above:
        if isinstance(value, list | tuple | deque) and len(value) < _MANY:
            items = ((f"{path}[{index}]", each) for index, each in enumerate(value))
        elif isinstance(value, dict) and len(value) < _MANY:
            items = [(f"{path}[{key!r}]", each) for key, each in value.items()]
        elif isinstance(value, set) and len(value) < _MANY:
            items = [(f"{path}[{each!r}]", each) for each in value]
        elif _is_plain_object(value):
            items = [(f"{path}.{key}", each) for key, each in vars(value).items()]
            holders.append(vars(value))
        if isinstance(value, list | deque | dict | set) and len(value) < _MANY:
            holders.append(value)
    count = len(found)
    for name, each in items:
        _add(found, holders, name, each, above | {id(value)})
    if len(found) == count and not isinstance(value, _CONTAINERS):
        found[path] = value


def _contents(holder: Any) -> Any:
    return dict(holder) if isinstance(holder, dict) else list(holder)


def refill(holder: Any, contents: Any) -> None:
    """Give a dict, list or set the contents that it had, if it has others.

    Another thread may read one that has not changed, and must not find it empty.
    """
    if _is_as_before(_contents(holder), contents):
        return
    if isinstance(holder, dict | set):
        holder.clear()
        holder.update(contents)
    elif isinstance(holder, deque):
        holder.clear()
        holder.extend(contents)
    else:
        holder[:] = contents


def _is_as_before(now: Any, before: Any) -> bool:
    mine, their = (
        [*each, *each.values()] if isinstance(each, dict) else each for each in (now, before)
    )
    return len(mine) == len(their) and all(map(operator.is_, mine, their))


def _is_plain_object(value: Any) -> bool:
    """Whether a value is an instance of a class of the user's own, neither a module nor a type."""
    kind = type(value)
    known = issubclass(kind, nn.Module | Tensor | type | Proxy | Enum) or callable(value)
    return not known and hasattr(value, "__dict__") and _home(kind) not in _LIBRARIES


def _home(named: Any) -> str:
    return str(named.__module__).partition(".")[0]


# What the functions of a module can reach besides the module.


def _variables_of(module: nn.Module) -> Iterator[_Variable]:
    """The globals that the code of a module reads, its classes' attributes, its closures."""
    kind: Any = type(module)
    own = [each for each in vars(module).values() if isinstance(each, FunctionType)]
    functions = dict.fromkeys((*_functions_of(kind), *(_reached_from(own, kind) if own else ())))
    seen = set()
    for function in functions:
        home = function.__globals__
        for name in _names_in(function.__code__):
            if (
                name in home
                and (id(home), name) not in seen
                and _may_be_state(home[name], function)
            ):
                seen.add((id(home), name))
                yield f"{home['__name__']}.{name}", home[name], partial(home.__setitem__, name)
        for place, value in enumerate(function.__defaults__ or ()):
            if isinstance(value, _CONTAINERS):  # a mutable default lives on
                yield f"{function.__qualname__}.default_{place}", value, lambda _: None
        free = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in free:
            value = _value_of(cell)
            if value is not _ABSENT and _may_be_state(value, function):
                yield (
                    f"{function.__qualname__}.{name}",
                    value,
                    partial(setattr, cell, "cell_contents"),
                )
    for base in reversed(kind.__mro__):  # what a subclass holds counts
        if _home(base) in _LIBRARIES:
            continue
        for name, value in list(vars(base).items()):
            if not name.startswith("__") and _may_be_state(value, base):
                yield f"{base.__qualname__}.{name}", value, partial(setattr, base, name)


def _value_of(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return _ABSENT


def _may_be_state(value: Any, user: Any) -> bool:
    """Whether a variable holds numbers, values, or what holds some, and is the user's own."""
    kind = type(value)
    if issubclass(kind, Proxy | Tensor) or value is None or kind in NUMBERS:
        return True
    if isinstance(value, _CONTAINERS):
        return True
    known = isinstance(value, ModuleType | type | property | staticmethod | classmethod)
    return not known and _is_plain_object(value) and _home(kind) == _home(user)


def names_in_forward(kind: type) -> set[str]:
    """The names that the forward of a class uses, in methods and functions that it calls too."""
    return set().union(*(_names_in(each.__code__) for each in _functions_of(kind)))


@lru_cache(maxsize=256)
def _functions_of(kind: Any) -> tuple[FunctionType, ...]:
    """The forward of a class, and the methods and functions of the same package that it names."""
    return _reached_from([getattr(kind, "forward", None)], kind)


def _reached_from(functions: list[Any], kind: type) -> tuple[FunctionType, ...]:
    homes = {_home(each) for each in (*functions, *kind.__mro__) if each is not None}
    todo, found = list(functions), dict[FunctionType, None]()
    while todo:
        each = todo.pop()
        function = each.fget if isinstance(each, property) else each
        if not isinstance(function, FunctionType) or function in found:
            continue
        if _home(function) not in homes or _home(function) in _LIBRARIES:
            continue
        found[function] = None
        names = _names_in(function.__code__)
        todo += [getattr(kind, name, None) for name in names]
        todo += [function.__globals__.get(name) for name in names]
        todo += [_value_of(cell) for cell in function.__closure__ or ()]
    return tuple(found)


@lru_cache(maxsize=4096)
def _names_in(code: CodeType) -> set[str]:
    """The names that code uses, of what is within it too."""
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))
