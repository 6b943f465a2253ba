"""What a user asked for, and what that says against a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from lean_fx.passes import Read
from lean_fx.planning.policy import ChannelsPolicy, skipped_by
from lean_fx.planning.unseen import holders_of
from lean_fx.reduction.registry import ReductionFactory


@dataclass(frozen=True)
class Options:
    """What a user asked for; see :func:`lean_fx.leanify`.

    ``modules`` are those of the model, by name: a graph does not know the types of what holds its
    layers.
    """

    channels: ChannelsPolicy = "sqrt"
    align: int | None = None
    reduction: str | ReductionFactory = "lean"
    min_channels: int = 16
    skip: tuple[str | type[nn.Module], ...] = ()
    filter: Callable[[nn.Module, str], bool] | None = None
    reduce_inputs: bool = False
    modules: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)


def unwanted(read: Read, name: str, layer: nn.Module, options: Options) -> str:
    """Why the user does not want this layer to be reduced, or an empty string."""
    reason = named_by_user(name, layer, options)
    if getattr(layer, "num_layers", 1) > 1:  # as a stack, it is its first layer that is reduced
        reason = reason or named_by_user(f"{name}.0", layer, options)
    if reason:
        return reason
    if read.in_channels < options.min_channels:
        each = f" of each of {read.groups} groups" if read.groups > 1 else ""
        return f"in_channels={read.in_channels}{each} is below min_channels={options.min_channels}"
    if not read.intermediate and not options.reduce_inputs:
        return "reads the model's input, no intermediate value; reduce_inputs=True reduces it too"
    return ""


def named_by_user(name: str, layer: nn.Module, options: Options) -> str:
    """What the user's skip and filter say against a layer, or an empty string."""
    reason = skip_reason(name, layer, options)
    if not reason and options.filter is not None and not options.filter(layer, name):
        return "filter(module, name) is false"
    return reason


def skip_reason(name: str, layer: nn.Module, options: Options) -> str:
    """What the user's skip says against a layer or what holds it, or an empty string."""
    holders = [options.modules[each] for each in holders_of(name) if each in options.modules]
    return skipped_by(options.skip, name, layer, holders)
