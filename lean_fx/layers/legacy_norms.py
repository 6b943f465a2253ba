"""Convert the hook-based weight norm and spectral norm to torch's parametrizations.

``torch.nn.utils.weight_norm`` and ``spectral_norm`` compute the weight in a hook before every call;
``torch.nn.utils.parametrizations`` supersedes them. A rebuilt layer gets the latter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import (
    SpectralNorm,
    SpectralNormLoadStateDictPreHook,
    SpectralNormStateDictHook,
)
from torch.nn.utils.weight_norm import WeightNorm

_DICTS = (
    *("_parameters", "_buffers", "_modules", "_forward_pre_hooks"),
    *("_state_dict_hooks", "_load_state_dict_pre_hooks"),
)
_HOOKS = (WeightNorm, SpectralNorm, SpectralNormStateDictHook, SpectralNormLoadStateDictPreHook)


def as_parametrization(layer: nn.Module) -> nn.Module:
    """A layer with a hook-based norm of its weight, converted to the parametrization.

    Args:
        layer: any layer; it is not changed.

    Returns:
        A layer with the same parameters, which computes the same in evaluation. ``layer`` itself
        if it has no hook-based norm of its ``weight``, or more than one.

    Example:
        >>> layer = torch.nn.utils.spectral_norm(nn.Linear(4, 2))
        >>> [*as_parametrization(layer)._forward_pre_hooks], len(layer._forward_pre_hooks)
        ([], 1)
    """
    norms = [
        x for x in layer._forward_pre_hooks.values() if isinstance(x, WeightNorm | SpectralNorm)
    ]
    if [norm.name for norm in norms] != ["weight"]:
        return layer
    twin: Any = object.__new__(type(layer))
    twin.__dict__ = {k: v.copy() if k in _DICTS else v for k, v in vars(layer).items()}
    for kind in _DICTS[3:]:
        for key, hook in [*getattr(twin, kind).items()]:
            if isinstance(getattr(hook, "hook", hook), _HOOKS):
                del getattr(twin, kind)[key]
    twin.__dict__.pop("weight", None)  # the result of the last call
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        if isinstance(norms[0], WeightNorm):
            _weight_normed(twin, norms[0])
        else:
            _spectral_normed(twin, norms[0])
    return twin  # type: ignore[no-any-return]


def _weight_normed(layer: Any, norm: WeightNorm) -> None:
    g, v = layer._parameters.pop("weight_g"), layer._parameters.pop("weight_v")
    layer.weight = nn.Parameter(v.detach())
    parametrizations.weight_norm(layer, dim=norm.dim)
    layer.parametrizations.weight.original0 = g
    layer.parametrizations.weight.original1 = v


def _spectral_normed(layer: Any, norm: SpectralNorm) -> None:
    buffers: Mapping[str, torch.Tensor] = layer._buffers
    u, v = buffers["weight_u"], buffers["weight_v"]
    layer.weight = layer._parameters.pop("weight_orig")
    del layer._buffers["weight_u"], layer._buffers["weight_v"]
    parametrizations.spectral_norm(
        layer, n_power_iterations=norm.n_power_iterations, eps=norm.eps, dim=norm.dim
    )
    layer.parametrizations.weight[0]._u, layer.parametrizations.weight[0]._v = u, v
