"""A layer made anew for fewer input channels, on the same device, in the same dtype and mode.

One function per kind of layer. Everything but the number of input channels stays. The weights
that multiply the input are drawn anew by torch's own rule for the layer, since the net is trained
from scratch, then brought to the scale of the layer replaced: for inputs that are ``gain`` times
smaller than before, with a fan-in that is ``k`` times smaller, weights of root mean square
``rms(old) gain sqrt(k)`` give outputs of the same variance. The biases of conv and linear layers
are drawn anew too, and get the root mean square of the old ones; all else of a recurrent layer
(recurrent weights, biases, further layers) keeps its values, and with them an initialisation that
was chosen for it, such as orthogonal weights or a forget gate's bias of 1; so does all else of a
layer of a subclass, which is a copy (see :mod:`lean_fx.layers.subclasses`).

A layer with torch's weight norm or spectral norm is rebuilt without, and gets it anew; one whose
norm is made of hooks gets the parametrization that has taken their place.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lean_fx.errors import PassError
from lean_fx.layers.old_norms import with_norm_of_today
from lean_fx.layers.subclasses import keeps_meaning, narrowed, scale_like

_CONV_SETTINGS = ("stride", "padding", "dilation", "groups", "padding_mode")


def _conv(layer: nn.Module, in_channels: int) -> nn.Module:
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    names = (*_CONV_SETTINGS, "output_padding") if transposed else _CONV_SETTINGS
    weight = next(iter(input_weights(layer).values()))
    made: nn.Module = plain_type(layer)(
        in_channels,
        layer.out_channels,
        layer.kernel_size,
        bias=layer.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
        **{name: getattr(layer, name) for name in names},
    )
    return made


def _linear(layer: nn.Linear, in_channels: int) -> nn.Module:
    weight = next(iter(input_weights(layer).values()))
    return nn.Linear(
        in_channels,
        layer.out_features,
        bias=layer.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )


def _recurrent(layer: Any, in_channels: int) -> nn.Module:
    names = ["num_layers", "bias", "batch_first", "dropout", "bidirectional"]
    names += ["nonlinearity"] * isinstance(layer, nn.RNN)
    names += ["proj_size"] * isinstance(layer, nn.LSTM)
    return _with_settings(layer, in_channels, names, layer.weight_ih_l0)


def _cell(layer: Any, in_channels: int) -> nn.Module:
    names = ["bias"] + ["nonlinearity"] * isinstance(layer, nn.RNNCell)
    return _with_settings(layer, in_channels, names, layer.weight_ih)


def _with_settings(layer: Any, in_channels: int, names: list[str], like: Tensor) -> nn.Module:
    made: nn.Module = type(layer)(
        in_channels,
        layer.hidden_size,
        device=like.device,
        dtype=like.dtype,
        **{name: getattr(layer, name) for name in names},
    )
    return made


#: The layers that can be rebuilt, by exact type: a subclass may override what forward means.
REBUILDERS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.ConvTranspose1d: _conv,
    nn.ConvTranspose2d: _conv,
    nn.ConvTranspose3d: _conv,
    nn.Linear: _linear,
    nn.RNN: _recurrent,
    nn.LSTM: _recurrent,
    nn.GRU: _recurrent,
    nn.RNNCell: _cell,
    nn.LSTMCell: _cell,
    nn.GRUCell: _cell,
}


#: What torch's own layers hold.
_WEIGHTS = re.compile(r"(weight|bias)(_(ih|hh|hr)(_l\d+(_reverse)?)?)?")

#: Parametrizations that a rebuilt layer can get anew.
_NORMS = (parametrizations._WeightNorm, parametrizations._SpectralNorm)


def plain_type(layer: nn.Module) -> type[nn.Module]:
    """The type of a layer, below its parametrizations if it has any.

    Example:
        >>> plain_type(parametrizations.weight_norm(nn.Linear(4, 2))).__name__
        'Linear'
    """
    return type(layer).__mro__[1] if parametrize.is_parametrized(layer) else type(layer)


def why_not_rebuilt(layer: nn.Module) -> str:
    """Why a layer cannot be rebuilt, for what it is; an empty string if it can.

    Example:
        >>> why_not_rebuilt(nn.Linear(4, 2)), why_not_rebuilt(nn.Bilinear(4, 4, 2))
        ('', 'Bilinear is not a layer that can be rebuilt')
    """
    kind = next((base for base in REBUILDERS if isinstance(layer, base)), None)
    if kind is None:
        return f"{type(layer).__name__} is not a layer that can be rebuilt"
    if not parametrize.is_parametrized(layer):
        strange = [name for name in _held(layer) if not _WEIGHTS.fullmatch(name)]
        if strange and plain_type(layer) is kind:
            return f"it holds {strange[0]}, which a rebuilt layer would lose"
        if not input_weights(layer):
            return "its weight is no parameter"
    if parametrize.is_parametrized(layer):
        known = all(len(each) == 1 and type(each[0]) in _NORMS for each in _parametrized(layer))
        if not known or not parametrize.is_parametrized(layer, "weight") or is_recurrent(layer):
            return "its weight is parametrized"
    if plain_type(layer) is not kind:
        simple = not is_recurrent(layer) and not parametrize.is_parametrized(layer)
        if not simple or not keeps_meaning(layer):
            own = f"{type(layer).__module__}.{type(layer).__qualname__}"
            return f"{own} is a subclass of {kind.__name__} and may mean more"
    return ""


def _held(layer: nn.Module) -> list[str]:
    return [*layer._parameters, *layer._buffers, *layer._modules]


def _parametrized(layer: Any) -> list[Any]:
    return list(layer.parametrizations.values())


def _normed(layer: Any, in_channels: int, gain: float) -> nn.Module:
    """A layer with a norm of its weight, rebuilt without, and then normed anew."""
    still = copy.deepcopy(layer).eval()  # the power iteration of spectral norm rests in eval mode
    # Not remove_parametrizations: it would change the class, which copies share.
    bare = REBUILDERS[plain_type(layer)](layer, input_channels(layer))
    if not next(layer.parameters()).is_meta:
        bare.load_state_dict({name: getattr(still, name).detach() for name in bare.state_dict()})
    made = rebuild(bare, in_channels, gain).train(layer.training)
    norm = layer.parametrizations.weight[0]
    if isinstance(norm, parametrizations._WeightNorm):
        parametrizations.weight_norm(made, dim=norm.dim)
    else:
        parametrizations.spectral_norm(
            made, n_power_iterations=norm.n_power_iterations, eps=norm.eps, dim=norm.dim
        )
    for name, parameter in layer.named_parameters():
        made.get_parameter(name).requires_grad_(parameter.requires_grad)
    return made


def is_recurrent(layer: nn.Module) -> bool:
    """Whether a layer is a recurrent one, or a cell of one."""
    return isinstance(layer, nn.RNNBase | nn.RNNCellBase)


def input_channels(layer: nn.Module) -> int:
    """The input channels of a conv, or the input features of a linear or recurrent layer.

    Example:
        >>> input_channels(nn.Conv2d(3, 50, 3)), input_channels(nn.Linear(20, 10))
        (3, 20)
        >>> input_channels(nn.GRU(40, 64))
        40
    """
    if is_recurrent(layer):
        return int(layer.input_size)  # type: ignore[arg-type]
    value = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    return int(value)  # type: ignore[arg-type]


def groups_of(layer: nn.Module) -> int:
    """The groups of a conv; 1 for any other layer.

    Example:
        >>> groups_of(nn.Conv2d(8, 8, 3, groups=4)), groups_of(nn.Linear(8, 8))
        (4, 1)
    """
    return int(getattr(layer, "groups", 1))


def input_weights(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that multiply the input, by name; of a stack of layers, the first one's.

    Example:
        >>> [*input_weights(nn.Linear(20, 10))], [*input_weights(nn.LSTM(8, 8, 2))]
        (['weight'], ['weight_ih_l0'])
    """
    names = ["weight", "weight_ih", "weight_ih_l0", "weight_ih_l0_reverse"]
    names += ["parametrizations.weight.original", "parametrizations.weight.original1"]
    names += ["weight_orig", "weight_v"]  # of the norms that torch made of hooks
    return {name: value for name, value in layer.named_parameters() if name in names}


