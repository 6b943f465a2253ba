"""The layers left alone, and why: a code for programs, and a line for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

SkipCode = Literal[
    # The layer itself cannot be reduced.
    "unsupported_layer",  # of a type, or with a part, that cannot be rebuilt
    "quantized",
    "hooks",  # on the layer or on a parameter, which a rebuilt layer would lose
    "own_forward",  # a composite module with hooks or a forward of its own
    "parametrized",
    "weight_type",  # not floating-point, or of a subclass of torch's parameters
    "frozen",
    "shared_parameter",
    "nothing_to_reduce",  # depthwise, one channel, a prime number, or C' equals C_in
    # What it reads cannot be reduced.
    "already_reduced",
    "no_graph_value",
    "unknown_channels",
    "not_adjacent",  # an operation stands between the flatten and the layer
    "written_in_place",
    "repeated_call",
    "model_input",
    # Its weight is not applied by a call of the layer.
    "not_called",
    "one_mode_only",  # called only in training, or only in evaluation
    "weight_read_in_forward",
    "weight_computed",
    "unsupported_product",
    "inside_leaf",
    "inside_module",
    "fails_reduced",  # the model's code does not accept the reduced layer
    "form",  # only a graph can reduce it
    # It is part of a stack of recurrent layers or of attention.
    "parts_not_reduced",
    "within_stack",  # the stack stays whole and stands for it
    # The user's options.
    "skip",
    "filter_fn",
    "channels",
    "min_channels",
    "keep",
]


@dataclass(frozen=True)
class SkipReason:
    """Why a layer is left alone.

    Attributes:
        code: one of :data:`SkipCode`; it stays the same from version to version.
        text: one line for people; ``str()`` gives it.

    Raises:
        TypeError: the code is unknown, or the text is not a string.

    Example:
        >>> reason = SkipReason("min_channels", "in_channels=3 is below min_channels=16")
        >>> reason.code, str(reason)
        ('min_channels', 'in_channels=3 is below min_channels=16')
    """

    code: SkipCode
    text: str

    def __post_init__(self) -> None:
        if self.code not in get_args(SkipCode) or not isinstance(self.text, str):
            raise TypeError(f"code={self.code!r}, text={self.text!r} is not a reason to skip")

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class LeftAlone:
    """A layer that is not reduced, or a parameter that multiplies values outside any layer.

    Attributes:
        layer: its qualified name; for a functional call without a parameter, the node's name.
        kind: its type, such as ``"Conv2d"``, or the function, such as ``"einsum"``.
        reason: why; a code for programs and a line for people.

    Example:
        >>> import lean_fx
        >>> from torch import nn
        >>> (left,) = lean_fx.plan(nn.Sequential(nn.Conv2d(3, 50, 3))).left_alone
        >>> left.layer, left.reason.code
        ('0', 'min_channels')
    """

    layer: str
    kind: str
    reason: SkipReason
