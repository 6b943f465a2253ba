"""Layers and functions of torch that several passes have rules about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from lean_fx.graph.calls import called

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
DROPOUT_CALLS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)

#: These give values below 0 in training.
ALPHA_DROPOUTS = (nn.AlphaDropout, nn.FeatureAlphaDropout)
ALPHA_DROPOUT_CALLS = (F.alpha_dropout, F.feature_alpha_dropout)

MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
MAX_POOL_CALLS = (
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d),
    *(torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
)
AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
AVERAGE_POOL_CALLS = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
ADAPTIVE_POOLS = (
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
ADAPTIVE_POOL_CALLS = (
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
)

_DROPOUTS: set[Any] = {
    *(*DROPOUTS, *ALPHA_DROPOUTS, nn.Identity),
    *(*DROPOUT_CALLS, *ALPHA_DROPOUT_CALLS),
}


def is_dropout(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node is a dropout or an identity: in eval both return their input."""
    return called(node, modules) in _DROPOUTS
