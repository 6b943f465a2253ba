"""Find modules whose code shows, before anything runs, that a graph would lose or freeze something.

Such a module stays whole: the graph calls it as a leaf.
"""

from __future__ import annotations

import dis
import inspect
import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from enum import Enum
from functools import lru_cache
from itertools import pairwise
from types import CodeType, SimpleNamespace
from typing import Any, Literal

from torch import nn

from lean_fx.cloning import MODULE_ATTRIBUTES
from lean_fx.graph.model_code import (
    cells_of,
    code_of_forward,
    functions_of,
    global_names_in,
    is_users_code,
    names_in,
    package_of,
)
from lean_fx.graph.reachable import NUMBERS, fields_of, is_plain_object

#: What a graph is for: to replace the model, to replace it in evaluation only, or to learn about a
#: model that keeps its class and all its methods.
Purpose = Literal["graph", "evaluation", "facts"]
#: One answer of :func:`own_call`.
OWN_CALL = "has a __call__ of its own"

_MODES = ("train", "eval")
_STATE = ("state_dict", "_save_to_state_dict", "get_extra_state", "set_extra_state")
_MOVING = "_apply"  # what to(), half() and cuda() call
_LOADING = ("load_state_dict", "_load_from_state_dict")
_MATCHING = ("MATCH_CLASS", "MATCH_MAPPING", "MATCH_SEQUENCE")
_CATCHING = ("CHECK_EXC_MATCH", "JUMP_IF_NOT_EXC_MATCH")  # the latter before Python 3.11
_ENVIRONMENT = ("environ", "getenv")
_CALLING_TORCH = frozenset(("super", "torch", "nn", "Module"))


def lost_in_a_graph(module: nn.Module, purpose: Purpose = "graph", *, is_part: bool = True) -> str:
    """What a graph of a module would lose, according to its code; empty if nothing.

    - An overridden ``train``, ``eval`` or ``_apply``, unless it only calls torch's and drops
      caches; an overridden method that makes or reads a state_dict.
    - Questions that Python would answer for the proxy: ``match`` by class, ``x.__class__``.
    - An ``except`` clause. A function without arguments, such as ``is_torch_compiling()``, may
      have one: no value of the graph can fail there.
    - Settings outside the model that may change later, such as ``CONFIG.temperature``.
    - The mode of another module: ``self.norm.training``.

    Args:
        module: the module; torch's own are leaves anyway.
        purpose: of the graph.
        is_part: whether the module is a part of a model. A model itself may lose the methods that
            read state_dicts (:func:`own_loading`).

    Example:
        >>> frozen = nn.Linear(4, 2)
        >>> frozen.train = lambda mode=True: frozen
        >>> lost_in_a_graph(frozen), lost_in_a_graph(nn.BatchNorm2d(4))
        ('has a train of its own, which a graph has not', '')
    """
    if own := _lost_override(module, purpose, is_part):
        return f"has a {own} of its own, which a graph has not"
    code = code_of_forward(module)
    if any(map(_asks_for_classes, code)):
        return "matches classes, and a proxy has another"
    if any(map(_catches, code)):
        return "catches errors, and its graph would not"
    if _reads_settings(module):
        return "reads settings that may be changed later"
    if any(map(_asks_for_another_mode, code)):
        return "asks for the mode of another module"
    return ""


def own_loading(module: nn.Module) -> str:
    """The name of an overridden method that reads a state_dict; empty if there is none.

    A model with one is captured without it: such methods mostly convert checkpoints of older
    versions, which is no reason to give up the graph. A part with one stays whole.

    Example:
        >>> own_loading(nn.Linear(4, 2))
        ''
    """
    return next((name for name in _LOADING if _override(module, name)), "")


def own_call(module: nn.Module) -> str:
    """What runs instead of the forward of its class when a module is called; empty if nothing.

    Example:
        >>> own_call(nn.Linear(4, 2))
        ''
    """
    if "forward" in vars(module):
        return "has a forward set on the object"
    return OWN_CALL if _override(module, "__call__") else ""


