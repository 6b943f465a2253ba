"""A layer made anew for fewer input channels, on the same device, in the same dtype and mode.

One function per kind of layer. Everything but the number of input channels stays. The parameters
are drawn anew by torch's own rule for the layer, since the net is trained from scratch, then
brought to the scale of the layer replaced: for inputs that are ``gain`` times smaller than before,
with a fan-in that is ``k`` times smaller, weights of root mean square ``rms(old) gain sqrt(k)``
give outputs of the same variance; biases get the root mean square of the old ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lean_fx.errors import PassError

_CONV_SETTINGS = ("stride", "padding", "dilation", "groups", "padding_mode")


def _conv(layer: nn.Module, in_channels: int) -> nn.Module:
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    names = (*_CONV_SETTINGS, "output_padding") if transposed else _CONV_SETTINGS
    weight = layer.get_parameter("weight")
    return type(layer)(
        in_channels,
        layer.out_channels,
        layer.kernel_size,
        bias=layer.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
        **{name: getattr(layer, name) for name in names},
    )


def _linear(layer: nn.Linear, in_channels: int) -> nn.Module:
    return nn.Linear(
        in_channels,
        layer.out_features,
        bias=layer.bias is not None,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )


#: The layers that can be rebuilt, by exact type: a subclass may override what forward means.
REBUILDERS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.ConvTranspose1d: _conv,
    nn.ConvTranspose2d: _conv,
    nn.ConvTranspose3d: _conv,
    nn.Linear: _linear,
}


def input_channels(layer: nn.Module) -> int:
    """The input channels of a conv, or the input features of a linear layer.

    Example:
        >>> input_channels(nn.Conv2d(3, 50, 3)), input_channels(nn.Linear(20, 10))
        (3, 20)
    """
    value = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    return int(value)  # type: ignore[arg-type]


def _rescale(made: nn.Module, layer: nn.Module, name: str, factor: float) -> None:
    """Give a parameter ``factor`` times the root mean square of the old layer's."""
    new, old = made.get_parameter(name), layer.get_parameter(name)
    drawn = new.detach().float().square().mean().sqrt()
    wanted = old.detach().float().square().mean().sqrt() * factor
    with torch.no_grad():
        new.mul_(wanted / drawn)


def rebuild(layer: nn.Module, in_channels: int, gain: float = 1.0) -> nn.Module:
    """Make ``layer`` anew for ``in_channels`` input channels (or features).

    Args:
        layer: a Conv, ConvTranspose or Linear, of exactly that type; it is not changed.
        in_channels: 1 or more, a multiple of the layer's groups.
        gain: how many times larger what the old layer read was than what the new one reads, by
            root mean squares; above 0.

    Returns:
        A layer of the same type and settings, its parameters initialised anew; parameters that
        do not require a gradient still do not.

    Raises:
        PassError: the type is none of these.

    Example:
        >>> rebuild(nn.Conv2d(50, 100, 3, padding=1), 10)
        Conv2d(10, 100, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
        >>> rebuild(nn.Linear(21600, 10, bias=False), 1440)
        Linear(in_features=1440, out_features=10, bias=False)
    """
    make = REBUILDERS.get(type(layer))
    if make is None:
        raise PassError(f"rebuild: {type(layer).__name__} is not a layer that can be rebuilt")
    made = make(layer, in_channels)
    if not layer.get_parameter("weight").is_meta:
        fan_ratio = input_channels(layer) / in_channels
        _rescale(made, layer, "weight", gain * fan_ratio**0.5)
        if layer.bias is not None:
            _rescale(made, layer, "bias", 1.0)
    for name, parameter in layer.named_parameters():
        made.get_parameter(name).requires_grad_(parameter.requires_grad)
    return made.train(layer.training)
