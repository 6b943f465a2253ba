"""What a node calls, and with what."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.fx import Graph, Node

#: The attributes and methods of a tensor that do not depend on its numbers.
META_ATTRIBUTES = frozenset(("shape", "dtype", "device", "ndim", "layout", "is_meta"))
META_METHODS = frozenset(
    (
        *("size", "dim", "numel", "nelement", "ndimension", "stride", "element_size"),
        *("is_contiguous", "is_floating_point", "is_complex"),
    )
)
_CALLS = ("call_function", "call_method")
#: The hooks that a module holds: of its calls, and of gradients that reach it.
CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by every name that they have.

    A call in a graph may use any of them; ``dict(model.named_modules())`` has only the first.

    Example:
        >>> from lean_fx.graph.calls import modules_by_name
        >>> act = nn.ReLU()
        >>> sorted(modules_by_name(nn.ModuleDict({"act": act, "norm_act": act})))
        ['', 'act', 'norm_act']
    """
    return dict(model.named_modules(remove_duplicate=False))


def called_modules(graph: Graph) -> set[str]:
    """The names of the modules that a graph calls."""
    return {str(node.target) for node in graph.nodes if node.op == "call_module"}


def called(node: Node, modules: Mapping[str, nn.Module]) -> Any:
    """What a node calls: a function, the name of a method, the type of a module, or None.

    For a module with hooks or a replaced forward, its type does not say what a call does. Then the
    module itself is returned.
    """
    if node.op == "call_module":
        module = modules[str(node.target)]
        return module if is_altered(module) else type(module)
    return node.target if node.op in _CALLS else None


def is_altered(module: nn.Module) -> bool:
    """Whether the module has hooks, or a forward replaced on the instance.

    Example:
        >>> is_altered(nn.ReLU())
        False
    """
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in CALL_HOOKS)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run when the module is called, or when a gradient reaches it.

    Example:
        >>> has_hooks(nn.ReLU())
        False
    """
    return any(getattr(module, hooks) for hooks in (*CALL_HOOKS, *BACKWARD_HOOKS))


def asks_for_meta(node: Node) -> bool:
    """Whether a node reads the size, dtype or the like of a value, and none of its numbers."""
    if node.op not in _CALLS:
        return False
    asked = node.args[1] if node.target is getattr else node.target
    return asked in META_ATTRIBUTES or asked in META_METHODS


def source_of(node: Node) -> Node | None:
    """The value that a call reads: its first argument, or ``input=``; None if it is not a node."""
    source = argument(node, 0, "input")
    return source if isinstance(source, Node) else None


def bound_arguments(node: Node, function: Callable[..., Any]) -> dict[str, Any]:
    """All arguments of a call of a function by name, defaults included."""
    bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
