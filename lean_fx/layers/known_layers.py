"""Layers that are known by the names of their classes, so that lean_fx imports none of them.

Those of other libraries that are linear in their input are registered by
:func:`~lean_fx.layers.kinds.kind_of` when it first meets them. Those of torch.ao.quantization are
left alone.
"""

from __future__ import annotations

from typing import Any

from torch import nn

#: For each class, the arguments of :func:`~lean_fx.layers.kinds.register_layer`.
KNOWN: dict[str, dict[str, Any]] = {
    # A linear layer with its weight transposed, of GPT-2.
    "transformers.pytorch_utils.Conv1D": {
        "in_channels": lambda layer: layer.weight.shape[0],
        "out_channels": lambda layer: layer.weight.shape[1],
        "rebuild": lambda layer, channels: type(layer)(layer.weight.shape[1], channels),
    },
    "torch_geometric.nn.dense.linear.Linear": {
        "in_channels": lambda layer: layer.in_channels,
        "out_channels": lambda layer: layer.out_channels,
        "rebuild": lambda layer, channels: type(layer)(
            channels,
            layer.out_channels,
            layer.bias is not None,
            layer.weight_initializer,
            layer.bias_initializer,
        ),
    },
}

_OBSERVING = ("torch.ao.quantization.fake_quantize", "torch.ao.quantization.observer")


def quantized_by_torch(module: nn.Module) -> bool:
    """Whether a module is of torch.ao.quantization: it computes in integers, or simulates that.

    Example:
        >>> from torch.ao.quantization import FakeQuantize
        >>> quantized_by_torch(FakeQuantize()), quantized_by_torch(nn.Linear(4, 2))
        (True, False)
    """
    homes = [base.__module__ for base in type(module).__mro__]
    own = homes[0].startswith("torch.ao.nn.") and "quantized" in homes[0].split(".")
    return own or any(home in _OBSERVING for home in homes)


def is_quantized_layer(module: nn.Module) -> bool:
    """Whether a module is a conv, linear or recurrent layer with quantised weights.

    Example:
        >>> from torch.ao.quantization import FakeQuantize
        >>> is_quantized_layer(FakeQuantize())
        False
    """
    widths = ("in_features", "in_channels", "input_size")
    return quantized_by_torch(module) and any(hasattr(module, width) for width in widths)
