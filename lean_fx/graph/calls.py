"""What a node calls, and with what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.fx import Node

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by every name that they have, as calls in a graph name them.

    ``dict(model.named_modules())`` has one name of a module that sits in two places.

    Example:
        >>> from lean_fx.graph.calls import modules_by_name
        >>> act = nn.ReLU()
        >>> sorted(modules_by_name(nn.ModuleDict({"act": act, "norm_act": act})))
        ['', 'act', 'norm_act']
    """
    return dict(model.named_modules(remove_duplicate=False))


def called(node: Node, modules: Mapping[str, nn.Module]) -> Any:
    """What a node calls: a function, the name of a method, or the type of a module.

    A module whose call does more than its type says (it has hooks, or a forward of its own) is
    itself what is called.
    """
    if node.op != "call_module":
        return node.target
    module = modules[str(node.target)]
    return module if is_altered(module) else type(module)


def is_altered(module: nn.Module) -> bool:
    """Whether a call of the module does more than its type says: it has hooks, or its own forward.

    Example:
        >>> is_altered(nn.ReLU())
        False
    """
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS)


def has_hooks(module: nn.Module) -> bool:
    """Whether something else runs when the module is called, or when a gradient reaches it.

    Example:
        >>> has_hooks(nn.ReLU())
        False
    """
    return any(getattr(module, hooks) for hooks in (*_HOOKS, *BACKWARD_HOOKS))


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
