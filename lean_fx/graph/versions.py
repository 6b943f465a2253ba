"""Tell whether a tensor, an array or a generator has been changed in place, and restore it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

_MANY = 1_000_000  # a larger array is data, not state


def version_of(value: Any) -> Any:
    """A version of a tensor, an array or a generator, which differs after it changes in place.

    That of an iterator differs each time, since a check would have to advance it. None for values
    that do not change in place, and for parameters.
    """
    if isinstance(value, nn.Parameter | Proxy):
        return None
    if isinstance(value, Tensor):
        return 0 if value.is_inference() else value._version
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, Iterator):
        return object()
    if _is_array(value) and value.size < _MANY:
        return value.tobytes()
    if _is_legacy_generator(value):
        name, key, *rest = value.get_state()
        return name, key.tobytes(), *rest
    return str(value.bit_generator.state) if _is_generator(value) else None


def backup_of(value: Any) -> Callable[[], Any] | None:
    """A function that restores a value as it is now; None if it cannot change in place."""
    version = version_of(value)
    if isinstance(value, Tensor) and version is not None and not value.is_inference():
        copied = value.detach().clone()
        return lambda: value._version == version or value.data.copy_(copied)
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, random.Random):
        return lambda: value.setstate(version)
    if _is_array(value) and version is not None and value.flags.writeable:
        array = value.copy()
        return lambda: value.__setitem__(..., array)
    if _is_legacy_generator(value):
        before = value.get_state()
        return lambda: value.set_state(before)
    if _is_generator(value):
        kept = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", kept)
    return None


# The type is asked, not the object: an object of a user's class may claim any attribute.


def _is_array(value: Any) -> bool:
    """Whether a value is an array of NumPy or the like; NumPy's scalars are immutable."""
    return hasattr(type(value), "__array_interface__") and hasattr(type(value), "__setitem__")


def _is_legacy_generator(value: Any) -> bool:
    """Whether a value is a RandomState of NumPy's."""
    return hasattr(type(value), "_bit_generator") and hasattr(type(value), "set_state")


def _is_generator(value: Any) -> bool:
    """Whether a value is a generator of NumPy's."""
    return hasattr(type(value), "bit_generator")
