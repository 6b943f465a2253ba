"""What the analyses know of the nodes of a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.fx import GraphModule, Node

if TYPE_CHECKING:
    from lean_fx.passes.graph_context import Read
    from lean_fx.passes.track_channels import Channels

_KEY = "lean_fx"


@dataclass
class Facts:
    """What the analyses know of one node; a field has its default until its analysis has run.

    Attributes:
        shape: of the node's value, if that is one tensor, or of the data of packed sequences
            (``PropagateShapes``).
        packed: whether the value is packed sequences (``PropagateShapes``, ``MeasureScale``).
        rms: its root mean square, for inputs of unit variance (``MeasureScale``).
        storage: the node whose storage the value shares; its own name if none (``TrackWrites``).
        writes: whether the call changes values in place (``TrackWrites``).
        nonnegative: whether no element of the value is below 0 (``InferSign``).
        follows_mode: whether an argument of the call is the mode, which train() and eval() set
            (capture).
        channels: where the channels of the value are (``TrackChannels``).
        read: what the layer called here reads, if it can be reduced (``FindConsumers``).
        refusal: why the layer called here is left alone, if it is (``FindConsumers``).
        splits: whether it is attention, which may be split into its layers (``FindConsumers``).
        weight: the name of the parameter of no layer that the call multiplies a value with; it can
            become a layer if there is no refusal (``FindConsumers``).
    """

    shape: tuple[int, ...] | None = None
    packed: bool = False
    rms: float | None = None
    follows_mode: bool = False
    storage: str = ""
    writes: bool = False
    nonnegative: bool = False
    channels: Channels | None = None
    read: Read | None = None
    refusal: str = ""
    splits: bool = False
    weight: str = ""


def facts(node: Node) -> Facts:
    """The facts known of ``node``, empty ones if there are none yet."""
    known = node.meta.setdefault(_KEY, Facts())
    assert isinstance(known, Facts)
    return known


def forget_facts(graph_module: GraphModule) -> None:
    """Drop all facts: they speak of the graph before a transformation."""
    for node in graph_module.graph.nodes:
        node.meta.pop(_KEY, None)
