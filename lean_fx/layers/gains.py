"""How much smaller a reduction makes what a layer reads, and the weights that make up for it.

At one position of a value, the channels have a mean, which they share, and each differs from it. A
net tells inputs apart by the differences. A reduction that averages keeps what is shared and makes
the differences smaller: the mean of a group of ``g`` channels keeps about ``1/sqrt(g)`` of them.
Were a rebuilt layer scaled by one number, each layer would pass on less of the differences than the
layer that it replaces, and in a deep net none would be left. So the weights ``w_j`` of an output
are scaled in two parts::

    w_j = shared * mean(w) + apart * (w_j - mean(w))

where the means are over the reduced channels, ``shared`` makes up for the mean of the value and
``apart`` for the differences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gains:
    """How many times larger what the old layer read is than what the new one reads.

    Attributes:
        whole: by root mean squares.
        shared: what all channels share.
        apart: what differs from that.
        channels: how many the new layer reads, in one group if there are several; 0 if ``whole``
            is all that is known.
        channels_last: whether what a flatten makes holds the channels of one position together.
    """

    whole: float = 1.0
    shared: float = 1.0
    apart: float = 1.0
    channels: int = 0
    channels_last: bool = False


def gains_between(
    rms: float, values: Tensor, reduced: Tensor, *, channels_last: bool = False
) -> Gains:
    """The gains from what a reduction makes to what it reads.

    If an element of either is below 0, ``whole`` is all: a mean of the channels near 0 is chance.

    Args:
        rms: the root mean square of what the reduction reads.
        values: a sample of that.
        reduced: what it makes of the sample.
        channels_last: of the gains.

    Shape:
        - values: ``[N, C]``.
        - reduced: ``[N, C']``.

    Example:
        >>> values = torch.rand(1000, 64)
        >>> gains = gains_between(0.577, values, values.view(1000, 16, 4).mean(2))
        >>> f"{gains.whole:.1f} {gains.shared:.1f} {gains.apart:.1f}"
        '1.1 1.0 2.0'
    """
    whole = rms / float(reduced.square().mean().sqrt())
    channels = reduced.shape[1]
    if channels == 1 or values.min() < 0 or reduced.min() < 0:
        return Gains(whole)
    before, after = _parts(values), _parts(reduced)
    if min(*before, *after) <= 0:
        return Gains(whole)
    shared, apart = ((old / new) ** 0.5 for old, new in zip(before, after, strict=True))
    return Gains(whole, shared, apart, channels, channels_last)


def _parts(values: Tensor) -> tuple[float, float]:
    """The mean squares of what the channels share and of the rest, were they a sample of many."""
    apart = values.var(1).mean()
    return float(values.mean(1).square().mean() - apart / values.shape[1]), float(apart)


def scaled(weight: Tensor, gains: Gains, axis: int, groups: int = 1) -> Tensor:
    """A weight scaled by gains.

    Args:
        weight: of a rebuilt layer.
        gains: by which.
        axis: of its input channels, or features.
        groups: how many groups of channels that axis holds.
    """
    if not gains.channels:
        return weight * gains.whole
    sizes = (-1, gains.channels) if gains.channels_last else (groups, gains.channels, -1)
    parts = torch.unflatten(weight, axis, sizes)
    mean = parts.mean(axis + 1, keepdim=True)
    made: Tensor = (mean * gains.shared + (parts - mean) * gains.apart).reshape(weight.shape)
    return made
