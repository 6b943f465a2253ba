"""Multiply-adds (MACs) of a convolution or linear layer, from what it reads and writes."""

from __future__ import annotations

from torch import nn

from lean_fx.layers.rebuild import input_weights


def layer_macs(layer: nn.Module, read: int, written: int) -> int:
    """MACs of a convolution or linear layer that reads and writes so many elements.

    ::

        convolution, linear       elements written x weights of one output channel
        transposed convolution    elements read x weights of one input channel

    Example:
        >>> layer_macs(nn.Conv2d(3, 8, 3, padding=1), read=3 * 25, written=8 * 25)
        5400
    """
    elements = read if getattr(layer, "transposed", False) else written
    weight = next(iter(input_weights(layer).values()))  # a weight norm computes `layer.weight`
    return elements * weight[0].numel()
