"""Reductions that LEAN must beat at the same budget, each a plug for ``leanify(reduction=...)``.

All view the C_in channels as C' preserved by C'' reducible ones, as LEAN does: channel
``i * C'' + k`` is ``X[i, k]``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lean_fx.reduction import check_channels


class Control(nn.Module):
    """What the controls have in common: their arguments, checked.

    Args:
        in_channels: the channels ``C_in`` of the input, 1 or more.
        out_channels: the channels ``C'`` of the output, a divisor of ``in_channels``.
        dim: the axis of the channels.

    Shape:
        - input: ``[..., C_in, ...]``, ``C_in`` along ``dim``
        - output: ``[..., C', ...]``

    Raises:
        ArgumentError: ``out_channels`` does not divide ``in_channels``, or is no positive int.
    """

    macs_per_position = 0

    def __init__(self, in_channels: int, out_channels: int, dim: int = 1) -> None:
        super().__init__()
        check_channels(type(self).__name__, in_channels, out_channels)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.dim = dim

    def extra_repr(self) -> str:
        """The arguments, as in torch.nn."""
        return f"{self.in_channels}, {self.out_channels}, dim={self.dim}"

    def grouped(self, x: Tensor) -> Tensor:
        """``x`` as ``[..., C', C'']``: the channels last, and split."""
        return torch.unflatten(x.movedim(self.dim, -1), -1, (self.out_channels, -1))


class SliceReduction(Control):
    """Keep the first C' channels: free, so the ceiling of what any reduction can save.

    Example:
        >>> SliceReduction(4, 2)(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([[1., 2.]])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Reduce ``x``."""
        return x.narrow(self.dim, 0, self.out_channels)


class MeanReduction(Control):
    """The mean over the reducible channels: ``y[i] = mean_k X[i, k]``.

    Example:
        >>> MeanReduction(4, 2)(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([[1.5000, 3.5000]])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Reduce ``x``."""
        return self.grouped(x).mean(-1).movedim(-1, self.dim)


class MaxReduction(Control):
    """The maximum over the reducible channels: ``y[i] = max_k X[i, k]``.

    Example:
        >>> MaxReduction(4, 2)(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([[2., 4.]])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Reduce ``x``."""
        return self.grouped(x).amax(-1).movedim(-1, self.dim)


class GroupedSumReduction(Control):
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
        self.macs_per_position = in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Reduce ``x``."""
        return (self.grouped(x) * self.weight).sum(-1).movedim(-1, self.dim)


class ProjectionReduction(Control):
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
        self.macs_per_position = in_channels * out_channels

    def _keep(self, weight: Tensor) -> None:
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Reduce ``x``."""
        return nn.functional.linear(x.movedim(self.dim, -1), self.weight).movedim(-1, self.dim)


class RandomProjectionReduction(ProjectionReduction):
    """A linear map that is drawn at random and stays: no parameters, a buffer of C' C_in values.

    Example:
        >>> sum(p.numel() for p in RandomProjectionReduction(50, 10).parameters())
        0
    """

    def _keep(self, weight: Tensor) -> None:
        self.register_buffer("weight", weight)
