"""What InsertReductions acts on: a value, and the layers that read it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Consumer:
    """A layer that reads the value of a site.

    Attributes:
        layer: its qualified name.
        kind: its type, such as ``"Conv2d"``.
        node: the node that calls it; empty if the site has no value.
        features_per_channel: the features it reads of each channel: 1, or H*W behind a flatten.
        path: the nodes between the value and the layer, in order.
        weights: the number of its weights that are multiplied with the input, before.
        applied_by: the module whose forward applies the layer's weight in place of calling the
            layer, such as ``F.linear(x, self.qkv.weight)``; None where the layer is called.
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
        value: the node that gives the value; empty where the one layer of the site reduces its
            own input at every call (``SwapLayers``).
        dim: the axis of its channels.
        in_channels: C_in; of one group, where there are several.
        consumers: the layers, in the order in which they are called.
        out_channels: C', or None while it is not decided; of one group too.
        name: of the reduction: ``reductions.<name>`` in the result, unless that is taken.
        packed: whether the value is packed sequences, whose data is reduced.
        groups: of channels: each holds ``in_channels`` and is reduced for itself, as the grouped
            convolutions that read it sum over one group each.
        rms: the root mean square of the value for inputs of unit variance; 1 where not measured.
        nonnegative: whether the value is proved to have no element below 0.
        macs: the multiply-adds of its reduction at one position, if the reduction tells.
        note: what the user should know, such as the nearest divisor that was taken.
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
        """The axis that the reduction itself is given; several groups get an axis before it."""
        return self.dim + 1 if self.groups > 1 and self.dim >= 0 else self.dim

    @property
    def layers(self) -> tuple[str, ...]:
        """The qualified names of the layers."""
        return tuple(consumer.layer for consumer in self.consumers)
