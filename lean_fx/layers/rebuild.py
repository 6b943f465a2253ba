"""Rebuild a layer for fewer input channels, on the same device, in the same dtype and mode.

Only the number of input channels changes. The new layer is a copy with narrower weights, or comes
from a user's own function (:func:`~lean_fx.layers.kinds.register_layer`).

The net is trained from scratch, so the weights that multiply the input are drawn by torch's own
rule. They are then scaled so that the outputs keep their variance: with a fan-in that is ``k``
times smaller, to a root mean square of ``rms(old) sqrt(k)``, and then by how much smaller the input
has become (:mod:`lean_fx.layers.gains`). The biases of conv and linear layers are drawn too, with
the root mean square of the old ones. Everything else keeps its values, and with them any special
initialisation: the recurrent weights, biases and further layers of a recurrent layer (orthogonal
weights, a forget gate's bias of 1), and the other parameters of a subclass
(:mod:`lean_fx.layers.subclasses`) or of a registered type.

A layer with torch's weight norm or spectral norm is rebuilt without it, and then gets it again, as
a parametrization.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lean_fx.errors import PassError, one_line_with_type
from lean_fx.layers.gains import Gains, scaled
from lean_fx.layers.kinds import (
    LayerKind,
    base_type,
    first_weight,
    groups_of,
    input_channels,
    input_weights,
    kind_of,
    known_kind_of,
)
from lean_fx.layers.legacy_norms import as_parametrization
from lean_fx.layers.strided import with_safe_backward
from lean_fx.layers.subclasses import is_channel_linear, narrowed, scale_like, shallow
from lean_fx.skip_reason import SkipReason

#: What torch's own layers hold.
_WEIGHTS = re.compile(r"(weight|bias)(_(ih|hh|hr)(_l\d+(_reverse)?)?)?")

_AS_LARGE = Gains()

#: Parametrizations that a rebuilt layer can get anew.
_NORMS = (parametrizations._WeightNorm, parametrizations._SpectralNorm)


def why_not_rebuilt(layer: nn.Module) -> SkipReason | None:
    """Why a layer of this type and with these parts cannot be rebuilt, or None.

    Example:
        >>> print(why_not_rebuilt(nn.Linear(4, 2)))
        None
        >>> print(why_not_rebuilt(nn.Bilinear(4, 4, 2)))
        Bilinear is not a layer that can be rebuilt
    """
    kind = kind_of(layer)
    if kind is None:
        name = type(layer).__name__
        return SkipReason("unsupported_layer", f"{name} is not a layer that can be rebuilt")
    if not parametrize.is_parametrized(layer):
        held = (*layer._parameters, *layer._buffers, *layer._modules)
        strange = [name for name in held if not _WEIGHTS.fullmatch(name)]
        if strange and base_type(layer) is kind.layer_type and not kind.registered:
            text = f"it holds {strange[0]}, which a rebuilt layer would lose"
            return SkipReason("unsupported_layer", text)
        if not input_weights(layer):
            return SkipReason("weight_computed", "its weight is not a parameter")
    else:
        lists: Any = layer.parametrizations
        known = all(len(each) == 1 and type(each[0]) in _NORMS for each in lists.values())
        simple = not kind.recurrent and not kind.registered
        if not known or not parametrize.is_parametrized(layer, "weight") or not simple:
            return SkipReason("parametrized", "its weight is parametrized")
    if base_type(layer) is not kind.layer_type:
        simple = not kind.recurrent and not parametrize.is_parametrized(layer)
        if not simple or not is_channel_linear(layer):
            own = f"{type(layer).__module__}.{type(layer).__qualname__}"
            text = f"{own} is a subclass of {kind.layer_type.__name__} and may mean more"
            return SkipReason("unsupported_layer", text)
    return None


def _rebuild_normed(layer: Any, in_channels: int, gains: Gains) -> nn.Module:
    """Rebuild a layer with a norm of its weight: without the norm first, then add it again."""
    still = copy.deepcopy(layer).eval()  # the power iteration of spectral norm rests in eval mode
    # remove_parametrizations would change the class, which copies share.
    bare = shallow(layer)
    bare.__class__ = base_type(layer)
    del bare.parametrizations
    bare.weight = nn.Parameter(still.weight.detach())
    bare._load_state_dict_pre_hooks = OrderedDict()  # of the norm
    made = rebuild(bare, in_channels, gains)
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


def _rescale(new: nn.Parameter, old: nn.Parameter, factor: float) -> None:
    """Give a parameter ``factor`` times the root mean square of the old layer's."""
    with torch.no_grad():
        new.mul_(_root_mean_square(old) * factor / _root_mean_square(new))


def _root_mean_square(values: Tensor) -> Tensor:
    """In float32, or in float64 for such values."""
    return values.to(torch.promote_types(values.dtype, torch.float32)).square().mean().sqrt()


