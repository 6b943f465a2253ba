"""The pictures of the evidence: read, split for validation, made smaller, put on a device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lean_fx.errors import DataError
from lean_fx.experiment.datasets import Dataset, channel_statistics
from support.stl10 import stl10

VALIDATION = 1000  # of the 5,000 training pictures
_VALIDATION_SEED = 20230728  # fixed: every arm is judged on the same pictures


@dataclass(frozen=True)
class Split:
    """Pictures to train on and pictures to judge by, on one device.

    Args:
        train_x: ``[N, 3, S, S]``, uint8, or float32 where they are means; from 0 to 255.
        train_y: their labels.
        test_x: those to judge by.
        test_y: their labels.
        scale: ``[3, 1, 1]``; a picture times this, less ``shift``, has mean 0 and deviation 1.
        shift: ``[3, 1, 1]``.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    scale: Tensor
    shift: Tensor

    def normalised(self, images: Tensor) -> Tensor:
        """Pictures as float32 of mean 0 and standard deviation 1 over the training pictures."""
        return images.float() * self.scale - self.shift

    def to(self, device: torch.device) -> Split:
        """The same on another device."""
        return Split(*(value.to(device) for value in vars(self).values()))


class Pictures:
    """All pictures in memory, and their splits.

    Args:
        source: an ``.npz`` of train_x, train_y, test_x and test_y; a folder that holds
            ``stl10.npz`` or the official binary files; or ``"random"``, for tries.
        limit: take no more than so many of each split.

    Raises:
        DataError: the files are missing or are not such.
    """

    def __init__(self, source: str | Path, limit: int | None = None) -> None:
        arrays = _random(limit or 5000) if str(source) == "random" else _read(Path(source))
        self.train_x, self.train_y, self.test_x, self.test_y = (
            array[:limit] if limit else array for array in arrays
        )

    def split(self, kind: str, pixels: int) -> Split:
        """The training and the other pictures of a kind of run.

        Args:
            kind: ``"validation"``, a fixed part of the training pictures held out and no test
                picture seen, or ``"test"``, all training pictures and the test pictures.
            pixels: the size, by means of squares.
        """
        train_x, train_y, test_x, test_y = self.train_x, self.train_y, self.test_x, self.test_y
        if kind == "validation":
            generator = torch.Generator().manual_seed(_VALIDATION_SEED)
            order = torch.randperm(len(train_y), generator=generator)
            held = min(VALIDATION, len(train_y) // 5)
            out, kept = order[:held].sort().values, order[held:].sort().values
            test_x, test_y = train_x[out], train_y[out]
            train_x, train_y = train_x[kept], train_y[kept]
        train_x, test_x = _smaller(train_x, pixels), _smaller(test_x, pixels)
        mean, std = channel_statistics(train_x)
        unit = 1.0 if train_x.is_floating_point() else 255.0
        scale = 1 / (unit * std)
        return Split(
            train_x, train_y, test_x, test_y, scale.view(3, 1, 1), (mean / std).view(3, 1, 1)
        )


def small_stl10() -> Dataset:
    """STL-10 of the folder ``data`` at 24x24, by means of squares of 4x4, for studies.

    Raises:
        DataError: a file is missing or damaged.
    """
    data = stl10("data")
    train, test = (
        (_smaller(images, 24) / 255, labels)
        for images, labels in ((data.train_x, data.train_y), (data.test_x, data.test_y))
    )
    return Dataset.of("STL-10, 24x24", train, test, data.classes)


def _smaller(images: Tensor, pixels: int) -> Tensor:
    """Means of squares, float32; pictures that have the size already stay uint8."""
    if images.shape[-1] == pixels:
        return images
    side, rest = divmod(images.shape[-1], pixels)
    if rest:
        raise DataError(f"pictures of {images.shape[-1]} pixels have no means of {pixels}")
    return torch.cat([F.avg_pool2d(part.float(), side) for part in torch.split(images, 500)])


def _read(source: Path) -> tuple[Tensor, ...]:
    file = source if source.suffix == ".npz" else source / "stl10.npz"
    if file.is_file():
        with np.load(file) as packed:
            try:
                names = ("train_x", "train_y", "test_x", "test_y")
                train_x, train_y, test_x, test_y = (torch.from_numpy(packed[n]) for n in names)
            except KeyError as error:
                raise DataError(f"{file}: {error}; give train_x, train_y, test_x, test_y") from None
        return train_x, train_y.long(), test_x, test_y.long()
    data = stl10(source)
    return data.train_x, data.train_y, data.test_x, data.test_y


def _random(count: int) -> tuple[Tensor, ...]:
    """Pictures of noise whose brightness tells half of the label."""
    generator = torch.Generator().manual_seed(0)
    made: list[Tensor] = []
    for number in (count, min(8000, 2 * count)):
        labels = torch.randint(10, (number,), generator=generator)
        noise = torch.randint(0, 180, (number, 3, 96, 96), generator=generator, dtype=torch.uint8)
        made += [noise + (labels * 7).to(torch.uint8).view(-1, 1, 1, 1), labels]
    return tuple(made)
