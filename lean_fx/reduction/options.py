"""The options of a walk, checked."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from lean_fx.checks import check_choice, check_int, check_not_negative, check_positive
from lean_fx.errors import ArgumentError

Normalize = Literal["column", "row", "none"]
Scale = Literal["sum", "mean", "magnitude"]
Layout = Literal["contiguous", "interleaved"]


def check_options(
    owner: str,
    normalize: str,
    scale: str,
    layout: str,
    iterations: int,
    tol: float | None,
    damping: float = 0.0,
    norm_floor: float = 0.0,
) -> None:
    """Check the options of a walk.

    Raises:
        ArgumentError: one is out of its range; the message begins with ``owner``.
    """
    check_choice(f"{owner}: normalize", normalize, get_args(Normalize))
    check_choice(f"{owner}: scale", scale, get_args(Scale))
    check_choice(f"{owner}: layout", layout, get_args(Layout))
    check_int(f"{owner}: iterations", iterations, 1)
    if tol is not None:
        check_positive(f"{owner}: tol", tol, "leave it out for none")
    check_not_negative(f"{owner}: damping", damping)
    check_not_negative(f"{owner}: norm_floor", norm_floor)
    if damping and normalize == "none":
        raise ArgumentError(
            f"{owner}: damping={damping!r} with normalize='none' has no division to damp; use "
            "column or row, or leave damping out"
        )


def check_floating(owner: str, **values: Tensor) -> None:
    """Check that values are floating-point tensors.

    Raises:
        ArgumentError: one is not; the message begins with ``owner`` and names it.
    """
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ArgumentError(f"{owner}: {name} is a {type(value).__name__}; give a tensor")
        if not value.is_floating_point():
            raise ArgumentError(f"{owner}: {name} is {value.dtype}; give floating-point values")
