"""Packed sequences: sequences of different lengths without their padding.

A :class:`torch.nn.utils.rnn.PackedSequence` holds the time steps of all sequences as the rows of
``data``, ``[sum of lengths, C]``. What acts on each row alone acts on ``data``: it never meets
padding.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


def with_data(packed: PackedSequence, data: Tensor) -> PackedSequence:
    """The same sequences with other values.

    Args:
        packed: the sequences, which stay as they are.
        data: a row for each time step, as in ``packed.data``; of any number of channels.

    Example:
        >>> import torch
        >>> packed = torch.nn.utils.rnn.pack_sequence([torch.ones(2, 4), torch.ones(1, 4)])
        >>> with_data(packed, packed.data[:, :2]).data.shape
        torch.Size([3, 2])
    """
    return packed._replace(data=data)


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