def _lost_override(module: nn.Module, purpose: Purpose, is_part: bool) -> str:
    """The name of an overridden method that a graph would lose; empty if there is none.

    With the purpose "facts" only a change of the mode counts.
    """
    if purpose == "facts":
        own = ((name, _override(module, name)) for name in _MODES)
        return next((name for name, method in own if method and _changes_attributes(method)), "")
    for name in (_MOVING,) if purpose == "evaluation" else (*_MODES, _MOVING):
        method = _override(module, name)
        if method and (name in vars(module) or not _only_calls_torch(method, name, module)):
            return name
    own_state = next((name for name in _STATE if _override(module, name)), "")
    return own_state or (own_loading(module) if is_part and purpose == "graph" else "")


@lru_cache(maxsize=4096)
def _asks_for_classes(code: CodeType) -> bool:
    """Whether code matches classes, or reads ``__class__`` of what is not ``self``."""
    steps = [each for each in dis.get_instructions(code) if each.opname != "CACHE"]
    return any(
        each.opname in _MATCHING
        or (each.argval == "__class__" and each.opname == "LOAD_ATTR" and before.argval != "self")
        for before, each in pairwise(steps)
    )


@lru_cache(maxsize=4096)
def _catches(code: CodeType) -> bool:
    stars = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    given = code.co_argcount or code.co_kwonlyargcount or stars or code.co_freevars
    return bool(given) and any(each.opname in _CATCHING for each in dis.get_instructions(code))


@lru_cache(maxsize=4096)
def _asks_for_another_mode(code: CodeType) -> bool:
    """Whether code reads ``training`` of an attribute: ``self.norm.training``."""
    if "training" not in code.co_names:
        return False
    steps = [each for each in dis.get_instructions(code) if each.opname != "CACHE"]
    return any(
        step.argval == "training" and step.opname == before.opname == "LOAD_ATTR"
        for before, step in pairwise(steps)
    )


def _reads_settings(module: nn.Module) -> bool:
    """Whether a forward reads settings outside the model, which a user may change later.

    - A number of an object or class of the user's among the globals: ``CONFIG.temperature``.
    - Numbers or strings in a dict, list, set or namespace outside the model, or such a container
      that is still empty: ``CONFIG["temperature"]``, a list in an enclosing function.
    - Context variables, thread-locals and environment variables.

    A global number, such as ``EPSILON``, or a tuple counts as a constant.
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


def _override(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """A method that is not torch's, of the object or its class; None if torch's runs."""
    if name in vars(module):
        found: Callable[..., Any] = vars(module)[name]
        return found
    for base in type(module).__mro__:
        if name in vars(base):
            return vars(base)[name] if is_users_code(base.__module__) else None
    return None


def _changes_attributes(method: Callable[..., Any]) -> bool:
    """Whether a method sets attributes other than ``training`` and ``requires_grad``."""
    code = getattr(inspect.unwrap(method), "__code__", None)
    if code is None or "setattr" in code.co_names:
        return True
    stored = {each.argval for each in dis.get_instructions(code) if each.opname == "STORE_ATTR"}
    return not stored <= {"training", "requires_grad"}


def _only_calls_torch(method: Callable[..., Any], name: str, module: nn.Module) -> bool:
    """Whether a train, eval or _apply only calls torch's and drops caches."""
    code = getattr(inspect.unwrap(method), "__code__", None)  # @torch.no_grad() wraps it
    if code is None:
        return False
    kinds = (dict,) if name == _MOVING else (dict, list)  # a list may hold what _apply moves
    caches = {key for key, value in vars(module).items() if type(value) in kinds}
    names = set(code.co_names) - (caches - MODULE_ATTRIBUTES) - {"clear"}
    constants = set(code.co_consts) - {method.__doc__}
    if name != "eval":
        return name in names and names <= _CALLING_TORCH | {name} and constants <= {None}
    called = names & {"eval", "train"}
    return bool(called) and names <= _CALLING_TORCH | called and constants <= {None, False}
