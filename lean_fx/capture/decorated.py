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
    kinds = [each.kind for each in inspect.signature(bare).parameters.values()]
    names = list(inspect.signature(bare).parameters)

    def called(*args: Any) -> Any:
        given: list[Any] = []
        named: dict[str, Any] = {}
        for name, kind, value in zip(names, kinds, args, strict=False):
            if kind is inspect.Parameter.VAR_POSITIONAL:
                given += value
            elif kind is inspect.Parameter.VAR_KEYWORD:
                named |= value
            elif kind is inspect.Parameter.KEYWORD_ONLY:
                named[name] = value
            else:
                given.append(value)
        return wrapper(*given, **named)

    return called