def _rescale(new: nn.Parameter, old: nn.Parameter, factor: float) -> None:
    """Give a parameter ``factor`` times the root mean square of the old layer's."""
    with torch.no_grad():
        new.mul_(_root_mean_square(old) * factor / _root_mean_square(new))


def _root_mean_square(values: Tensor) -> Tensor:
    """In float32, or in float64 for such values."""
    return values.to(torch.promote_types(values.dtype, torch.float32)).square().mean().sqrt()


def rebuild(layer: nn.Module, in_channels: int, gain: float = 1.0) -> nn.Module:
    """Make ``layer`` anew for ``in_channels`` input channels (or features).

    Args:
        layer: a Conv, ConvTranspose, Linear, RNN, LSTM, GRU or a cell of these, of exactly that
            type or of a subclass that keeps its meaning; it is not changed.
        in_channels: 1 or more, a multiple of the layer's groups.
        gain: how many times larger what the old layer read was than what the new one reads, by
            root mean squares; above 0.

    Returns:
        A layer of the same type and settings, initialised as the module's docstring says;
        parameters that do not require a gradient still do not.

    Raises:
        PassError: the type is none of these.

    Example:
        >>> rebuild(nn.Conv2d(50, 100, 3, padding=1), 10)
        Conv2d(10, 100, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
        >>> rebuild(nn.Linear(21600, 10, bias=False), 1440)
        Linear(in_features=1440, out_features=10, bias=False)
        >>> rebuild(nn.GRU(64, 32, num_layers=2, batch_first=True), 8)
        GRU(8, 32, num_layers=2, batch_first=True)
    """
    layer = with_norm_of_today(layer)
    reason = why_not_rebuilt(layer)
    if reason:
        raise PassError(f"rebuild: {reason}")
    if parametrize.is_parametrized(layer):
        return _normed(layer, in_channels, gain)
    copied = type(layer) not in REBUILDERS
    if copied:
        made: nn.Module = copy.deepcopy(narrowed(layer, in_channels))
        nn.init.kaiming_uniform_(
            made.get_parameter("weight"), a=5**0.5
        )  # as torch's own layers are drawn
    else:
        made = REBUILDERS[type(layer)](layer, in_channels)
    factor = gain * (input_channels(layer) / in_channels) ** 0.5
    for name, parameter in layer.named_parameters():
        new = made.get_parameter(name)
        if not parameter.is_meta:
            if name in input_weights(layer):
                _rescale(new, parameter, factor)
            elif copied:
                continue
            elif is_recurrent(layer):
                new.data.copy_(parameter)
            else:
                _rescale(new, parameter, 1.0)
        new.requires_grad_(parameter.requires_grad)
    if copied:
        scale_like(made, layer, gain)
    made.train(layer.training)
    return made
