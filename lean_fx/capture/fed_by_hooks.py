"""Find modules that read what hooks of other modules store: a graph would freeze what is there."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from lean_fx.graph.calls import CALL_HOOKS
from lean_fx.graph.model_code import is_users_code
from lean_fx.graph.reachable import holders_of_functions, reachable_holders


def fed_by_hooks(root: nn.Module) -> set[str]:
    """The names of the modules whose forward can reach an object that a hook can write to.

    Args:
        root: the model; its name is empty.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> stored = net[0].register_forward_hook(functools.partial(setattr, net, "seen"))
        >>> fed_by_hooks(net)
        {''}
    """
    written = {id(each) for hook in _hooks(root) for each in _written_by(hook)}
    if not written:
        return set()
    return {
        name
        for name, module in root.named_modules()
        if id(module) in written or written & set(map(id, reachable_holders(module)))
    }


def _hooks(root: nn.Module) -> Iterator[Any]:
    for module in root.modules():
        for hooks in CALL_HOOKS:
            yield from (each for each in getattr(module, hooks).values() if is_users_hook(each))


def is_users_hook(hook: Any) -> bool:
    """Whether a hook is the user's, that is, neither torch's nor this package's.

    Example:
        >>> is_users_hook(nn.init.zeros_), is_users_hook(print)
        (False, True)
    """
    return is_users_code(getattr(hook, "__module__", None) or type(hook).__module__)


def _written_by(hook: Any) -> Iterator[Any]:
    """The modules, objects, lists and dicts that a hook holds."""
    if isinstance(hook, functools.partial):
        yield from (*hook.args, *hook.keywords.values())
        yield from _written_by(hook.func)
    elif isinstance(hook, MethodType):
        yield from (hook.__self__, vars(hook.__self__))
        yield from _written_by(hook.__func__)
    elif isinstance(hook, FunctionType):
        yield from holders_of_functions([hook])
    elif hasattr(hook, "__dict__"):  # an object that is called
        yield from (hook, vars(hook), *vars(hook).values())
