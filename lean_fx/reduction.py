r"""The LEAN reduction: Algorithm 2 of the paper, one matrix per position, one iteration.

The ``C_in`` channels of a position (a pixel, a time step, a sample) are viewed as a matrix ``X`` of
``C'`` *preserved* by ``C''`` *reducible* channels, ``C_in = C' C''``. A *seed* ``V`` of ``C'``
values is learned and shared by all positions::

    G      = X X^T                      affinity, C' x C'
    A[i,j] = G[i,j] / sum_i |G[i,j]|    each column has l1 norm 1
    y      = A V
    out    = y / sum_i |y[i]|           C' channels in place of C_in

A column of zeros stays zero, so a position whose channels are all zero (frequent after ReLU) gives
zeros, forward and backward, never NaN.

References:
    Huang, Shah, Evans, Yoo: Less-Energy-Usage Network with Batch Power Iteration, ICML 2023
    workshop on Neural Compression, Algorithm 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lean_fx.errors import ArgumentError


def divisors(number: int) -> list[int]:
    """The divisors of a positive number, ascending.

    Example:
        >>> divisors(50)
        [1, 2, 5, 10, 25, 50]
    """
    low = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]


def check_channels(owner: str, in_channels: int, out_channels: int) -> None:
    """Check that ``out_channels`` is a divisor of ``in_channels``.

    Raises:
        ArgumentError: either is no positive int, or the division leaves a rest.
    """
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ArgumentError(f"{owner}: {name}={value!r} is not an int of 1 or more")
    if in_channels % out_channels:
        usable = [str(d) for d in divisors(in_channels)]
        choice = " or ".join(filter(None, (", ".join(usable[:-1]), usable[-1])))
        raise ArgumentError(
            f"{owner}: out_channels={out_channels} does not divide in_channels={in_channels}; "
            f"use {choice}"
        )


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide, and where the denominator is zero (or denormal) leave the numerator as it is."""
    tiny = torch.finfo(denominator.dtype).tiny
    return numerator / torch.where(denominator > tiny, denominator, torch.ones_like(denominator))


def lean_reduction(x: Tensor, seed: Tensor, dim: int = 1) -> Tensor:
    """Reduce the channels of every position of ``x`` from C_in to C'.

    Args:
        x: values with their channels along ``dim``; floating point.
        seed: the seed ``V``; its length ``C'`` divides the channels of ``x``.
        dim: the axis of the channels.

    Shape:
        - x: ``[..., C_in, ...]``, ``C_in`` along ``dim``
        - seed: ``[C']``
        - output: as ``x``, with ``C'`` along ``dim``; its absolute values sum to 1 (or are 0) there

    Example:
        >>> x = torch.rand(2, 50, 8, 8)
        >>> y = lean_reduction(x, torch.randn(10))
        >>> y.shape
        torch.Size([2, 10, 8, 8])
        >>> bool(torch.allclose(y.abs().sum(1), torch.ones(2, 8, 8)))
        True

    References:
        Huang et al. (2023), Algorithm 2.
    """
    preserved = seed.shape[0]
    matrix = torch.unflatten(x.movedim(dim, -1), -1, (preserved, -1))
    affinity = matrix @ matrix.mT
    transition = _divide(affinity, affinity.abs().sum(-2, keepdim=True))
    y = (transition @ seed.to(matrix.dtype).unsqueeze(-1)).squeeze(-1)
    y = _divide(y, y.abs().sum(-1, keepdim=True))
    return y.movedim(-1, dim)


class LeanReduction(nn.Module):
    """Reduce C_in channels to C' by one step of a random walk over them, with a learned seed.

    Its ``out_channels`` seed values, drawn from a standard normal, are all its parameters.

    Args:
        in_channels: the channels ``C_in`` of the input, 1 or more.
        out_channels: the preserved channels ``C'``, a divisor of ``in_channels``.
        dim: the axis of the channels.

    Shape:
        - input: ``[..., C_in, ...]``, ``C_in`` along ``dim``
        - output: ``[..., C', ...]``

    Raises:
        ArgumentError: ``out_channels`` does not divide ``in_channels``, or is no positive int.

    Example:
        >>> LeanReduction(50, 10)(torch.rand(2, 50, 8, 8)).shape
        torch.Size([2, 10, 8, 8])
        >>> LeanReduction(50, 10, dim=-1)(torch.rand(2, 7, 50)).shape
        torch.Size([2, 7, 10])
        >>> LeanReduction(8, 3)
        Traceback (most recent call last):
        ...
        lean_fx.errors.ArgumentError: LeanReduction: out_channels=3 does not divide in_channels=8; \
use 1, 2, 4 or 8

    References:
        Huang et al. (2023), Algorithm 2.
    """

    def __init__(self, in_channels: int, out_channels: int, dim: int = 1) -> None:
        super().__init__()
        check_channels("LeanReduction", in_channels, out_channels)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.dim = dim
        self.seed = nn.Parameter(torch.empty(out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the seed anew from a standard normal."""
        nn.init.normal_(self.seed)

    @property
    def macs_per_position(self) -> int:
        """Multiply-adds of one position: ``C' C_in`` for the affinity, ``C'^2`` for the step."""
        return self.out_channels * (self.in_channels + self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Reduce ``x``; see :func:`lean_reduction`."""
        return lean_reduction(x, self.seed, self.dim)

    def extra_repr(self) -> str:
        """The arguments, as in torch.nn."""
        return f"{self.in_channels}, {self.out_channels}, dim={self.dim}"
