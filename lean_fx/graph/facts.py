"""What the analyses know of the nodes of a graph."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace

from torch.fx import GraphModule, Node

from lean_fx.skip_reason import SkipReason

_KEY = "lean_fx"


@dataclass(frozen=True)
class Channels:
    """Where the channels of a value are.

    Attributes:
        axis: 0 or more from the front, or -1 for the last.
        count: how many.
        unflattened_at: for a flattened value, the node whose channels were last on an axis of
            their own; axis and count describe that node.
        packed: whether the value is packed sequences; axis and count speak of their data.
    """

    axis: int
    count: int
    unflattened_at: str | None = None
    packed: bool = False


@dataclass(frozen=True)
class ChannelRead:
    """What a layer reads, if that can be reduced.

    Attributes:
        value: the node whose channels are whole.
        dim: the axis of the channels there.
        in_channels: how many channels; of one group, where there are several.
        features_per_channel: what the layer reads of each channel: 1, or H*W behind a flatten.
        path: the nodes between the value and the layer, in order.
        packed: whether the value is packed sequences.
        groups: of the layer that reads it, a convolution.
        intermediate: whether a layer with weights stands between the model's inputs and the value.
        writes: how many in-place operations had changed the value when it was read.
    """

    value: str
    dim: int
    in_channels: int
    features_per_channel: int = 1
    path: tuple[str, ...] = ()
    packed: bool = False
    groups: int = 1
    intermediate: bool = True
    writes: int = 0


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
        mode_home: the module whose mode, which train() and eval() set, an argument of the call is,
            or None (capture).
        channels: where the channels of the value are (``TrackChannels``).
        read: what the layer called here reads, if it can be reduced (``FindConsumers``).
        skip_reason: why the layer called here is left alone, if it is (``FindConsumers``).
        splits: whether it is attention, which may be split into its layers (``FindConsumers``).
        weight: the name of the parameter of no layer that the call multiplies a value with; it can
            become a layer if there is no refusal (``FindConsumers``).
    """

    shape: tuple[int, ...] | None = None
    packed: bool = False
    rms: float | None = None
    mode_home: str | None = None
    storage: str = ""
    writes: bool = False
    nonnegative: bool = False
    channels: Channels | None = None
    read: ChannelRead | None = None
    skip_reason: SkipReason | None = None
    splits: bool = False
    weight: str = ""


def facts(node: Node) -> Facts:
    """The facts known of ``node``, empty ones if there are none yet.

    A copy of a node has facts of its own, which start as those of the node.
    """
    owner, known = node.meta.get(_KEY, (None, None))
    if known is None or owner() is not node:  # a copy of a node has a copy of its meta
        known = Facts() if known is None else replace(known)
        node.meta[_KEY] = (weakref.ref(node), known)
    assert isinstance(known, Facts)
    return known


def forget_facts(graph_module: GraphModule) -> None:
    """Drop all facts: they speak of the graph before a transformation."""
    for node in graph_module.graph.nodes:
        node.meta.pop(_KEY, None)
