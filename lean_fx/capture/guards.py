"""The nodes that capture adds: checks that new inputs take the same path, and builtins."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from lean_fx.errors import BranchError
from lean_fx.graph.patching import Patch


def _as_node(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let every trace of torch.fx, ours or a user's, record a call of a function as one node."""

    @functools.wraps(function)
    def wrapped(value: Any, *args: Any) -> Any:
        if isinstance(value, Proxy):
            return value.tracer.create_proxy("call_function", wrapped, (value, *args), {})
        return function(value, *args)

    return wrapped


@_as_node
def check_branch(value: Any, captured: Any, where: str) -> None:
    """Check that a branch in a model's code goes where it went when the model was captured.

    Capture adds it as a node when it follows a branch on a size. An export skips it: sizes are
    symbols there, and the check would fix them.

    Args:
        value: what the branch depends on, now.
        captured: what it was then.
        where: the place in the model's code.

    Raises:
        BranchError: the two differ.

    Example:
        >>> check_branch(16 > 8, True, "Net (net.py:7: if x.shape[2] > 8)")
        >>> check_branch(4 > 8, True, "Net (net.py:7: if x.shape[2] > 8)")
        Traceback (most recent call last):
        ...
        lean_fx.errors.BranchError: Net (net.py:7: if x.shape[2] > 8): gives False for these \
inputs, but the model was captured where it gives True; capture it with inputs of these sizes
    """
    if torch.compiler.is_exporting():
        return
    plain = isinstance(captured, bool | int | float | str | tuple)
    found = type(captured)(value) if plain else value  # a branch on a number needs its truth
    if found != captured:
        raise BranchError(
            f"{where}: gives {found} for these inputs, but the model was captured where it gives "
            f"{captured}",
            "capture it with inputs of these sizes",
        )


@_as_node
def check_absent(value: Any, name: str) -> None:
    """Check that an optional input that was None when a model was captured still is.

    Args:
        value: the input, now.
        name: that of the parameter of forward.

    Raises:
        BranchError: it is something else.

    Example:
        >>> check_absent(None, "mask")
        >>> check_absent([1], "mask")
        Traceback (most recent call last):
        ...
        lean_fx.errors.BranchError: mask is a list, but the model was captured where it is None; \
capture it with example inputs that give it
    """
    if value is not None:
        raise BranchError(
            f"{name} is a {type(value).__name__}, but the model was captured where it is None",
            "capture it with example inputs that give it",
        )


@_as_node
def check_given(value: Any, name: str) -> None:
    """Check that an optional input that was given when a model was captured is given again.

    Args:
        value: the input, now.
        name: that of the parameter of forward.

    Raises:
        BranchError: it is None.

    Example:
        >>> check_given(0.5, "mask")
        >>> check_given(None, "mask")
        Traceback (most recent call last):
        ...
        lean_fx.errors.BranchError: mask is None, but the model was captured where it is given; \
capture it with example inputs that leave it out
    """
    if value is None:
        raise BranchError(
            f"{name} is None, but the model was captured where it is given",
            "capture it with example inputs that leave it out",
        )


@_as_node
def check_kind(value: Any, captured: str, where: str) -> None:
    """Check that a value has the type that it had when a model was captured.

    Capture adds it as a node when forward asks, for example, ``isinstance(x, tuple)``.

    Args:
        value: what was asked, now.
        captured: the name of its type then, by :func:`kind_name`.
        where: the place in the model's code.

    Raises:
        BranchError: the two differ.

    Example:
        >>> check_kind(torch.ones(2), "Tensor", "Net (net.py:7: if isinstance(x, tuple))")
        >>> check_kind((torch.ones(2),), "Tensor", "Net (net.py:7: if isinstance(x, tuple))")
        Traceback (most recent call last):
        ...
        lean_fx.errors.BranchError: Net (net.py:7: if isinstance(x, tuple)): is of type tuple for \
these inputs, but the model was captured where it is of type Tensor; capture it with inputs of \
these types
    """
    found = kind_name(value)
    if found != captured and not torch.compiler.is_exporting():
        raise BranchError(
            f"{where}: is of type {found} for these inputs, but the model was captured where it is "
            f"of type {captured}",
            "capture it with inputs of these types",
        )


def kind_name(value: Any) -> str:
    """The name of the type of a value; every tensor is a Tensor.

    Example:
        >>> kind_name(torch.ones(2)), kind_name(2.0)
        ('Tensor', 'float')
    """
    return "Tensor" if isinstance(value, Tensor) else type(value).__qualname__


@_as_node
def has_attribute(value: Any, name: str) -> bool:
    """``hasattr`` as a node; torch.fx cannot trace the builtin.

    Example:
        >>> has_attribute(1j, "imag")
        True
    """
    return hasattr(value, name)


@_as_node
def count_items(value: Sized) -> int:
    """``len`` as a node; torch.fx cannot trace the builtin.

    For a tensor it gives a size, which an export leaves free; ``len`` would fix it.

    Example:
        >>> count_items((1, 2)), count_items(torch.ones(3, 4))
        (2, 3)
    """
    return value.shape[0] if isinstance(value, Tensor) and value.dim() else len(value)


def counting_items(homes: Iterable[dict[str, Any]]) -> list[Patch]:
    """Patches that replace ``len`` by :func:`count_items` in globals."""
    return [(home, "len", count_items) for home in homes if "len" not in home]


@_as_node
def round_number(value: float, digits: int | None = None) -> float:
    """``round`` as a node; torch.fx cannot trace the builtin.

    Example:
        >>> round_number(2.6)
        3
    """
    return round(value, digits)
