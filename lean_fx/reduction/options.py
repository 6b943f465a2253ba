"""The options of a walk, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from lean_fx.checks import check_choice, check_int, check_not_negative, check_positive
from lean_fx.errors import ArgumentError

Normalize = Literal["column", "row", "none"]
Scale = Literal["sum", "mean", "magnitude"]
Layout = Literal["contiguous", "interleaved"]


@dataclass(frozen=True)
class Walk:
    """The options of :func:`~lean_fx.lean_reduction`, which says what each does."""

    nonnegative: bool = False
    normalize: Normalize = "column"
    scale: Scale = "sum"
    layout: Layout = "contiguous"
    iterations: int = 1
    tol: float | None = None
    damping: float = 0.0
    norm_floor: float = 0.0

    def check(self, owner: str) -> None:
        """Check every option.

        Raises:
            ArgumentError: one is out of its range; the message begins with ``owner``.
        """
        check_choice(f"{owner}: normalize", self.normalize, get_args(Normalize))
        check_choice(f"{owner}: scale", self.scale, get_args(Scale))
        check_choice(f"{owner}: layout", self.layout, get_args(Layout))
        check_int(f"{owner}: iterations", self.iterations, 1)
        if self.tol is not None:
            check_positive(f"{owner}: tol", self.tol, "leave it out for none")
        check_not_negative(f"{owner}: damping", self.damping)
        check_not_negative(f"{owner}: norm_floor", self.norm_floor)
        if self.damping and self.normalize == "none":
            raise ArgumentError(
                f"{owner}: damping={self.damping!r} with normalize='none' has no division to damp; "
                "use column or row, or leave damping out"
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
