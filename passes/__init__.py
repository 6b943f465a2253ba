"""The passes of lean_fx: analyses that write facts into ``node.meta``, and transformations.

Import it as ``lean_fx.passes``.
"""

if __name__ != "lean_fx.passes":
    raise ImportError(f"import this package as lean_fx.passes, not as {__name__}")

from lean_fx.graph.facts import ChannelRead, Channels, Facts, facts
from lean_fx.graph.sites import Consumer, Site
from lean_fx.passes.base import Pass, Pipeline
from lean_fx.passes.find_consumers import FindConsumers
from lean_fx.passes.infer_sign import InferSign
from lean_fx.passes.insert_reductions import InsertReductions
from lean_fx.passes.measure_scale import MeasureScale
from lean_fx.passes.modularize_calls import ModularizeCalls
from lean_fx.passes.modularize_weights import ModularizeWeights
from lean_fx.passes.propagate_shapes import PropagateShapes
from lean_fx.passes.split_layers import SplitLayers
from lean_fx.passes.swap_layers import SwapLayers
from lean_fx.passes.track_channels import TrackChannels
from lean_fx.passes.track_writes import TrackWrites

__all__ = [
    "ChannelRead",
    "Channels",
    "Consumer",
    "Facts",
    "FindConsumers",
    "InferSign",
    "InsertReductions",
    "MeasureScale",
    "ModularizeCalls",
    "ModularizeWeights",
    "Pass",
    "Pipeline",
    "PropagateShapes",
    "Site",
    "SplitLayers",
    "SwapLayers",
    "TrackChannels",
    "TrackWrites",
    "facts",
]