def rebuild(layer: nn.Module, in_channels: int, gains: Gains = _AS_LARGE) -> nn.Module:
    """Make ``layer`` anew for ``in_channels`` input channels (or features).

    Args:
        layer: a Conv, ConvTranspose, Linear, RNN, LSTM, GRU or a cell of these, of exactly that
            type or of a subclass that keeps its meaning, or of a registered type; not changed.
        in_channels: 1 or more, a multiple of the layer's groups.
        gains: how many times larger what the old layer read was than what the new one reads. A
            layer of a subclass or of a registered type, which may arrange its weight in another
            way, is scaled by ``gains.whole``.

    Returns:
        A layer of the same type and settings (or a
        :class:`~lean_fx.layers.strided.StridedConv2d`), initialised as the module's docstring says;
        parameters that do not require a gradient still do not.

    Raises:
        PassError: the type is none of these, or what a user registered for it does not do.

    Example:
        >>> rebuild(nn.Conv2d(50, 100, 3, padding=1), 10)
        Conv2d(10, 100, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
        >>> rebuild(nn.Linear(21600, 10, bias=False), 1440)
        Linear(in_features=1440, out_features=10, bias=False)
        >>> rebuild(nn.GRU(64, 32, num_layers=2, batch_first=True), 8)
        GRU(8, 32, num_layers=2, batch_first=True)
    """
    layer = as_parametrization(layer)
    reason = why_not_rebuilt(layer)
    if reason:
        raise PassError(f"rebuild: {reason}")
    if parametrize.is_parametrized(layer):
        return _rebuild_normed(layer, in_channels, gains)
    kind = known_kind_of(layer)
    exact = type(layer) is kind.layer_type
    copied = kind.rebuild is None or not exact
    made = _narrow_copy(layer, in_channels) if copied else _renewed(layer, kind, in_channels)
    drawn = exact and not kind.recurrent and not kind.registered
    weights = input_weights(layer)
    if not exact or kind.registered:
        gains = Gains(gains.whole)
    factor = (input_channels(layer) / in_channels) ** 0.5
    for name, parameter in layer.named_parameters():
        new = made.get_parameter(name)
        if not parameter.is_meta:
            if name in weights:
                _rescale(new, parameter, factor)
                new.data.copy_(_scaled(new, made, gains))
            elif drawn:
                nn.init.uniform_(new, -1, 1)
                _rescale(new, parameter, 1.0)
            elif new.shape == parameter.shape:
                new.data.copy_(parameter)
        new.requires_grad_(parameter.requires_grad)
    if copied and not drawn and not kind.recurrent:
        scale_like(made, layer, gains.whole)
    return with_safe_backward(made.train(layer.training))


def _scaled(weight: Tensor, layer: nn.Module, gains: Gains) -> Tensor:
    """A weight of a layer, scaled."""
    if getattr(layer, "transposed", False):
        return scaled(weight, gains, axis=0, groups=groups_of(layer))
    return scaled(weight, gains, axis=1)


def _narrow_copy(layer: nn.Module, in_channels: int) -> nn.Module:
    """A copy of a layer for fewer channels, its weights drawn as those of torch's own layers."""
    made: nn.Module = copy.deepcopy(narrowed(layer, in_channels))
    for weight in input_weights(made).values():
        nn.init.kaiming_uniform_(weight, a=5**0.5)
    made.zero_grad()
    return made


def _renewed(layer: nn.Module, kind: LayerKind, in_channels: int) -> nn.Module:
    """A new layer from the ``rebuild`` function of a registered type."""
    assert kind.rebuild is not None
    name = type(layer).__name__
    subject = f"rebuild: the rebuild= registered for {name}"
    weight = first_weight(layer)
    try:
        made = kind.rebuild(layer, in_channels)
        if type(made) is type(layer):
            made.to(device=weight.device, dtype=weight.dtype)
    except Exception as error:  # the user's own code
        raise PassError(
            f"{subject} fails for {in_channels} channels ({one_line_with_type(error)})"
        ) from error
    if type(made) is not type(layer):
        raise PassError(f"{subject} gives a {type(made).__name__}; it must give a new {name}")
    if input_channels(made) != in_channels:
        found = input_channels(made)
        raise PassError(f"{subject} gives {found} input channels for {in_channels}; correct it")
    old, new = layer.state_dict(), made.state_dict()
    if lost := [key for key in old if key not in new]:
        raise PassError(f"{subject} gives no {lost[0]!r}, which the layer holds; add it")
    if not all(weight.is_meta or weight.any() for weight in input_weights(made).values()):
        raise PassError(f"{subject} gives a weight of zeros; draw it")
    for key, buffer in made.named_buffers():
        if key in old and old[key].shape == buffer.shape:
            buffer.copy_(old[key])
    return made
