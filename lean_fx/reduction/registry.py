"""Reductions by name, so that a plan can be written down and an ablation changes one word."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from lean_fx.errors import ArgumentError
from lean_fx.reduction.conditioned import GatedReduction, SimplexReduction
from lean_fx.reduction.controls import (
    GroupedSumReduction,
    MaxReduction,
    MeanReduction,
    ProjectionReduction,
    RandomProjectionReduction,
    SliceReduction,
)
from lean_fx.reduction.lean import LeanReduction

#: Called as ``factory(in_channels, out_channels, dim=dim)``; a module class or a functools.partial.
ReductionFactory = Callable[..., nn.Module]

_FACTORIES: dict[str, ReductionFactory] = {
    "lean": LeanReduction,
    "lean_row": partial(LeanReduction, normalize="row"),
    "lean_mean": partial(LeanReduction, scale="mean"),
    "lean_magnitude": partial(LeanReduction, scale="magnitude"),
    "lean_matrix": partial(LeanReduction, scale="magnitude", seed="matrix"),
    "lean_damped": partial(
        LeanReduction,
        scale="magnitude",
        damping=1.0,
        norm_floor=0.1,
        seed_init="near_one",
    ),
    "lean_simplex": SimplexReduction,
    "lean_gated": GatedReduction,
    "slice": SliceReduction,
    "mean": MeanReduction,
    "max": MaxReduction,
    "grouped_sum": GroupedSumReduction,
    "projection": ProjectionReduction,
    "random_projection": RandomProjectionReduction,
}
_OWN = frozenset(_FACTORIES)


def reductions() -> tuple[str, ...]:
    """The registered names.

    Example:
        >>> reductions()
        ('lean', 'lean_row', 'lean_mean', 'lean_magnitude', 'lean_matrix', 'lean_damped', \
'lean_simplex', 'lean_gated', 'slice', 'mean', 'max', 'grouped_sum', 'projection', \
'random_projection')
    """
    return tuple(_FACTORIES)


def register_reduction(name: str, factory: ReductionFactory) -> None:
    """Give a reduction a name, for ``leanify(reduction=name)`` and for plans in JSON.

    Args:
        name: a name that is not taken yet, unless by the same factory.
        factory: a module class, or anything that is called as
            ``factory(in_channels, out_channels, dim=dim)`` and returns a module.

    Raises:
        ArgumentError: the name is taken, or the factory cannot be called, or is a module already.

    Example:
        >>> from functools import partial
        >>> from lean_fx.reduction.controls import MaxReduction
        >>> register_reduction("max_again", MaxReduction)
        >>> reduction_factory("max_again") is MaxReduction
        True
        >>> unregister_reduction("max_again")
    """
    if not isinstance(name, str) or not name:
        raise ArgumentError(f"register_reduction: name={name!r} is not a name; give a string")
    if not _is_factory(factory):
        raise ArgumentError(
            f"register_reduction: {name!r}: {type(factory).__name__} object is not a factory; give "
            "a module class, which is made anew for each site"
        )
    if _FACTORIES.get(name, factory) is not factory:
        raise ArgumentError(f"register_reduction: {name!r} is taken; choose another name")
    _FACTORIES[name] = factory


def unregister_reduction(name: str) -> None:
    """Undo :func:`register_reduction`. Unknown names, and those of lean_fx's own, are ignored."""
    if name not in _OWN:
        _FACTORIES.pop(name, None)


def reduction_factory(reduction: str | ReductionFactory) -> ReductionFactory:
    """The factory behind a name; a factory is returned as it is.

    Raises:
        ArgumentError: the name is unknown, or the value is neither a name nor callable.

    Example:
        >>> reduction_factory("lean").__name__
        'LeanReduction'
        >>> reduction_factory("leen")
        Traceback (most recent call last):
        ...
        lean_fx.errors.ArgumentError: reduction='leen' is not known; use lean, lean_row, \
lean_mean, lean_magnitude, lean_matrix, lean_damped, lean_simplex, lean_gated, slice, mean, \
max, grouped_sum, projection, random_projection or a module class
    """
    if isinstance(reduction, str):
        if reduction not in _FACTORIES:
            raise ArgumentError(
                f"reduction={reduction!r} is not known; use {', '.join(_FACTORIES)} or a "
                "module class"
            )
        return _FACTORIES[reduction]
    if not _is_factory(reduction):
        kind = type(reduction).__name__
        raise ArgumentError(
            f"reduction={kind} object is neither a name nor a module class; give the class, "
            "which is made anew for each site"
        )
    return reduction


def _is_factory(value: Any) -> bool:
    return callable(value) and not isinstance(value, nn.Module)


def registered_name(reduction: str | ReductionFactory) -> str | None:
    """The name under which a reduction is registered, or None.

    Example:
        >>> registered_name(LeanReduction), registered_name("slice"), registered_name(nn.Linear)
        ('lean', 'slice', None)
    """
    if isinstance(reduction, str):
        return reduction if reduction in _FACTORIES else None
    return next((name for name, factory in _FACTORIES.items() if factory is reduction), None)


def reduction_name(reduction: str | ReductionFactory) -> str:
    """The name to show for a reduction: its registered name, else its own.

    Example:
        >>> reduction_name(LeanReduction), reduction_name(partial(LeanReduction, tol=0.1))
        ('lean', 'LeanReduction')
    """
    if isinstance(reduction, str):
        return reduction
    made_by = reduction.func if isinstance(reduction, partial) else reduction
    own = getattr(made_by, "__name__", type(made_by).__name__)
    return registered_name(reduction) or str(own)


def make_reduction(
    reduction: str | ReductionFactory, in_channels: int, out_channels: int, dim: int
) -> nn.Module:
    """Make a reduction, and mark it as one.

    Raises:
        ArgumentError: the factory cannot be called so, or does not return a module.
    """
    name = reduction_name(reduction)
    try:
        module = reduction_factory(reduction)(in_channels, out_channels, dim=dim)
    except TypeError as error:
        raise ArgumentError(
            f"reduction={name} cannot be made with ({in_channels}, {out_channels}, dim={dim}): "
            f"{error}; its arguments must be (in_channels, out_channels, dim)"
        ) from error
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"reduction={name} makes a {type(module).__name__}, not a module")
    module.is_lean_reduction = True  # type: ignore[assignment]
    return module


def is_reduction(module: Any) -> bool:
    """Whether a module is a reduction: one of the registered classes, or one that we made."""
    registered = not {*type(module).__mro__}.isdisjoint(_FACTORIES.values())
    return registered or getattr(module, "is_lean_reduction", False) is True
