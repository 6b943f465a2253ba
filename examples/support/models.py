"""The paper's net at any width, and the narrower one that a reduced net must beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import floor

import torch
from torch import Tensor, nn

from lean_fx.checks import check_int, check_ints
from lean_fx.errors import ArgumentError

PAPER_WIDTHS = (50, 100, 150)


class PaperNet(nn.Module):
    """3x3 convolutions, each with ReLU and 2x2 max pooling, then one linear layer.

    At the defaults this is the net of the paper's experiment, rebuilt from its counts:
    397,660 parameters. Its submodules are ``conv1``, ``relu1``, ``pool1``, ``conv2`` and so on,
    then ``linear``.

    Args:
        widths: output channels of each convolution; one or more numbers, each at least 1.
        in_channels: channels of the pictures, at least 1.
        image_size: height and width of the pictures in pixels, at least 2 to the power of
            ``len(widths)``, as each pooling halves it.
        classes: outputs of the linear layer, at least 1.

    Shape:
        - input: ``[N, in_channels, image_size, image_size]``
        - output: ``[N, classes]``, logits

    Raises:
        ArgumentError: a number is out of range, or the picture too small for the poolings.

    Example:
        >>> net = PaperNet(widths=(4, 8), in_channels=1, image_size=8)
        >>> net(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])

    References:
        Huang, Shah, Evans, Yoo, "Less-Energy-Usage Network with Batch Power Iteration",
        ICML 2023 workshop on Neural Compression.
    """

    def __init__(
        self,
        widths: Sequence[int] = PAPER_WIDTHS,
        in_channels: int = 3,
        image_size: int = 96,
        classes: int = 10,
    ) -> None:
        super().__init__()
        side = _last_side(widths, in_channels, image_size, classes)
        self.widths = tuple(widths)
        channels = in_channels
        for number, width in enumerate(self.widths, start=1):
            self.add_module(f"conv{number}", nn.Conv2d(channels, width, 3, padding=1))
            self.add_module(f"relu{number}", nn.ReLU())
            self.add_module(f"pool{number}", nn.MaxPool2d(2))
            channels = width
        self.linear = nn.Linear(channels * side * side, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[N, classes]`` of pictures ``[N, C, H, W]``."""
        for number in range(1, len(self.widths) + 1):
            for kind in ("conv", "relu", "pool"):
                x = self.get_submodule(f"{kind}{number}")(x)
        return self.linear(torch.flatten(x, 1))  # type: ignore[no-any-return]


def parameters_of(
    widths: Sequence[int] = PAPER_WIDTHS,
    *,
    in_channels: int = 3,
    image_size: int = 96,
    classes: int = 10,
) -> int:
    """Count the parameters of a :class:`PaperNet` without building it.

    Args:
        widths: as in :class:`PaperNet`, like the other arguments.
        in_channels: channels of the pictures.
        image_size: height and width of the pictures in pixels.
        classes: outputs of the linear layer.

    Raises:
        ArgumentError: as in :class:`PaperNet`.

    Example:
        >>> parameters_of()
        397660
    """
    side = _last_side(widths, in_channels, image_size, classes)
    inputs = (in_channels, *widths[:-1])
    convolutions = sum((9 * c + 1) * width for c, width in zip(inputs, widths, strict=True))
    return convolutions + (widths[-1] * side * side + 1) * classes


def narrow_widths(
    parameters: int,
    *,
    widths: Sequence[int] = PAPER_WIDTHS,
    in_channels: int = 3,
    image_size: int = 96,
    classes: int = 10,
) -> tuple[int, ...]:
    """Scale ``widths`` down by one factor so that the net has about ``parameters`` parameters.

    This is the control of equal budget: the same net, only narrower. Each width is
    ``max(1, round(factor * width))`` with a factor in ]0, 1]; of all nets that such a factor can
    give, the one with the nearest count is taken, the smaller at a tie.

    Args:
        parameters: the budget, at least 1. A budget outside what the factors reach gives the
            nearest end: ``widths`` itself, or a net of one channel a layer.
        widths: the widths to scale down.
        in_channels: as in :class:`PaperNet`.
        image_size: as in :class:`PaperNet`.
        classes: as in :class:`PaperNet`.

    Raises:
        ArgumentError: ``parameters`` is below 1, or another argument is out of range.

    Example:
        >>> narrow_widths(38590)
        (8, 16, 23)
        >>> parameters_of((8, 16, 23))
        37857
    """
    check_int("narrow_widths: parameters", parameters, 1)
    _last_side(widths, in_channels, image_size, classes)
    shape = {"in_channels": in_channels, "image_size": image_size, "classes": classes}
    return nearest_widths(parameters, widths, lambda net: parameters_of(net, **shape))


def nearest_widths(
    parameters: int, widths: Sequence[int], count: Callable[[tuple[int, ...]], int]
) -> tuple[int, ...]:
    """Scale the widths of any net by one factor in ]0, 1], as :func:`narrow_widths` does.

    Args:
        parameters: the budget.
        widths: the widths to scale down.
        count: gives the parameters of the net of some widths.

    Example:
        >>> nearest_widths(9, (8, 4), lambda widths: widths[0] * widths[1])
        (4, 2)
    """
    # Only at these factors does a width step up, so that they give every net there is.
    steps = {Fraction(2 * k + 1, 2 * width) for width in widths for k in range(width)}
    nets = {scaled_widths(widths, factor) for factor in {Fraction(0), *steps}}

    def distance(net: tuple[int, ...]) -> tuple[int, int]:
        there = count(net)
        return abs(there - parameters), there

    return min(nets, key=distance)


def scaled_widths(widths: Sequence[int], factor: float | Fraction) -> tuple[int, ...]:
    """Multiply widths by a factor and round them; none goes below 1.

    Example:
        >>> scaled_widths(PAPER_WIDTHS, 0.25)
        (13, 25, 38)
    """
    return tuple(max(1, floor(Fraction(factor) * width + Fraction(1, 2))) for width in widths)


def _last_side(widths: Sequence[int], in_channels: int, image_size: int, classes: int) -> int:
    """Return the pixels a side after the last pooling; refuse numbers that make no net."""
    check_ints("PaperNet: widths", widths, 1)
    check_int("PaperNet: in_channels", in_channels, 1)
    check_int("PaperNet: image_size", image_size, 1)
    check_int("PaperNet: classes", classes, 1)
    smallest = 1 << len(widths)
    if image_size < smallest:
        raise ArgumentError(
            f"PaperNet: image_size={image_size} does not survive {len(widths)} poolings of 2x2; "
            f"use {smallest} or more, or fewer widths"
        )
    return image_size // smallest
