"""Modules that do more than forward: a graph would forget it, so they are called whole."""

from __future__ import annotations

import dis
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import nn

from lean_fx.graph.reachable import code_of_forward

_MODES = ("train", "eval")
_STATE = (
    *("state_dict", "load_state_dict", "get_extra_state", "set_extra_state", "_apply"),
    *("_save_to_state_dict", "_load_from_state_dict"),
)
_MATCHING = ("MATCH_CLASS", "MATCH_MAPPING", "MATCH_SEQUENCE")
_CALLING_TORCH = frozenset(("super", "torch", "nn", "Module"))


def own_method(module: nn.Module, evaluation: bool = False) -> str:
    """A method of torch.nn.Module that a module has of its own and that its graph would not have.

    That is ``train`` or ``eval``, unless it only calls torch's, and what makes or reads a
    state_dict.

    Args:
        module: the module. Those of torch's own classes are whole anyway.
        evaluation: whether the graph is for evaluation alone, and no mode is set.

    Returns:
        Its name; empty if there is none.

    Example:
        >>> frozen = nn.Linear(4, 2)
        >>> frozen.train = lambda mode=True: frozen
        >>> own_method(frozen), own_method(nn.BatchNorm2d(4))
        ('train', '')
    """
    for name in () if evaluation else _MODES:
        method = _own(module, name)
        if method and (name in vars(module) or not _only_calls_torch(method, name)):
            return name
    return next((name for name in _STATE if _own(module, name)), "")


def asks_for_classes(module: nn.Module) -> bool:
    """Whether the code of a forward matches classes, or reads ``__class__``: Python answers that.

    Example:
        >>> asks_for_classes(nn.Linear(4, 2))
        False
    """
    return any(
        "__class__" in code.co_names
        or any(each.opname in _MATCHING for each in dis.get_instructions(code))
        for code in code_of_forward(module)
    )


def asks_for_another_mode(module: nn.Module) -> bool:
    """Whether the code of a forward reads ``training`` of an attribute: ``self.norm.training``.

    Example:
        >>> asks_for_another_mode(nn.Linear(4, 2))
        False
    """
    for code in code_of_forward(module):
        steps = [each for each in dis.get_instructions(code) if each.opname != "CACHE"]
        for before, step in pairwise(steps):
            if (
                (step.opname, step.argval)
                == (before.opname, "training")
                == ("LOAD_ATTR", "training")
            ):
                return True
    return False


def own_call(module: nn.Module) -> str:
    """What runs when a module is called in place of the forward of its class; empty if nothing.

    Example:
        >>> own_call(nn.Linear(4, 2))
        ''
    """
    if "forward" in vars(module):
        return "a forward set on the object"
    return "a __call__ of its own" if _own(module, "__call__") else ""


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


def _only_calls_torch(method: Callable[..., Any], name: str) -> bool:
    """Whether a train or eval hands its mode on to torch's and does no more."""
    code = getattr(method, "__code__", None)
    if code is None:
        return False
    names, constants = set(code.co_names), set(code.co_consts) - {method.__doc__}
    if name == "train":
        return "train" in names and names <= _CALLING_TORCH | {"train"} and constants <= {None}
    called = names & {"eval", "train"}
    return bool(called) and names <= _CALLING_TORCH | called and constants <= {None, False}
