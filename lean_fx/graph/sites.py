"""A site: a value, and the layers that read it through one reduction."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Consumer:
    """A layer that reads the value of a site.

    Attributes:
        layer: its qualified name.
        kind: its type, such as ``"Conv2d"``.
        node: the node that calls it; empty if the site has no value.
        features_per_channel: its input features per channel: 1, or H*W behind a flatten.
        path: the nodes between the value and the layer, in order.
        weights: how many of its weights multiply the input, before the reduction.
        applied_by: the module whose forward applies the layer's weight without calling the layer,
            such as ``F.linear(x, self.qkv.weight)``; None if the layer is called.
    """

    layer: str
    kind: str
    node: str
    features_per_channel: int = 1
    path: tuple[str, ...] = ()
    weights: int = 0
    applied_by: str | None = None


@dataclass(frozen=True)
class Site:
    """A value, and the layers that share one reduction of it.

    Attributes:
        value: the node of the value; empty if the site's one layer reduces its own input at every
            call (``SwapLayers``).
        dim: the axis of the channels.
        in_channels: C_in; in one group, if there are several.
        consumers: the layers, in the order of their calls.
        out_channels: C', also in one group; None until it is chosen.
        name: the reduction's name; it becomes ``reductions.<name>``, unless that is taken.
        packed: whether the value is a PackedSequence, whose data is reduced.
        groups: the number of groups, each of ``in_channels``. Each is reduced separately, as the
            grouped convolutions that read the value sum over one group each.
        rms: the root mean square of the value for inputs of unit variance; 1 if not measured.
        nonnegative: whether the value is proved to have no element below 0.
        macs: the multiply-adds of the reduction at one position, if it tells.
        note: a remark for the user, such as that the nearest divisor was taken.
    """

    value: str
    dim: int
    in_channels: int
    consumers: tuple[Consumer, ...]
    out_channels: int | None = None
    name: str = ""
    packed: bool = False
    groups: int = 1
    rms: float = 1.0
    nonnegative: bool = False
    macs: int | None = None
    note: str = ""

    @property
    def reduced_dim(self) -> int:
        """The axis that the reduction is given; groups get an axis of their own before it."""
        return self.dim + 1 if self.groups > 1 and self.dim >= 0 else self.dim

    @property
    def layers(self) -> tuple[str, ...]:
        """The qualified names of the layers."""
        return tuple(consumer.layer for consumer in self.consumers)
