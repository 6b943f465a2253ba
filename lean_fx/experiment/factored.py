"""Controls that put two smaller layers in the place of one: of low rank, or depthwise-separable."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeAlias

from torch import nn

from lean_fx.checks import check_int
from lean_fx.errors import ArgumentError

_Conv: TypeAlias = "nn.Conv1d | nn.Conv2d | nn.Conv3d"
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def low_rank(model: nn.Module, ranks: dict[str, int]) -> nn.Module:
    """Return a copy of a model in which layers are the product of two of a smaller rank.

    A linear layer becomes two, C_in to the rank to C_out; a convolution becomes one with its kernel
    to the rank, and one of 1x1. Groups are kept in the first. The weights are drawn anew.

    Args:
        model: stays as it is.
        ranks: by the names of the layers, each 1 or more.

    Raises:
        ArgumentError: a layer is neither linear nor a convolution.

    Example:
        >>> low_rank(nn.Sequential(nn.Linear(32, 10)), {"0": 4})
        Sequential(
          (0): Sequential(
            (0): Linear(in_features=32, out_features=4, bias=False)
            (1): Linear(in_features=4, out_features=10, bias=True)
          )
        )

    References:
        Denton et al., "Exploiting Linear Structure Within Convolutional Networks for Efficient
        Evaluation", NeurIPS 2014.
    """
    made = copy.deepcopy(model)
    for name, layer in _layers(made, ranks, "low_rank"):
        rank = check_int(f"low_rank: {name!r}", ranks[name], 1)
        if isinstance(layer, nn.Linear):
            first: nn.Module = nn.Linear(layer.in_features, rank, bias=False)
            second: nn.Module = nn.Linear(rank, layer.out_features, layer.bias is not None)
        else:
            rank = max(rank // layer.groups, 1) * layer.groups
            first = _conv(layer, layer.in_channels, rank, layer.groups)
            second = type(layer)(rank, layer.out_channels, 1, bias=layer.bias is not None)
        made.set_submodule(name, nn.Sequential(first, second))
    return made


def depthwise_separable(model: nn.Module, layers: Iterable[str]) -> nn.Module:
    """Return a copy of a model in which convolutions are depthwise, each with a 1x1 behind it.

    Linear layers and 1x1 convolutions have nothing to separate and stay. The weights of the others
    are drawn anew.

    Args:
        model: stays as it is.
        layers: by name.

    Raises:
        ArgumentError: a layer is neither linear nor a convolution.

    Example:
        >>> depthwise_separable(nn.Sequential(nn.Conv2d(32, 64, 3)), ["0"])
        Sequential(
          (0): Sequential(
            (0): Conv2d(32, 32, kernel_size=(3, 3), stride=(1, 1), groups=32, bias=False)
            (1): Conv2d(32, 64, kernel_size=(1, 1), stride=(1, 1))
          )
        )

    References:
        Howard et al., "MobileNets", arXiv:1704.04861, 2017.
    """
    made = copy.deepcopy(model)
    for name, layer in _layers(made, layers, "depthwise_separable"):
        if isinstance(layer, nn.Linear) or all(size == 1 for size in layer.kernel_size):
            continue
        wide = layer.in_channels
        first = _conv(layer, wide, wide, wide)
        second = type(layer)(
            wide, layer.out_channels, 1, groups=layer.groups, bias=layer.bias is not None
        )
        made.set_submodule(name, nn.Sequential(first, second))
    return made


def _layers(
    model: nn.Module, names: Iterable[str], control: str
) -> Iterable[tuple[str, nn.Linear | _Conv]]:
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, (nn.Linear, *_CONVS)):
            raise ArgumentError(
                f"{control}: {name!r} is a {type(layer).__name__}; only linear layers and "
                "convolutions can be factored; leave it out by sites"
            )
        yield name, layer


def _conv(layer: _Conv, inputs: int, outputs: int, groups: int) -> _Conv:
    """A convolution with the kernel, stride, padding and dilation of another, without a bias."""
    return type(layer)(
        inputs,
        outputs,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        groups,
        bias=False,
        padding_mode=layer.padding_mode,
    )
