"""Packed sequences: sequences of different lengths without their padding.

A :class:`torch.nn.utils.rnn.PackedSequence` holds the time steps of all sequences as the rows of
``data``, ``[sum of lengths, C]``. What acts on one row at a time acts on ``data``: it never meets
padding.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


def with_data(packed: PackedSequence | Tensor, data: Tensor) -> PackedSequence | Tensor:
    """The same sequences with other data; ``data`` itself if ``packed`` is a plain tensor.

    Args:
        packed: the sequences, which stay as they are.
        data: a row for each time step, as in ``packed.data``; of any number of channels.

    Example:
        >>> import torch
        >>> packed = torch.nn.utils.rnn.pack_sequence([torch.ones(2, 4), torch.ones(1, 4)])
        >>> with_data(packed, packed.data[:, :2]).data.shape
        torch.Size([3, 2])
    """
    if not isinstance(packed, PackedSequence):
        return data
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


def layer_states(states: Any, start: int, stop: int | None) -> Any:
    """The hidden states of some layers of a stack: rows of each state; None stays None.

    Example:
        >>> import torch
        >>> layer_states((torch.ones(4, 2, 3), torch.ones(4, 2, 5)), 2, None)[1].shape
        torch.Size([2, 2, 5])
    """
    if isinstance(states, tuple | list):
        return tuple(layer_states(each, start, stop) for each in states)
    return None if states is None else states[start:stop]


class SequenceDropout(nn.Dropout):
    """Dropout between recurrent layers: of a tensor, or of the data of packed sequences.

    Example:
        >>> import torch
        >>> packed = torch.nn.utils.rnn.pack_sequence([torch.ones(2, 4), torch.ones(1, 4)])
        >>> SequenceDropout(0.5).eval()(packed).data.shape
        torch.Size([3, 4])
    """

    def forward(self, input: Tensor | PackedSequence) -> Tensor | PackedSequence:  # type: ignore[override]
        """Drop values out in training mode."""
        if isinstance(input, PackedSequence):
            return with_data(input, super().forward(input.data))
        return super().forward(input)
