"""The nets of the evidence without branches to add: a VGG and an MLP-Mixer, at any width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Convolutions of each stage of VGG-11, and their widths at a quarter of the original's.
VGG_STAGES = ((16,), (32,), (64, 64), (128, 128), (128, 128))
#: Layers that are left alone: those that read the picture, and the classifier.
VGG_SKIP = ("features.0", "head")
MIXER_SKIP = ("patches", "head")


class Vgg(nn.Module):
    """VGG-11 with batch norm: 3x3 convolutions, a 2x2 max pooling behind each stage but the last.

    Args:
        factor: of all widths.
        classes: outputs.

    Example:
        >>> from lean_fx.measure.costs import count_parameters
        >>> count_parameters(Vgg())
        579098

    References:
        Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
        ICLR 2015, table 1, A.
    """

    def __init__(self, factor: float = 1.0, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential()
        channels = 3
        for number, stage in enumerate(VGG_STAGES, start=1):
            for full in stage:
                width = max(1, round(factor * full))
                self.features.append(nn.Conv2d(channels, width, 3, padding=1, bias=False))
                self.features.extend((nn.BatchNorm2d(width), nn.ReLU()))
                channels = width
            if number < len(VGG_STAGES):
                self.features.append(nn.MaxPool2d(2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[N, classes]`` of pictures ``[N, 3, H, W]``, 16 pixels or more."""
        out: Tensor = self.head(torch.flatten(self.pool(self.features(x)), 1))
        return out


class MixerBlock(nn.Module):
    """Two layers over the places, then two over the channels, each pair added to what it read.

    Args:
        width: channels.
        places: of a picture.
    """

    def __init__(self, width: int, places: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.places1, self.places2 = nn.Linear(places, width), nn.Linear(width, places)
        self.channels1, self.channels2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gelu = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``[N, places, width]``."""
        y = self.norm1(x).transpose(1, 2)
        x = x + self.places2(self.gelu(self.places1(y))).transpose(1, 2)
        out: Tensor = x + self.channels2(self.gelu(self.channels1(self.norm2(x))))
        return out


class Mixer(nn.Module):
    """An MLP-Mixer: patches of 4x4 pixels, four blocks, the mean over all places, a linear layer.

    Args:
        pixels: height and width of the pictures, a multiple of 4.
        width: channels.
        classes: outputs.

    Example:
        >>> from lean_fx.measure.costs import count_parameters
        >>> count_parameters(Mixer(24))
        156122

    References:
        Tolstikhin et al., "MLP-Mixer: An all-MLP Architecture for Vision", NeurIPS 2021.
    """

    def __init__(self, pixels: int, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.blocks = nn.Sequential(*(MixerBlock(width, (pixels // 4) ** 2) for _ in range(4)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[N, classes]`` of pictures ``[N, 3, pixels, pixels]``."""
        x = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        out: Tensor = self.head(self.norm(x).mean(1))
        return out
