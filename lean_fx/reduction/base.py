"""What all reductions have in common: their channels and what they reduce, checked."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lean_fx.checks import check_int, one_of
from lean_fx.errors import ArgumentError
from lean_fx.reduction.packed import with_data

_MAX_CHANNELS = 2**31 - 1


@torch.fx.wrap
def as_contiguous(reduced: Tensor, x: Tensor) -> Tensor:
    """``reduced``, made contiguous if ``x`` is. A call of it is a node in a graph."""
    return reduced.contiguous() if x.is_contiguous() else reduced


def divisors(number: int) -> list[int]:
    """The divisors of a positive number, ascending.

    Example:
        >>> divisors(50)
        [1, 2, 5, 10, 25, 50]
    """
    low = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]


def check_channels(owner: str, in_channels: int, out_channels: int) -> tuple[int, int]:
    """Check that ``out_channels`` is a divisor of ``in_channels``.

    Returns:
        Both, as ints of Python.

    Raises:
        ArgumentError: either is not a positive int, ``in_channels`` is above 2**31 - 1, or the
            division leaves a rest.
    """
    in_channels = check_int(f"{owner}: in_channels", in_channels, 1)
    out_channels = check_int(f"{owner}: out_channels", out_channels, 1)
    if in_channels > _MAX_CHANNELS:
        raise ArgumentError(
            f"{owner}: in_channels={in_channels} is above {_MAX_CHANNELS}; give less"
        )
    if in_channels % out_channels:
        raise ArgumentError(
            f"{owner}: out_channels={out_channels} does not divide in_channels={in_channels}; "
            f"use {one_of(divisors(in_channels))}"
        )
    return in_channels, out_channels


class Reduction(nn.Module):
    """What all reductions have in common: their arguments and what they reduce, checked.

    A reduction says in :meth:`reduce` what it makes of values that fit.

    Args:
        in_channels: the channels ``C_in`` of the input, 1 or more.
        out_channels: the channels ``C'`` of the output, a divisor of ``in_channels``.
        dim: the axis of the channels.

    Shape:
        - input: ``[..., C_in, ...]``, ``C_in`` along ``dim``
        - output: ``[..., C', ...]``

    Raises:
        ArgumentError: ``out_channels`` does not divide ``in_channels``, or one is not an int.

    Example:
        >>> import torch
        >>> class Every(Reduction):
        ...     def reduce(self, x):
        ...         return x[..., :: self.in_channels // self.out_channels]
        >>> Every(4, 2, dim=-1)(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor([1., 3.])
    """

    #: Whether the result is a view of the values, for which nothing is computed.
    gives_view = False

    def __init__(self, in_channels: int, out_channels: int, dim: int = 1) -> None:
        super().__init__()
        owner = type(self).__name__
        self.in_channels, self.out_channels = check_channels(owner, in_channels, out_channels)
        self.dim = check_int(f"{owner}: dim", dim)

    @property
    def macs_per_position(self) -> int | None:
        """Multiply-adds of one position.

        None, the default, counts the products of torch's operators. Override it where the products
        are element by element, which no counter can tell from other arithmetic.
        """
        return None

    def forward(self, x: Tensor) -> Tensor:
        """Reduce ``x``; for packed sequences, reduce their data.

        Contiguous values are reduced to contiguous ones, unless these are a view of them, so that
        a ``view`` that follows still works.

        Raises:
            ArgumentError: ``x`` does not have ``in_channels`` along ``dim``.
        """
        if isinstance(x, PackedSequence):
            return with_data(x, self.forward(x.data))
        if isinstance(x, Tensor):  # and not the proxy of one
            self._check(x)
        reduced = self.reduce(x)
        return reduced if self.gives_view else as_contiguous(reduced, x)

    def _check(self, x: Tensor) -> None:
        subject, shape = type(self).__name__, list(x.shape)
        if not -x.dim() <= self.dim < x.dim():
            raise ArgumentError(
                f"{subject}: dim={self.dim} is not an axis of {shape}; give values of more axes, "
                "or another dim"
            )
        if x.shape[self.dim] != self.in_channels:
            raise ArgumentError(
                f"{subject}: axis {self.dim} of {shape} is not in_channels={self.in_channels}; "
                "give such values, or another dim"
            )

    def reduce(self, x: Tensor) -> Tensor:
        """Reduce values that have ``in_channels`` along ``dim``."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The arguments, as in torch.nn."""
        return f"{self.in_channels}, {self.out_channels}, dim={self.dim}"
