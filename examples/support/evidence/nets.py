"""The residual and the densely connected net of the evidence, at any width."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lean_fx.measure.costs import count_parameters

RESNET_WIDTHS = (32, 64, 128)
#: Layers of :class:`ResNet` that are left alone; the convolutions of the branches are reduced.
RESNET_SKIP = ("stem", "head", "blocks.*.shortcut*")
DENSENET_SKIP = ("stem", "head")


class Block(nn.Module):
    """A basic block: two 3x3 convolutions with batch norm, added to what it read.

    Args:
        inputs: channels that it reads.
        outputs: channels that it makes.
        stride: of the first convolution and of the shortcut.
        inner: channels between the two convolutions.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, 1, bias=False)
        self.norm1, self.relu1 = nn.BatchNorm2d(inner), nn.ReLU()
        self.conv2 = nn.Conv2d(inner, outputs, 3, 1, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(outputs), nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """The branch, added to the shortcut."""
        y = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        out: Tensor = self.relu2(y + self.shortcut(x))
        return out


class ResNet(nn.Module):
    """A stem, two basic blocks for each width, the mean over all places, one linear layer.

    Args:
        widths: channels of each stage; each but the first begins with a stride of 2.
        inner: what part of a block's channels is left between its two convolutions; below 1
            the branch is a bottleneck while the sum keeps its width.
        classes: outputs.

    Example:
        >>> count_parameters(ResNet())
        696618
    """

    def __init__(
        self, widths: tuple[int, ...] = RESNET_WIDTHS, inner: float = 1.0, classes: int = 10
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.norm, self.relu = nn.BatchNorm2d(widths[0]), nn.ReLU()
        blocks, channels = [], widths[0]
        for stage, width in enumerate(widths):
            for number in range(2):
                stride = 2 if stage and not number else 1
                blocks.append(Block(channels, width, stride, max(1, round(inner * width))))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[N, classes]`` of pictures ``[N, 3, H, W]``."""
        x = self.blocks(self.relu(self.norm(self.stem(x))))
        out: Tensor = self.head(torch.flatten(self.pool(x), 1))
        return out


class DenseLayer(nn.Module):
    """Batch norm, ReLU and a 3x3 convolution, put behind what it read.

    Args:
        inputs: channels that it reads.
        growth: channels that it adds.
        inner: channels of a 1x1 convolution before, which is the usual bottleneck; 0 for none.
    """

    def __init__(self, inputs: int, growth: int, inner: int) -> None:
        super().__init__()
        self.squeeze = nn.Sequential()
        if inner:
            self.squeeze.extend((nn.BatchNorm2d(inputs), nn.ReLU()))
            self.squeeze.append(nn.Conv2d(inputs, inner, 1, bias=False))
        self.norm, self.relu = nn.BatchNorm2d(inner or inputs), nn.ReLU()
        self.conv = nn.Conv2d(inner or inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """What it read and what it made, one behind the other."""
        return torch.cat((x, self.conv(self.relu(self.norm(self.squeeze(x))))), 1)


class DenseNet(nn.Module):
    """A stem, three blocks of four dense layers, a halving transition between any two blocks.

    Args:
        stem: channels of the stem.
        growth: channels that each dense layer adds.
        inner: channels of each layer's bottleneck; 0 for none.
        classes: outputs.

    Example:
        >>> count_parameters(DenseNet())
        135082
    """

    def __init__(self, stem: int = 32, growth: int = 16, inner: int = 0, classes: int = 10) -> None:
        super().__init__()
        self.growth = growth
        self.stem = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential()
        channels = stem
        for block in range(3):
            for _ in range(4):
                self.blocks.append(DenseLayer(channels, growth, inner))
                channels += growth
            if block < 2:
                half = max(1, channels // 2)
                self.blocks.extend((nn.BatchNorm2d(channels), nn.ReLU()))
                self.blocks.append(nn.Conv2d(channels, half, 1, bias=False))
                self.blocks.append(nn.AvgPool2d(2))
                channels = half
        self.norm, self.relu = nn.BatchNorm2d(channels), nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[N, classes]`` of pictures ``[N, 3, H, W]``."""
        x = self.pool(self.relu(self.norm(self.blocks(self.stem(x)))))
        out: Tensor = self.head(torch.flatten(x, 1))
        return out


def narrow_resnet(factor: float) -> ResNet:
    """The residual net with all widths scaled."""
    first, second, third = (max(1, round(factor * width)) for width in RESNET_WIDTHS)
    return ResNet((first, second, third))


def narrow_densenet(factor: float) -> DenseNet:
    """The dense net with its stem and its growth scaled."""
    return DenseNet(max(1, round(32 * factor)), max(1, round(16 * factor)))


def nearest_densenet(parameters: int) -> DenseNet:
    """The narrower dense net of about so many parameters.

    Its growth takes whole numbers, too far from each other for an equal budget, so that the stem
    is then moved by a few channels.
    """
    scaled = nearest_net(parameters, narrow_densenet)
    assert isinstance(scaled, DenseNet)
    growth, stem = scaled.growth, scaled.stem.out_channels

    def distance(width: int) -> int:
        with torch.device("meta"):
            return abs(count_parameters(DenseNet(width, growth)) - parameters)

    return DenseNet(min(range(max(1, stem - 6), stem + 7), key=distance), growth)


def nearest_net(parameters: int, make: Callable[[float], nn.Module]) -> nn.Module:
    """The net of about so many parameters, by bisection on a factor in ]0, 1].

    Args:
        parameters: the budget.
        make: builds the net of a factor; a larger factor never gives a smaller net.

    Example:
        >>> count_parameters(nearest_net(50, lambda factor: nn.Linear(round(100 * factor), 1)))
        50
    """

    def count(factor: float) -> int:
        with torch.device("meta"):
            return count_parameters(make(factor))

    low, high = 1e-6, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if count(middle) < parameters else (low, middle)
    return make(min((low, high), key=lambda factor: abs(count(factor) - parameters)))
