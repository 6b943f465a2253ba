"""The code that the forward of a module may run: its own, and what it calls in its package."""

from __future__ import annotations

import dis
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

#: The type of what functools.lru_cache and functools.cache return.
CACHE: Any = type(lru_cache(lambda: None))
# What code in a function, and in a class within one, does with globals.
_OF_GLOBALS = (
    *("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL"),
    *("LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"),
)
_METHODS = (MethodType, staticmethod, classmethod)
#: Packages whose code and objects are not a model's own.
LIBRARIES = ("None", "torch", "builtins", "lean_fx", "numpy", "collections", "functools")
#: Stands for the value of a closure variable that is not assigned yet.
ABSENT = object()


def code_of_forward(module: nn.Module) -> list[CodeType]:
    """The code objects that a module's forward may run in its package, nested ones included."""
    return [inner for each in functions_of(module) for inner in _within(each.__code__)]


def _within(code: CodeType) -> Iterator[CodeType]:
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _within(each)


def functions_of(module: nn.Module) -> list[FunctionType]:
    """The functions that a module's forward may run: of its class, and set on the module."""
    kind: Any = type(module)
    own = [each for each in vars(module).values() if isinstance(each, FunctionType)]
    return list(dict.fromkeys((*_of_type(kind), *(reached_from(own, kind) if own else ()))))


@lru_cache(maxsize=256)
def _of_type(kind: Any) -> tuple[FunctionType, ...]:
    """The forward of a class, and the methods and functions of the same package that it names."""
    return reached_from([getattr(kind, "forward", None)], kind)


def reached_from(functions: list[Any], kind: type) -> tuple[FunctionType, ...]:
    """The given functions, and those of their package that they name, also as class attributes."""
    homes = {package_of(each) for each in (*functions, *kind.__mro__) if each is not None}
    todo, found = list(functions), dict[FunctionType, None]()
    while todo:
        function = _behind(todo.pop())
        if not isinstance(function, FunctionType) or function in found:
            continue
        if package_of(function) not in homes or package_of(function) in LIBRARIES:
            continue
        found[function] = None
        names = names_in(function.__code__)
        todo += [getattr(kind, name, None) for name in names]
        home = function.__globals__
        used = [home[name] for name in global_names_in(function.__code__) if name in home]
        todo += used
        for each in used:  # utils.scale(x)
            if isinstance(each, ModuleType) and each.__name__.partition(".")[0] in homes:
                todo += [vars(each).get(name) for name in names]
        todo += [value_of_cell(cell) for cell in function.__closure__ or ()]
    return tuple(found)


def _behind(named: Any) -> Any:
    """The function behind a property, a cache or a method of a class."""
    if isinstance(named, property):
        return named.fget
    if isinstance(named, CACHE):
        return named.__wrapped__
    return named.__func__ if isinstance(named, _METHODS) else named


@lru_cache(maxsize=4096)
def names_in(code: CodeType) -> set[str]:
    """The names that code uses, globals and attributes, nested code included."""
    return {name for each in _within(code) for name in each.co_names}


@lru_cache(maxsize=4096)
def global_names_in(code: CodeType) -> set[str]:
    """The names of globals that code uses, nested code included."""
    steps = (step for each in _within(code) for step in dis.get_instructions(each))
    return {str(step.argval) for step in steps if step.opname in _OF_GLOBALS}


@lru_cache(maxsize=4096)
def only_calls(code: CodeType, name: str) -> bool:
    """Whether code uses a global in no other way than to call it, nested code included.

    Example:
        >>> only_calls((lambda x: int(x)).__code__, "int")
        True
        >>> only_calls((lambda x: isinstance(x, int)).__code__, "int")
        False
    """
    steps = (step for each in _within(code) for step in dis.get_instructions(each))
    uses = [step for step in steps if step.opname in _OF_GLOBALS and step.argval == name]
    return all(step.opname == "LOAD_GLOBAL" and (step.arg or 0) & 1 for step in uses)


def globals_of(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """The globals that the code of modules may read."""
    homes = {id(f.__globals__): f.__globals__ for each in modules for f in functions_of(each)}
    return list(homes.values())


def cells_of(module: nn.Module) -> list[Any]:
    """The closure cells of a module's code that have a value."""
    cells = [cell for each in functions_of(module) for cell in each.__closure__ or ()]
    return [cell for cell in cells if value_of_cell(cell) is not ABSENT]


def value_of_cell(cell: Any) -> Any:
    """The value of a closure cell, or ABSENT."""
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return ABSENT


def package_of(named: Any) -> str:
    """The package that a function, class or object comes from."""
    return str(named.__module__).partition(".")[0]


@cache  # torch asks for the type of a value some hundred times in a trace
def is_users_code(module: str) -> bool:
    """Whether the code in a Python module is the user's, and neither torch's nor lean_fx's.

    Args:
        module: its ``__name__``.

    Example:
        >>> is_users_code("my_nets.blocks"), is_users_code("torch.nn")
        (True, False)
    """
    return module.partition(".")[0] not in ("torch", "lean_fx")
