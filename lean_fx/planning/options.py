"""The user's options, checked, and the layers that they exclude."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from lean_fx.checks import check_choice, check_int
from lean_fx.errors import ArgumentError
from lean_fx.graph.facts import ChannelRead
from lean_fx.planning.plans import Form
from lean_fx.planning.policy import (
    ChannelsPolicy,
    Skip,
    check_channels_policy,
    check_skip,
    skipped_by,
)
from lean_fx.planning.uncalled import holders_of
from lean_fx.reduction.registry import ReductionFactory, reduction_factory
from lean_fx.skip_reason import SkipReason

Keep = Literal["all", "saving", "measured"]


@dataclass(frozen=True)
class Options:
    """The options of :func:`lean_fx.leanify`, checked.

    ``modules`` holds the model's modules by name: a graph does not have the modules that were
    traced into.

    Raises:
        ArgumentError: an option is out of range.
    """

    channels: ChannelsPolicy = "sqrt"
    round_to: int | None = None
    reduction: str | ReductionFactory = "lean"
    min_channels: int = 16
    skip: Skip = ()
    filter_fn: Callable[[nn.Module, str], bool] | None = None
    reduce_inputs: bool = False
    keep: Keep = "all"
    kernel: bool | None = None
    form: Form = "graph"
    modules: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_channels_policy(self.channels)
        reduction_factory(self.reduction)
        if self.round_to is not None:
            self._set(round_to=check_int("round_to", self.round_to, 1))
        self._set(min_channels=check_int("min_channels", self.min_channels, 1))
        if not isinstance(self.reduce_inputs, bool):
            raise ArgumentError(f"reduce_inputs={self.reduce_inputs!r} is not True or False")
        if self.filter_fn is not None and not callable(self.filter_fn):
            raise ArgumentError(
                f"filter_fn={self.filter_fn!r} cannot be called; give filter_fn(module, name)"
            )
        if isinstance(self.channels, Mapping):
            self._set(channels=dict(self.channels))
        self._set(skip=check_skip(self.skip))
        check_choice("keep", self.keep, get_args(Keep))
        check_choice("form", self.form, get_args(Form))
        check_choice("kernel", self.kernel, (True, False, None))

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


def unwanted(read: ChannelRead, name: str, layer: nn.Module, options: Options) -> SkipReason | None:
    """Why the user does not want this layer to be reduced, or None."""
    reason = named_by_user(name, layer, options)
    if getattr(layer, "num_layers", 1) > 1:  # in a whole stack, layer 0 is the one that reads
        reason = reason or named_by_user(f"{name}.0", layer, options)
    if reason:
        return reason
    if read.in_channels < options.min_channels:
        each = f" of each of {read.groups} groups" if read.groups > 1 else ""
        least = options.min_channels
        text = f"in_channels={read.in_channels}{each} is below min_channels={least}"
        return SkipReason("min_channels", text)
    if not read.intermediate and not options.reduce_inputs:
        text = "reads the model's input, no intermediate value; reduce_inputs=True reduces it too"
        return SkipReason("model_input", text)
    return None


def named_by_user(name: str, layer: nn.Module, options: Options) -> SkipReason | None:
    """The reason if the user's skip or filter_fn excludes a layer, or None."""
    reason = skip_reason(name, layer, options)
    if not reason and options.filter_fn is not None and not options.filter_fn(layer, name):
        return SkipReason("filter_fn", "filter_fn(module, name) is false")
    return reason


def skip_reason(name: str, layer: nn.Module, options: Options) -> SkipReason | None:
    """The reason if the user's skip names a layer or a module around it, or None."""
    holders = [options.modules[each] for each in holders_of(name) if each in options.modules]
    text = skipped_by(options.skip, name, layer, holders)
    return SkipReason("skip", text) if text else None
