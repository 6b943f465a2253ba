"""Reductions that LEAN must beat at the same budget, each a choice of ``leanify(reduction=...)``.

All view the C_in channels as C' preserved by C'' reducible ones, as LEAN does: channel
``i * C'' + k`` is ``X[i, k]``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lean_fx.reduction.base import Reduction


def _grouped(reduction: Reduction, x: Tensor) -> Tensor:
    """``x`` as ``[..., C', C'']``: the channels last, and split."""
    return torch.unflatten(x.movedim(reduction.dim, -1), -1, (reduction.out_channels, -1))


class _WithoutProducts(Reduction):
    @property
    def macs_per_position(self) -> int:
        """Multiply-adds of one position."""
        return 0


class SliceReduction(_WithoutProducts):
    """Keep the first C' channels: free, so the ceiling of what any reduction can save.

    Example:
        >>> SliceReduction(4, 2)(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([[1., 2.]])
    """

    gives_view = True

    def reduce(self, x: Tensor) -> Tensor:
        """Reduce values that have ``in_channels`` along ``dim``."""
        return x.narrow(self.dim, 0, self.out_channels)


class MeanReduction(_WithoutProducts):
    """The mean over the reducible channels: ``y[i] = mean_k X[i, k]``.

    Example:
        >>> MeanReduction(4, 2)(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([[1.5000, 3.5000]])
    """

    def reduce(self, x: Tensor) -> Tensor:
        """Reduce values that have ``in_channels`` along ``dim``."""
        return _grouped(self, x).mean(-1).movedim(-1, self.dim)


class MaxReduction(_WithoutProducts):
    """The maximum over the reducible channels: ``y[i] = max_k X[i, k]``.

    Example:
        >>> MaxReduction(4, 2)(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([[2., 4.]])
    """

    def reduce(self, x: Tensor) -> Tensor:
        """Reduce values that have ``in_channels`` along ``dim``."""
        return _grouped(self, x).amax(-1).movedim(-1, self.dim)


class GroupedSumReduction(Reduction):
    """A learned weighted sum of each group: ``y[i] = sum_k w[i, k] X[i, k]``; C_in parameters.

    The weights are drawn from a normal of variance ``1 / C''``, which keeps the scale of ``x``.

    Example:
        >>> GroupedSumReduction(50, 10)(torch.rand(2, 50, 8, 8)).shape
        torch.Size([2, 10, 8, 8])
    """

    def __init__(self, in_channels: int, out_channels: int, dim: int = 1) -> None:
        super().__init__(in_channels, out_channels, dim)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // out_channels))
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    @property
    def macs_per_position(self) -> int:
        """Multiply-adds of one position."""
        return self.in_channels

    def reduce(self, x: Tensor) -> Tensor:
        """Reduce values that have ``in_channels`` along ``dim``."""
        return (_grouped(self, x) * self.weight).sum(-1).movedim(-1, self.dim)


class ProjectionReduction(Reduction):
    """A learned linear map (a 1x1 convolution without bias): ``y = W x``; C' C_in parameters.

    The weights are drawn from a normal of variance ``1 / C_in``, which keeps the scale of ``x``.

    Example:
        >>> ProjectionReduction(50, 10, dim=-1)(torch.rand(2, 7, 50)).shape
        torch.Size([2, 7, 10])
    """

    weight: Tensor

    def __init__(self, in_channels: int, out_channels: int, dim: int = 1) -> None:
        super().__init__(in_channels, out_channels, dim)
        weight = torch.randn(out_channels, in_channels) * in_channels**-0.5
        self._keep(weight)

    @property
    def macs_per_position(self) -> int:
        """Multiply-adds of one position."""
        return self.in_channels * self.out_channels

    def _keep(self, weight: Tensor) -> None:
        self.weight = nn.Parameter(weight)

    def reduce(self, x: Tensor) -> Tensor:
        """Reduce values that have ``in_channels`` along ``dim``."""
        return nn.functional.linear(x.movedim(self.dim, -1), self.weight).movedim(-1, self.dim)


class RandomProjectionReduction(ProjectionReduction):
    """A linear map that is drawn at random and stays: no parameters, a buffer of C' C_in values.

    Example:
        >>> sum(p.numel() for p in RandomProjectionReduction(50, 10).parameters())
        0
    """

    def _keep(self, weight: Tensor) -> None:
        self.register_buffer("weight", weight)
