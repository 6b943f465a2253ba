"""Decide which subclasses of conv and linear layers may be rebuilt for fewer input channels.

A subclass may change what forward computes, so it is tested. Two copies run on random numbers, in
training and in evaluation, in float64: a wide one, and a narrow one with half of the input channels
of each group and a weight to match. The layer may be rebuilt if

1. both copies run, their outputs have the same shape, and a gradient reaches every weight of the
   narrow one; and
2. channels of zeros do not matter: the narrow copy, with the weights of its channels, returns what
   the wide one returns where the other channels are zero, and gets the same gradients (layers that
   pad, cast, mask the kernel or scale); or
3. both are affine in their input: f(x + y) + f(0) = f(x) + f(y). Such a layer may compute its
   weight from all its numbers (a standardised weight); the narrow one has fewer.

A layer with another parameter per input channel fails rule 1. A registered type
(:func:`~lean_fx.layers.kinds.register_layer`) is trusted, and not tested.
"""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lean_fx.errors import PassError
from lean_fx.layers.kinds import (
    channel_axis,
    groups_of,
    input_channels,
    input_weights,
    known_kind_of,
)

#: What the test of each layer said; a layer is tested once.
_TESTED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def narrowed(layer: Any, in_channels: int) -> Any:
    """A copy with only the first input channels of each group; it shares all other state."""
    made = shallow(layer)
    groups = groups_of(layer)
    axis = 0 if getattr(layer, "transposed", False) else 1
    split = groups if axis == 0 else 1  # the channels of all groups are on that axis
    for name, weight in input_weights(layer).items():
        old = weight.detach()
        if old.shape[axis] * (1 if axis == 0 else groups) != input_channels(layer):
            raise PassError(
                f"rebuild: the {name} of {type(layer).__name__} is not that of its base"
            )
        parts = [part.narrow(axis, 0, in_channels // groups) for part in old.chunk(split, axis)]
        setattr(made, name, nn.Parameter(torch.cat(parts, axis).clone(), weight.requires_grad))
    setattr(made, known_kind_of(layer).width, in_channels)
    return made


def is_channel_linear(layer: nn.Module) -> bool:
    """Whether a layer of a subclass passes the test; its device and mode do not matter.

    Args:
        layer: of a subclass of a conv, a transposed conv or a linear layer; it is not changed.

    Example:
        >>> class Padded(nn.Conv2d):
        ...     def forward(self, x):
        ...         return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))
        >>> class Gated(nn.Conv2d):
        ...     def forward(self, x):
        ...         return super().forward(x) * x.var(1, keepdim=True)
        >>> is_channel_linear(Padded(16, 8, 3)), is_channel_linear(Gated(16, 8, 1))
        (True, False)
    """
    if any(parameter.is_meta for parameter in layer.parameters()):
        return False
    if layer not in _TESTED:
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.manual_seed(0)
                copied = _plain(layer)
                modes = (copied.train(mode) for mode in (True, False))
                _TESTED[layer] = all(_same(each) or _affine(each) for each in modes)
        except Exception:  # its forward may raise anything on fewer channels
            _TESTED[layer] = False
    return _TESTED[layer]


def scale_like(made: nn.Module, layer: nn.Module, gain: float) -> None:
    """Give a rebuilt layer the output scale of the old one, where scaling its weight did not.

    A layer that standardises its weight has a fixed output scale. If another parameter scales the
    output, it is multiplied by the difference.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        copies = [_plain(each) for each in (layer, made)]
        try:
            ratio = _rms(copies[0], 1.0) / _rms(copies[1], 1 / gain)
            for name, parameter in copies[1].named_parameters():
                if abs(ratio - 1) < 0.1 or name in ("weight", "bias"):
                    continue
                before, kept = _rms(copies[1], 1.0), parameter.clone()
                parameter.mul_(2)
                after = _rms(copies[1], 1.0)
                parameter.copy_(kept)
                if abs(after / before - 2) < 1e-3:
                    made.get_parameter(name).mul_(ratio)
                    return
        except Exception:  # as above; then the scale stays as it is
            return


def shallow(layer: Any) -> Any:
    """A copy that shares tensors with the layer, but not the attributes that forward sets."""
    made = object.__new__(type(layer))
    for name, value in vars(layer).items():
        made.__dict__[name] = copy.copy(value) if isinstance(value, dict | list) else value
    return made


def _plain(layer: nn.Module) -> Any:
    """A copy on the CPU, in float64, without hooks, whose weights learn."""
    copied = copy.deepcopy(layer).to(device="cpu", dtype=torch.float64).requires_grad_()
    for hooks in (copied._forward_hooks, copied._forward_pre_hooks):
        hooks.clear()
    return copied


def _inputs(layer: Any, channels: int) -> Tensor:
    """Random numbers, of a size that uses every weight."""
    if channel_axis(layer) == -1:
        return torch.randn(3, channels, dtype=torch.float64)
    padding = layer.padding if isinstance(layer.padding, tuple) else (0,) * len(layer.kernel_size)
    axes = zip(layer.kernel_size, layer.stride, padding, layer.dilation, strict=True)
    sizes = [(k - 1) * d + 1 + 2 * s + p for k, s, p, d in axes]
    return torch.randn(2, channels, *sizes, dtype=torch.float64)


def _channels(layer: Any) -> tuple[int, int, int]:
    """Its groups, the input channels of one, and half of those."""
    channels, groups = input_channels(layer), groups_of(layer)
    return groups, channels // groups, max(1, channels // groups // 2)


def _run(layer: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    out: Tensor = shallow(layer)(x)  # state that forward keeps must not reach the next run
    return out


def _run_back(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of its squares to the weight."""
    out = _run(layer, x)
    (grad,) = torch.autograd.grad(out.square().sum(), layer.weight)
    return out.detach(), grad


def _same(layer: Any) -> bool:
    """Rules 1 and 2."""
    groups, each, fewer = _channels(layer)
    narrow = narrowed(layer, groups * fewer)
    x = _inputs(narrow, groups * fewer)
    padded = x.new_zeros(len(x), groups, each, *x.shape[2:])
    padded[:, :, :fewer] = x.reshape(len(x), groups, fewer, *x.shape[2:])
    wide, wide_grad = _run_back(layer, padded.flatten(1, 2))
    found, found_grad = _run_back(narrow, x)
    if wide.shape != found.shape or not torch.allclose(wide, found):
        return False
    holder = shallow(layer)
    holder.weight = nn.Parameter(wide_grad)
    return torch.allclose(narrowed(holder, groups * fewer).weight, found_grad)


def _affine(layer: Any) -> bool:
    """Rules 1 and 3."""
    groups, each, fewer = _channels(layer)
    shapes = []
    for channels, module in ((each, layer), (fewer, narrowed(layer, groups * fewer))):
        x, y = (_inputs(module, groups * channels) for _ in range(2))
        out, grad = _run_back(module, x)
        with torch.no_grad():
            others = _run(module, x + y) + _run(module, x * 0) - _run(module, y)
        if not torch.allclose(out, others):
            return False
        if not grad.ne(0).all():
            return False
        shapes.append(out.shape)
    return shapes[0] == shapes[1]


def _rms(layer: Any, scale: float) -> float:
    """The root mean square of the outputs for normal inputs, less the outputs for zeros."""
    groups, each, _ = _channels(layer)
    x = _inputs(layer, groups * each) * scale
    return float((_run(layer, x) - _run(layer, x * 0)).square().mean().sqrt())
