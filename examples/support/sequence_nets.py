"""A recurrent, a fully connected and a 1-D convolutional net for sequences of equal length.

They are the three kinds of net that the paper names, small enough for a CPU. All take
``[N, channels, frames]`` and give logits ``[N, classes]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lean_fx.checks import check_choice, check_int, check_ints
from lean_fx.errors import ArgumentError

_CELLS = {"gru": nn.GRU, "lstm": nn.LSTM}
SEQUENCE_WIDTHS = {
    **dict.fromkeys(_CELLS, (64,)),
    "fc": (256, 256, 256),
    "conv1d": (64, 128, 128),
}
"""The widths of each net that :func:`sequence_net` makes, the value for ``hidden`` of a cell."""


def sequence_net(
    kind: str, widths: Sequence[int], in_channels: int, frames: int, classes: int
) -> nn.Module:
    """Make one of the nets of this module.

    Args:
        kind: ``"gru"``, ``"lstm"``, ``"fc"`` or ``"conv1d"``.
        widths: of its layers; of a recurrent net one number, its ``hidden``.
        in_channels: channels of the sequences, at least 1.
        frames: of each sequence, a multiple of 8.
        classes: outputs, at least 1.

    Raises:
        ArgumentError: a number is out of range, or there is no such net.

    Example:
        >>> type(sequence_net("conv1d", (8, 8), in_channels=5, frames=16, classes=3)).__name__
        'Conv1dNet'
    """
    check_choice("sequence_net: kind", kind, SEQUENCE_WIDTHS)
    if kind in _CELLS:
        return RecurrentNet(kind, widths[0], in_channels=in_channels, classes=classes)
    if kind == "fc":
        return FullyConnectedNet(widths, in_channels, frames, classes)
    return Conv1dNet(widths, in_channels, classes)


class RecurrentNet(nn.Module):
    """Stacked bidirectional recurrent layers, the mean of their outputs over time, a linear layer.

    Args:
        cell: ``"gru"`` or ``"lstm"``.
        hidden: values that each direction of a layer carries, at least 1.
        layers: how many are stacked, at least 1.
        in_channels: channels of the sequences, at least 1.
        classes: outputs, at least 1.

    Shape:
        - input: ``[N, in_channels, frames]``, any number of frames
        - output: ``[N, classes]``, logits

    Raises:
        ArgumentError: a number is below 1, or there is no such cell.

    Example:
        >>> import torch
        >>> RecurrentNet("lstm", hidden=8, in_channels=5)(torch.zeros(2, 5, 7)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        cell: str = "gru",
        hidden: int = 64,
        layers: int = 3,
        in_channels: int = 40,
        classes: int = 10,
    ) -> None:
        super().__init__()
        check_choice("RecurrentNet: cell", cell, _CELLS)
        check_int("RecurrentNet: hidden", hidden, 1)
        check_int("RecurrentNet: layers", layers, 1)
        _check_ends("RecurrentNet", in_channels, classes)
        make: Any = _CELLS[cell]
        self.rnn = make(in_channels, hidden, layers, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[N, classes]`` of sequences ``[N, C, L]``."""
        outputs, _ = self.rnn(x.transpose(1, 2))
        return self.linear(outputs.mean(1))  # type: ignore[no-any-return]


class FullyConnectedNet(nn.Module):
    """The mean frame of each eighth of a sequence, flattened, then linear layers with ReLU.

    Args:
        widths: outputs of each linear layer but the last; one or more numbers, each at least 1.
        in_channels: channels of the sequences, at least 1.
        frames: of each sequence; a multiple of 8.
        classes: outputs of the last layer, at least 1.

    Shape:
        - input: ``[N, in_channels, frames]``
        - output: ``[N, classes]``, logits

    Raises:
        ArgumentError: a number is out of range.

    Example:
        >>> import torch
        >>> FullyConnectedNet((8, 8), in_channels=5, frames=16)(torch.zeros(2, 5, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        widths: Sequence[int] = (256, 256, 256),
        in_channels: int = 40,
        frames: int = 40,
        classes: int = 10,
    ) -> None:
        super().__init__()
        check_ints("FullyConnectedNet: widths", widths, 1)
        _check_ends("FullyConnectedNet", in_channels, classes)
        if check_int("FullyConnectedNet: frames", frames, 8) % 8:
            raise ArgumentError(f"FullyConnectedNet: frames={frames} is not a multiple of 8")
        self.pool = nn.AvgPool1d(frames // 8)
        features = 8 * in_channels
        self._depth = len(widths)
        for number, width in enumerate(widths, start=1):
            self.add_module(f"linear{number}", nn.Linear(features, width))
            self.add_module(f"relu{number}", nn.ReLU())
            features = width
        self.linear = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[N, classes]`` of sequences ``[N, C, L]``."""
        x = self.pool(x).flatten(1)
        for number in range(1, self._depth + 1):
            x = self.get_submodule(f"relu{number}")(self.get_submodule(f"linear{number}")(x))
        return self.linear(x)  # type: ignore[no-any-return]


class Conv1dNet(nn.Module):
    """1-D convolutions, each with ReLU and max pooling by 2, the mean over time, a linear layer.

    Args:
        widths: output channels of each convolution; one or more numbers, each at least 1.
        in_channels: channels of the sequences, at least 1.
        classes: outputs of the linear layer, at least 1.

    Shape:
        - input: ``[N, in_channels, frames]``, at least 2 to the power of ``len(widths)`` frames
        - output: ``[N, classes]``, logits

    Raises:
        ArgumentError: a number is below 1.

    Example:
        >>> import torch
        >>> Conv1dNet((8, 8), in_channels=5)(torch.zeros(2, 5, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, widths: Sequence[int] = (64, 128, 128), in_channels: int = 40, classes: int = 10
    ) -> None:
        super().__init__()
        check_ints("Conv1dNet: widths", widths, 1)
        _check_ends("Conv1dNet", in_channels, classes)
        self._depth = len(widths)
        channels = in_channels
        for number, width in enumerate(widths, start=1):
            self.add_module(f"conv{number}", nn.Conv1d(channels, width, 5, padding=2))
            self.add_module(f"relu{number}", nn.ReLU())
            self.add_module(f"pool{number}", nn.MaxPool1d(2))
            channels = width
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[N, classes]`` of sequences ``[N, C, L]``."""
        for number in range(1, self._depth + 1):
            for kind in ("conv", "relu", "pool"):
                x = self.get_submodule(f"{kind}{number}")(x)
        return self.linear(x.mean(2))  # type: ignore[no-any-return]


def _check_ends(net: str, in_channels: int, classes: int) -> None:
    check_int(f"{net}: in_channels", in_channels, 1)
    check_int(f"{net}: classes", classes, 1)
