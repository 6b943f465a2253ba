"""Modules whose code does what a graph would forget, or asks what would be frozen: called whole.

What is told here is told by the code, before anything runs.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from types import CodeType
from typing import Any, Literal

from torch import nn

from lean_fx.capture.settings import reads_settings
from lean_fx.graph.model_code import code_of_forward

#: What a graph is made for: to take the model's place, to do so only in evaluation, where no mode
#: is set, or to know about a model that keeps its class, and with it all methods.
Purpose = Literal["graph", "evaluation", "facts"]

_MODES = ("train", "eval")
_STATE = ("state_dict", "_save_to_state_dict", "get_extra_state", "set_extra_state")
_MOVING = "_apply"  # what to(), half() and cuda() call
_LOADING = ("load_state_dict", "_load_from_state_dict")
_MATCHING = ("MATCH_CLASS", "MATCH_MAPPING", "MATCH_SEQUENCE")
_CATCHING = ("CHECK_EXC_MATCH", "JUMP_IF_NOT_EXC_MATCH")  # the latter before Python 3.11
_INTERNALS = frozenset(vars(nn.Module()))
_CALLING_TORCH = frozenset(("super", "torch", "nn", "Module"))


def lost_in_a_graph(module: nn.Module, purpose: Purpose = "graph", *, is_part: bool = True) -> str:
    """What the code of a module does that its graph would not; empty if there is nothing.

    - A ``train``, ``eval`` or ``_apply`` of its own, unless it only calls torch's and drops
      caches, and a method of its own that makes or reads a state_dict.
    - Questions that Python answers for a proxy: ``match`` by classes, ``x.__class__``.
    - Another way where a call fails: ``except RuntimeError``, but for functions that are given
      nothing, such as ``is_torch_compiling()``: what fails there is no value.
    - Settings outside the model that may change later (:mod:`lean_fx.capture.settings`).
    - The mode of another module: ``self.norm.training``.

    Args:
        module: the module. Those of torch's own classes are whole anyway.
        purpose: of the graph.
        is_part: whether the module is a part of a model; a model may lose what reads state_dicts,
            see :func:`own_loading`.

    Example:
        >>> frozen = nn.Linear(4, 2)
        >>> frozen.train = lambda mode=True: frozen
        >>> lost_in_a_graph(frozen), lost_in_a_graph(nn.BatchNorm2d(4))
        ('has a train of its own, which a graph has not', '')
    """
    if own := _own_method(module, purpose, is_part):
        return f"has a {own} of its own, which a graph has not"
    code = code_of_forward(module)
    if any(map(_asks_for_classes, code)):
        return "matches classes, and a proxy has another"
    if any(map(_catches, code)):
        return "catches errors, and its graph would not"
    if reads_settings(module):
        return "reads settings that may be changed later"
    if any(map(_asks_for_another_mode, code)):
        return "asks for the mode of another module"
    return ""


def own_loading(module: nn.Module) -> str:
    """A method of a module's own that reads a state_dict; empty if there is none.

    A model that has one is captured without it: it must not lose its graph for checkpoints of
    other versions. A part that has one is whole.

    Example:
        >>> own_loading(nn.Linear(4, 2))
        ''
    """
    return next((name for name in _LOADING if _own(module, name)), "")


def own_call(module: nn.Module) -> str:
    """What runs when a module is called in place of the forward of its class; empty if nothing.

    Example:
        >>> own_call(nn.Linear(4, 2))
        ''
    """
    if "forward" in vars(module):
        return "has a forward set on the object"
    return "has a __call__ of its own" if _own(module, "__call__") else ""


def _own_method(module: nn.Module, purpose: Purpose, is_part: bool) -> str:
    """A method that makes or reads a state_dict, or does more than call torch's of that name.

    For facts: one that changes what forward does with the mode.
    """
    if purpose == "facts":
        own = ((name, _own(module, name)) for name in _MODES)
        return next((name for name, method in own if method and _changes_attributes(method)), "")
    for name in (_MOVING,) if purpose == "evaluation" else (*_MODES, _MOVING):
        method = _own(module, name)
        if method and (name in vars(module) or not _only_calls_torch(method, name, module)):
            return name
    return next((name for name in _STATE if _own(module, name)), "") or (
        own_loading(module) if is_part else ""
    )


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


def _own(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """A method that is not torch's: set on the object, or of its class."""
    if name in vars(module):
        found: Callable[..., Any] = vars(module)[name]
        return found
    for base in type(module).__mro__:
        if name in vars(base):
            ours = base.__module__.partition(".")[0] in ("torch", "lean_fx")
            return None if ours else vars(base)[name]
    return None


def _changes_attributes(method: Callable[..., Any]) -> bool:
    """Whether a method sets more than modes and whether parameters learn."""
    code = getattr(inspect.unwrap(method), "__code__", None)
    if code is None or "setattr" in code.co_names:
        return True
    stored = {each.argval for each in dis.get_instructions(code) if each.opname == "STORE_ATTR"}
    return not stored <= {"training", "requires_grad"}


def _only_calls_torch(method: Callable[..., Any], name: str, module: nn.Module) -> bool:
    """Whether a train, eval or _apply calls torch's and does no more than drop caches."""
    code = getattr(inspect.unwrap(method), "__code__", None)  # @torch.no_grad() wraps it
    if code is None:
        return False
    kinds = (dict,) if name == _MOVING else (dict, list)  # a list may hold what _apply moves
    caches = {key for key, value in vars(module).items() if type(value) in kinds}
    names = set(code.co_names) - (caches - _INTERNALS) - {"clear"}
    constants = set(code.co_consts) - {method.__doc__}
    if name != "eval":
        return name in names and names <= _CALLING_TORCH | {name} and constants <= {None}
    called = names & {"eval", "train"}
    return bool(called) and names <= _CALLING_TORCH | called and constants <= {None, False}
