"""How many channels to keep, and which layers the user excludes by name or type."""

from __future__ import annotations

import fnmatch
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn

from lean_fx.checks import check_int
from lean_fx.errors import ArgumentError
from lean_fx.graph.sites import Site
from lean_fx.reduction.base import divisors

#: A number, a fraction, ``"sqrt"`` or ``"tenth"``.
Scalar = int | float | str
#: A scalar for all sites, a function of the site, or scalars by layer name (or glob pattern).
ChannelsPolicy = Scalar | Callable[[Site], Scalar] | Mapping[str, Scalar]
#: Names, glob patterns and types of layers, and types of modules that hold them.
Skip = Iterable[str | type[nn.Module]]

_FORMS = (
    "give an int, a float in ]0, 1[, 'sqrt', 'tenth', a function of the site or a mapping of layer "
    "names"
)


def check_channels_policy(channels: Any) -> None:
    """Check a policy as far as possible before any site is known.

    Raises:
        ArgumentError: a value is of the wrong type or out of range.

    Example:
        >>> check_channels_policy(0)
        Traceback (most recent call last):
        ...
        lean_fx.errors.ArgumentError: channels=0 is not an int of 1 or more
    """
    if isinstance(channels, Mapping):
        for name, value in channels.items():
            if not isinstance(name, str):
                raise ArgumentError(f"channels: the key {name!r} is not the name of a layer")
            _check_scalar(value, f"channels[{name!r}]")
    elif not callable(channels):
        _check_scalar(channels, "channels")


def _check_scalar(value: Any, subject: str) -> None:
    if isinstance(value, str):
        if value not in ("sqrt", "tenth"):
            raise ArgumentError(f"{subject}={value!r} is not known; {_FORMS}")
    elif isinstance(value, bool) or not isinstance(value, numbers.Integral):
        if not isinstance(value, float):
            raise ArgumentError(f"{subject}={value!r} is a {type(value).__name__}; {_FORMS}")
        if not 0 < value < 1:
            raise ArgumentError(
                f"{subject}={value!r} is not in ]0, 1[; a float is the fraction to keep"
            )
    else:
        check_int(subject, value, 1)


def wanted_channels(channels: ChannelsPolicy, site: Site, layer: str) -> float | None:
    """The number of channels that a policy asks for, before rounding to a divisor.

    Returns:
        The number, or None if a mapping does not name the layer.

    Raises:
        ArgumentError: the value is not a number of channels, or is above the site's
            ``in_channels``.
    """
    subject = f"channels of {layer}"
    value: Any = channels
    if isinstance(channels, Mapping):
        # The name of a stack of recurrent layers stands for all of its layers, or for the first.
        names = (layer, layer.rpartition(".")[0], f"{layer}.0")
        hits = [name for name in names if name in channels]
        hits += [key for key in channels if any(fnmatch.fnmatchcase(n, key) for n in names[::2])]
        if not hits:
            return None
        value = channels[hits[0]]
    elif callable(channels):
        value = channels(site)
    _check_scalar(value, subject)
    if value == "sqrt":
        return float(site.in_channels**0.5)
    if value == "tenth":
        return site.in_channels / 10
    if isinstance(value, float):
        return value * site.in_channels
    if operator.index(value) > site.in_channels:
        raise ArgumentError(
            f"{subject}: {value} is above its {site.in_channels} input channels; give at most "
            f"{site.in_channels}, skip the layer, or leave such layers alone with "
            f"min_channels={value}"
        )
    return operator.index(value)


def nearest_divisor(in_channels: int, wanted: float, round_to: int | None = None) -> int | None:
    """The divisor of ``in_channels`` nearest to ``wanted``; of two equally near, the smaller.

    1 and ``in_channels`` are taken only if ``wanted`` is exactly that number: 1 would leave a
    single channel, ``in_channels`` would reduce nothing.

    Args:
        in_channels: the number to divide.
        wanted: the number of channels asked for.
        round_to: prefer multiples of this number, if any divisor is one.

    Returns:
        The divisor, or None if 1 and ``in_channels`` are the only divisors.

    Example:
        >>> nearest_divisor(50, 10), nearest_divisor(64, 10), nearest_divisor(96, 96**0.5)
        (10, 8, 8)
        >>> nearest_divisor(100, 10, round_to=4), nearest_divisor(17, 4)
        (4, None)
    """
    usable = [d for d in divisors(in_channels) if 1 < d < in_channels or d == wanted]
    rounded = [d for d in usable if round_to and d % round_to == 0]
    return min(rounded or usable, key=lambda d: (abs(d - wanted), d), default=None)


def check_skip(skip: Any) -> tuple[str | type[nn.Module], ...]:
    """Turn ``skip`` into a tuple.

    Raises:
        ArgumentError: an entry is neither a string nor a type.
    """
    if not isinstance(skip, str | type | Iterable):
        raise ArgumentError(
            f"skip={skip!r} is a {type(skip).__name__}; give a tuple of names, patterns or types"
        )
    entries = (skip,) if isinstance(skip, str | type) else tuple(skip)
    for entry in entries:
        if not isinstance(entry, str | type):
            raise ArgumentError(
                f"skip: {entry!r} is a {type(entry).__name__}; give names, glob patterns or types"
            )
    return entries


def skipped_by(
    skip: Iterable[str | type[nn.Module]],
    name: str,
    layer: nn.Module,
    holders: Iterable[nn.Module] = (),
) -> str:
    """The entry of ``skip`` that excludes a layer, as text; empty if none does.

    Args:
        skip: names, glob patterns and types.
        name: the name of the layer.
        layer: the layer.
        holders: the modules around it; the type of a module excludes all layers inside.

    Example:
        >>> skipped_by(("head*", nn.Conv2d), "head.fc", nn.Linear(1, 1))
        "skip='head*'"
    """
    for entry in skip:
        if isinstance(entry, str):
            if fnmatch.fnmatchcase(name, entry):
                return f"skip={entry!r}"
        elif any(isinstance(each, entry) for each in (layer, *holders)):
            return f"skip={entry.__name__}"
    return ""


def check_names(subject: str, names: Iterable[str], layers: Iterable[str]) -> None:
    """Check that each name or glob pattern matches a layer.

    Raises:
        ArgumentError: one does not; the message has the nearest names.

    Example:
        >>> check_names("skip", ["conv3"], ["conv1", "conv2"])
        Traceback (most recent call last):
        ...
        lean_fx.errors.ArgumentError: skip: no layer is named 'conv3'; near it: conv2, conv1
    """
    known = list(layers)
    for name in names:
        if not any(fnmatch.fnmatchcase(layer, name) for layer in known):
            near = ", ".join(get_close_matches(name, known) or known[:3]) or "no layer at all"
            raise ArgumentError(f"{subject}: no layer is named {name!r}; near it: {near}")
