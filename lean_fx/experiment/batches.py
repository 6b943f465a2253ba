"""The batches of an epoch: in which order they come, and the share of each process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import data as torch_data

from lean_fx.experiment.datasets import Dataset
from lean_fx.experiment.processes import Processes


class Share(NamedTuple):
    """What one process takes of a batch.

    The mean over the processes of ``weight`` times the mean loss of each is the mean loss of the
    batch, and likewise for gradients, however unequal the shares are.

    Attributes:
        images: as in :class:`~lean_fx.experiment.datasets.Dataset`.
        labels: of the images.
        weight: the number of processes times the part of the batch that this one has; 1 for a
            single process.
        batch_size: pictures of the whole batch.
    """

    images: Tensor
    labels: Tensor
    weight: float
    batch_size: int


class Shares(torch_data.Dataset[Share]):
    """The train split, indexed by the places of a whole batch; gives this process's share."""

    def __init__(self, data: Dataset, here: Processes) -> None:
        self._data, self._here = data, here

    def __getitem__(self, batch: Tensor) -> Share:
        mine = batch[self._here.rank :: self._here.count]
        weight = self._here.count * len(mine) / len(batch)
        # All take part in every step; one that got nothing does so with a picture of no weight.
        places = mine if len(mine) else batch[:1]
        return Share(self._data.train_x[places], self._data.train_y[places], weight, len(batch))


class ShuffledBatches(torch_data.Sampler[Tensor]):
    """Batches of places in an order that only seed and epoch decide, the same in each process."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self._count, self._batch_size, self._seed = count, batch_size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the epoch from Lightning, which calls this before each."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        # Nothing is drawn before the first batch is asked for: when it goes on from a checkpoint,
        # Lightning makes the iterator first and sets the epoch afterwards.
        generator = torch.Generator().manual_seed(epoch_seed(self._seed, self._epoch))
        order = torch.randperm(self._count, generator=generator)
        yield from torch.split(order, self._batch_size)

    def __len__(self) -> int:
        return math.ceil(self._count / self._batch_size)


def epoch_seed(seed: int, epoch: int, rank: int = 0) -> int:
    """Give each epoch, and each process in it, random numbers of its own.

    Example:
        >>> epoch_seed(seed=0, epoch=3)
        3
    """
    return seed * 1_000_003 + rank * 10_007 + epoch


def batches(
    data: Dataset, batch_size: int, seed: int, here: Processes
) -> torch_data.DataLoader[Any]:
    """Load the train split epoch by epoch, each batch as this process's :class:`Share`.

    Args:
        data: whose train split is loaded.
        batch_size: pictures a batch, over all processes.
        seed: of the order.
        here: which process this is.
    """
    return torch_data.DataLoader(
        Shares(data, here),
        # The sampler gives whole batches: one indexing each, not batch_size of them.
        sampler=ShuffledBatches(len(data.train_y), batch_size, seed),
        batch_size=None,
        # A generator of its own: each new iterator draws a number, which dropout would then miss.
        generator=torch.Generator(),
    )
