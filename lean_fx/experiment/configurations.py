"""The configuration of a trial, and the space that configurations are chosen from."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lean_fx.checks import check_choice, check_int, check_rate
from lean_fx.errors import ArgumentError
from lean_fx.reduction.registry import reduction_factory, reductions

Channels: TypeAlias = "int | float | str"

#: The controls that are not reductions; :class:`Space` says what each of them does.
CONTROLS = ("narrow", "narrow_macs", "narrow_latency", "low_rank", "depthwise")

#: The fields of a configuration that some arms ignore, by arm.
_UNREAD = {"baseline": ("channels", "sites"), "depthwise": ("channels",)}


@dataclass(frozen=True)
class Configuration:
    """One point of a :class:`Space`: how a model is made and trained.

    Attributes:
        arm: ``"baseline"``, a control, or a registered reduction.
        channels: C' as :func:`lean_fx.leanify` takes it.
        sites: which sites are reduced, as in :class:`Space`.
        learning_rate: of Adam.
        seed: of the first weights and of the order of the samples.
        options: of the reduction, by name.
    """

    arm: str
    channels: Channels = "sqrt"
    sites: str = "all"
    learning_rate: float = 1e-3
    seed: int = 0
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """A text by which equal configurations are known.

        Fields that the arm ignores do not count: a baseline has no C'.

        Example:
            >>> Configuration("baseline", 4).key == Configuration("baseline", 8).key
            True
        """
        values = {**dataclasses.asdict(self), "options": self.taken_options}
        for unread in _UNREAD.get(self.arm, ()):
            del values[unread]
        return json.dumps(values, sort_keys=True)

    @property
    def taken_options(self) -> dict[str, Any]:
        """The options that the arm takes.

        Example:
            >>> Configuration("lean", options=(("damping", 0.5), ("size", 3))).taken_options
            {'damping': 0.5}
        """
        known = _options_of(self.arm)
        return {name: value for name, value in self.options if name in known}

    @property
    def name(self) -> str:
        """Its name in tables and progress bars, without the seed.

        Example:
            >>> Configuration("lean_damped", 8, learning_rate=0.01).name
            'lean_damped 8, rate 0.01'
        """
        unread = _UNREAD.get(self.arm, ())
        parts = [self.arm if "channels" in unread else f"{self.arm} {self.channels}"]
        if "sites" not in unread and self.sites != "all":
            parts.append(f"sites {self.sites}")
        parts += [f"{name} {value}" for name, value in self.taken_options.items()]
        return ", ".join([*parts, f"rate {self.learning_rate:g}"])


@dataclass(frozen=True)
class Space:
    """The choices from which the trials of a study are made.

    Args:
        arms: ``"baseline"``; names of registered reductions; and controls: ``"narrow"``,
            ``"narrow_macs"`` and ``"narrow_latency"``, the same model made narrower until it has as
            many parameters, as many multiply-adds or as short a latency as the model reduced by
            ``like``; ``"low_rank"`` and ``"depthwise"``, which put two smaller layers in the place
            of each layer that would be reduced. The bottleneck, a 1x1 convolution before a layer,
            is the reduction ``"projection"``.
        channels: C' as :func:`lean_fx.leanify` takes it.
        sites: which sites are reduced: ``"all"``; ``"late"``, the later half; ``"last"``; the
            number of a site, such as ``"0"``, for only that one; or a glob pattern of layer names.
        learning_rates: each in ]0, 1].
        seeds: of the first weights and of the order of the samples.
        options: arguments of :class:`lean_fx.LeanReduction` and the values to try, such as
            ``{"damping": (0.0, 1.0)}``. Arms that do not take them are left as they are.
        like: the reduction that the narrow controls are made equal to.

    Raises:
        ArgumentError: a choice is empty, out of its range or not known.

    Example:
        >>> space = Space(arms=("baseline", "slice"), channels=(4, 8))
        >>> [configuration.name for configuration in space]
        ['baseline, rate 0.001', 'slice 4, rate 0.001', 'slice 8, rate 0.001']
    """

    arms: tuple[str, ...] = ("baseline", "narrow", "slice", "lean_damped")
    channels: tuple[Channels, ...] = ("sqrt",)
    sites: tuple[str, ...] = ("all",)
    learning_rates: tuple[float, ...] = (1e-3,)
    seeds: tuple[int, ...] = (0,)
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    like: str = "lean_damped"

    def __post_init__(self) -> None:
        for name in ("arms", "channels", "sites", "learning_rates", "seeds"):
            object.__setattr__(self, name, choices_of(f"Space: {name}", getattr(self, name)))
        if not isinstance(self.options, Mapping):
            raise ArgumentError(
                f"Space: options={self.options!r} is not a mapping; give {{'damping': (0.0, 1.0)}}"
            )
        options = {
            name: choices_of(f"Space: options[{name!r}]", each)
            for name, each in self.options.items()
        }
        object.__setattr__(self, "options", options)
        for arm in self.arms:
            check_choice("Space: arm", arm, ("baseline", *CONTROLS, *reductions()))
        check_choice("Space: like", self.like, reductions())
        taken = {name for arm in self.arms for name in _options_of(arm)}
        for name in options.keys() - taken:
            raise ArgumentError(
                f"Space: options: {name!r} is an argument of none of the arms "
                f"{', '.join(self.arms)}; correct the name, or leave it out"
            )
        for rate in self.learning_rates:
            check_rate("Space: learning rate", rate)
        for seed in self.seeds:
            check_int("Space: seed", seed, 0, 2**32 - 1)

    @property
    def choices(self) -> dict[str, tuple[Any, ...]]:
        """The choices for a configuration, by the names of its fields and options."""
        fields = {
            "arm": self.arms,
            "channels": self.channels,
            "sites": self.sites,
            "learning_rate": self.learning_rates,
            "seed": self.seeds,
        }
        return {**fields, **{f"option.{name}": each for name, each in self.options.items()}}

    @staticmethod
    def configuration(chosen: Mapping[str, Any]) -> Configuration:
        """The configuration of one choice for each name of :attr:`choices`."""
        own = {name: value for name, value in chosen.items() if not name.startswith("option.")}
        options = tuple(
            (name.removeprefix("option."), value)
            for name, value in chosen.items()
            if name.startswith("option.")
        )
        return Configuration(**own, options=options)

    def __iter__(self) -> Iterator[Configuration]:
        """The whole grid; of equal configurations only the first."""
        yield from map(self.configuration, self.grid().values())

    def grid(self) -> dict[str, dict[str, Any]]:
        """The choices of every configuration, by its key."""
        found: dict[str, dict[str, Any]] = {}
        for values in itertools.product(*self.choices.values()):
            chosen = dict(zip(self.choices, values, strict=True))
            found.setdefault(self.configuration(chosen).key, chosen)
        return found


def _options_of(arm: str) -> Collection[str]:
    """The names of the arguments of an arm that is a reduction."""
    return inspect.signature(reduction_factory(arm)).parameters if arm in reductions() else ()


def choices_of(subject: str, given: Any) -> tuple[Any, ...]:
    """A tuple of choices, none twice.

    Raises:
        ArgumentError: they are not a list of plain values, or there are none.

    Example:
        >>> choices_of("Space: channels", [8, 4, 8])
        (8, 4)
    """
    if isinstance(given, str | Mapping) or not hasattr(given, "__iter__"):
        raise ArgumentError(f"{subject}={given!r} is not a list of choices; give ({given!r},)")
    try:
        choices = tuple(dict.fromkeys(given))
    except TypeError:
        raise ArgumentError(
            f"{subject}={given!r} holds another list or table; give plain values"
        ) from None
    if not choices:
        raise ArgumentError(f"{subject} is empty; give one choice or more")
    return choices
