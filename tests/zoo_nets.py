"""Small nets that stand for the models of a zoo; the processes of the zoo import them by name."""

import os
import signal
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def small() -> nn.Module:
    """Three convs and a linear layer: of the sites, all can be reduced."""
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    layers += [nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 64, 1), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*layers)


class Branching(nn.Module):
    """Cannot be traced: it branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = small()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x if x.sum() > 0 else -x)


class OneSize(nn.Module):
    """Takes pictures of 96x96 alone, and multiplies with a weight that it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 32, 32)
        self.weight = nn.Parameter(torch.randn(32, 16))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(2).transpose(1, 2) + torch.zeros(9, 1)
        return self.head(F.linear(y, self.weight * 2).relu().mean(1))


class Killed(nn.Module):
    """Dies as a process that the machine has no memory for."""

    def forward(self, x: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return x


class Endless(nn.Module):
    """Never comes to an end."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(1000)
        return x


class Larger(nn.Module):
    """Takes pictures of 64x64, but to be trained only those of 128x128."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = small()

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[-1] < 128:
            raise ValueError("too small")
        return self.layers(x)


class Fixed(nn.Module):
    """Cannot be trained at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = small()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise NotImplementedError("only eval")
        return self.layers(x)
