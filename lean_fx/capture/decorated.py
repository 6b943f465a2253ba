"""Trace decorated forwards with their decorators, which torch.fx would leave out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def called_by_position(wrapper: Callable[..., Any], bare: Callable[..., Any]) -> Any:
    """A decorated forward that takes all its arguments by position, as torch.fx passes them.

    Args:
        wrapper: the decorated forward.
        bare: the forward without decorators, which has the parameters.

    Example:
        >>> def forward(x, *, scale):
        ...     return x * scale
        >>> called_by_position(forward, forward)(2, 3)
        6
    """
    signature = inspect.signature(bare)

    def called(*args: Any) -> Any:
        given = dict(zip(signature.parameters, args, strict=False))
        bound = inspect.BoundArguments(signature, given)
        return wrapper(*bound.args, **bound.kwargs)

    return called
