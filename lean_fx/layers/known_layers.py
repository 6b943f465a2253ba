"""Layers of other libraries that are linear in their input, by the names of their classes.

:func:`~lean_fx.layers.kinds.kind_of` registers such a class when it first meets a layer of it, so
lean_fx imports none of these libraries.
"""

from __future__ import annotations

from typing import Any

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
