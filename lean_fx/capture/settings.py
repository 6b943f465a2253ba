"""Settings outside a model that its forward reads and that a user may change later."""

from __future__ import annotations

import os
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from contextvars import ContextVar
from enum import Enum
from types import SimpleNamespace
from typing import Any

from torch import nn

from lean_fx.graph.model_code import (
    cells_of,
    code_of_forward,
    functions_of,
    global_names_in,
    names_in,
    package_of,
)
from lean_fx.graph.reachable import NUMBERS, fields_of, is_plain_object

_ENVIRONMENT = ("environ", "getenv")


def reads_settings(module: nn.Module) -> bool:
    """Whether the code of a forward reads settings that its graph would freeze as constants.

    - A number of an object or class of the user's among the globals: ``CONFIG.temperature``.
    - Numbers or strings in a dict, list, set or namespace outside the model, or such a container
      that is still empty: ``CONFIG["temperature"]``, a list in an enclosing function.
    - Context variables, thread-locals and environment variables.

    A global number, such as ``EPSILON``, or a tuple counts as a constant.

    Example:
        >>> reads_settings(nn.Linear(4, 2))
        False
    """
    named = {name for code in code_of_forward(module) for name in code.co_names}
    return any(
        _may_be_set_later(value) or (_is_of(package, value) and _has_numbers(value, named))
        for value, package in _outer_variables(module)
    )


def _outer_variables(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """The globals and closure variables that a module's code names, each with its package."""
    for function in functions_of(module):
        home = function.__globals__
        for name in global_names_in(function.__code__):
            value = home.get(name)
            if value is os and names_in(function.__code__).intersection(_ENVIRONMENT):
                value = os.environ
            yield value, package_of(function)
    for cell in cells_of(module):
        yield cell.cell_contents, package_of(type(module))


def _may_be_set_later(value: Any) -> bool:
    if isinstance(value, ContextVar | threading.local | type(os.environ)) or value is os.getenv:
        return True
    if isinstance(value, SimpleNamespace):
        value = vars(value)
    if type(value) in (dict, defaultdict):
        value = list(value.values())
    if type(value) in (list, set, deque):
        return not value or any(type(each) in NUMBERS for each in value)
    return False


def _is_of(package: str, value: Any) -> bool:
    """Whether a value is a class of a package or an object of one; modules and enums aside."""
    if isinstance(value, type):
        return not issubclass(value, nn.Module | Enum) and package_of(value) == package
    return is_plain_object(value) and package_of(type(value)) == package


def _has_numbers(value: Any, named: set[str]) -> bool:
    return any(name in named and type(each) in NUMBERS for name, each in fields_of(value))
