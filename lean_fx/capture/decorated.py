"""Trace forwards as torch.fx does not: with their decorators, and what they take by name only."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def called_by_position(wrapper: Callable[..., Any], bare: Callable[..., Any]) -> Any:
    """A forward that takes all its arguments by position, as torch.fx passes them.

    Args:
        wrapper: the forward, perhaps decorated.
        bare: the forward without decorators, which has the parameters.

    Example:
        >>> def forward(x, *, scale):
        ...     return x * scale
        >>> called_by_position(forward, forward)(2, 3)
        6
    """
    signature = inspect.signature(bare)
    behind = inspect.Parameter.VAR_POSITIONAL  # torch.fx has *args behind what is taken by name
    names = sorted(signature.parameters, key=lambda name: signature.parameters[name].kind == behind)

    def called(*args: Any) -> Any:
        given = dict(zip(names, args, strict=False))
        bound = inspect.BoundArguments(signature, given)
        return wrapper(*bound.args, **bound.kwargs)

    return called
