"""The facts that analyses write about the nodes of a graph."""

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
        count: how many channels there are.
        unflattened_at: for a flattened value, the node before the flatten, whose channels still
            had an axis to themselves; axis and count then describe that node.
        packed: whether the value is a PackedSequence; axis and count then describe its data.
    """

    axis: int
    count: int
    unflattened_at: str | None = None
    packed: bool = False


@dataclass(frozen=True)
class ChannelRead:
    """What a layer reads, if that can be reduced.

    Attributes:
        value: the node whose channels can be reduced.
        dim: the axis of the channels there.
        in_channels: how many channels there are; in one group, if there are several.
        features_per_channel: the layer's input features per channel: 1, or H*W behind a flatten.
        path: the nodes between the value and the layer, in order.
        packed: whether the value is a PackedSequence.
        groups: the groups of the convolution that reads the value.
        intermediate: whether a layer with weights stands between the model's inputs and the value.
        writes: how many in-place operations have changed the value before it is read.
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
    """The facts about one node; a field keeps its default until its analysis has run.

    Attributes:
        shape: the shape of the value, if it is one tensor, or of the data of a PackedSequence
            (``PropagateShapes``).
        packed: whether the value is a PackedSequence (``PropagateShapes``, ``MeasureScale``).
        rms: the root mean square of the value, for inputs of unit variance (``MeasureScale``).
        storage: the first node whose storage the value shares, or its own name (``TrackWrites``).
        writes: whether the call changes values in place (``TrackWrites``).
        nonnegative: whether no element of the value is below 0 (``InferSign``).
        mode_home: the module whose ``training`` is passed to the call as a flag, or None (capture).
        channels: where the channels of the value are (``TrackChannels``).
        read: what the layer called here reads, if that can be reduced (``FindConsumers``).
        skip_reason: why the layer called here is skipped, or None (``FindConsumers``).
        splits: whether the call is of attention that can be split (``FindConsumers``).
        weight: the name of a parameter outside any layer by which the call multiplies a value. It
            can become a layer unless there is a ``skip_reason`` (``FindConsumers``).
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
    """The facts about ``node``, with defaults if there are none yet.

    A copy of a node starts with a copy of its facts.
    """
    owner, known = node.meta.get(_KEY, (None, None))
    if known is None or owner() is not node:  # a copy of a node has a copy of its meta
        known = Facts() if known is None else replace(known)
        node.meta[_KEY] = (weakref.ref(node), known)
    assert isinstance(known, Facts)
    return known


def forget_facts(graph_module: GraphModule) -> None:
    """Drop all facts; a transformation has made them stale."""
    for node in graph_module.graph.nodes:
        node.meta.pop(_KEY, None)
