"""A data set as tensors in memory, and scikit-learn's small digits to try things on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lean_fx.checks import check_int
from lean_fx.errors import ArgumentError, require


@dataclass(frozen=True, eq=False)
class Dataset:
    """Pictures or sequences with their labels in memory, split into train and test.

    They are float32, or uint8 in [0, 255], which stands for [0, 1], takes a quarter of the memory
    and is converted batch by batch in :meth:`normalised`.

    Args:
        name: what tables and messages call it.
        train_x: pictures or sequences to train on.
        train_y: their labels, 0 to ``classes - 1``.
        test_x: those to test on.
        test_y: their labels.
        classes: number of classes.
        mean: per channel over the train split, of pictures in [0, 1].
        std: standard deviation, likewise.

    Shape:
        - train_x, test_x: ``[N, C, H, W]`` or ``[N, C, L]``, float32 or uint8
        - train_y, test_y: ``[N]``, int64
        - mean, std: ``[C]``, float32
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    mean: Tensor
    std: Tensor

    @classmethod
    def of(
        cls,
        name: str,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        classes: int,
    ) -> Dataset:
        """Make a data set of (pictures, labels) pairs; mean and std come only from ``train``.

        Raises:
            ArgumentError: a split is empty, has not one label for each picture, labels out of
                range, or values that are not finite; or the two differ in shape.

        Example:
            >>> x, y = torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([0, 1])
            >>> data = Dataset.of("two", (x.view(2, 1, 1, 1), y), (x.view(2, 1, 1, 1), y), 2)
            >>> data.mean, data.std
            (tensor([0.5000]), tensor([0.5000]))
        """
        for split, (images, labels) in (("train", train), ("test", test)):
            _check(f"{name}: {split}", images, labels, classes)
        if train[0].shape[1:] != test[0].shape[1:]:
            raise ArgumentError(
                f"{name}: train has samples of shape {list(train[0].shape[1:])}, test of "
                f"{list(test[0].shape[1:])}; give the same"
            )
        mean, std = channel_statistics(train[0])
        return cls(name, *train, *test, classes, mean, std)

    def held_out(self, fraction: float = 0.2, seed: int = 0) -> Dataset:
        """Hold a part of the train split out, to choose settings on; the test split is not seen.

        Args:
            fraction: of the train split that becomes the test split of the result, in ]0, 1[.
            seed: of the choice.

        Raises:
            ArgumentError: ``fraction`` lies out of its range, or leaves a part empty.

        Example:
            >>> data = digits()
            >>> len(data.train_y), len(data.held_out().train_y), len(data.held_out().test_y)
            (1437, 1150, 287)
        """
        count = int(len(self.train_y) * fraction) if 0 < fraction < 1 else 0
        if not 0 < count < len(self.train_y):
            raise ArgumentError(
                f"{self.name}: fraction={fraction} holds out {count} of {len(self.train_y)} "
                "samples; give a fraction in ]0, 1[ that leaves some in either part"
            )
        order = torch.randperm(len(self.train_y), generator=torch.Generator().manual_seed(seed))
        held, kept = order[:count], order[count:]
        train, test = ((self.train_x[part], self.train_y[part]) for part in (kept, held))
        name = f"{self.name}, {fraction:g} of it held out by seed {seed}"
        return Dataset.of(name, train, test, self.classes)

    def normalised(self, images: Tensor) -> Tensor:
        """Return pictures as float32 of mean 0 and standard deviation 1 over the train split.

        Shape:
            - images: ``[N, C, ...]``, as in ``train_x``, on any device
            - output: the same, float32, on the same device

        Example:
            >>> x, y = torch.rand(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64)
            >>> data = Dataset.of("noise", (x, y), (x, y), classes=1)
            >>> abs(float(data.normalised(x).mean())) < 1e-6
            True
        """
        mean = _along_channels(self.mean.to(images.device), images)
        std = _along_channels(self.std.to(images.device), images)
        return (_in_unit_range(images) - mean) / std


def digits(seed: int = 0, test_fraction: float = 0.2) -> Dataset:
    """Load scikit-learn's handwritten digits: 1797 grey pictures of 8x8 pixels.

    The split is stratified, each class having the same share of both parts, and the same for the
    same seed.

    Args:
        seed: of the split, 0 to 2**32 - 1.
        test_fraction: share of the test split, in [0.01, 0.99].

    Raises:
        ArgumentError: an argument lies out of its range.
        MissingDependencyError: scikit-learn is not installed.

    Example:
        >>> data = digits()
        >>> data.train_x.shape, data.test_x.shape
        (torch.Size([1437, 1, 8, 8]), torch.Size([360, 1, 8, 8]))

    References:
        E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
        Repository, 1998 (the test part of it).
    """
    if not 0.01 <= test_fraction <= 0.99:
        raise ArgumentError(
            f"digits: test_fraction={test_fraction} lies outside [0.01, 0.99]; use 0.2"
        )
    seed = check_int("digits: seed", seed, 0, 2**32 - 1)
    purpose = "the digits data set"
    loader = require("sklearn.datasets", extra="examples", purpose=purpose)
    splitter = require("sklearn.model_selection", extra="examples", purpose=purpose)
    raw = loader.load_digits()
    images = torch.as_tensor(raw.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.as_tensor(raw.target, dtype=torch.int64)
    train, test = splitter.train_test_split(
        range(len(labels)), test_size=test_fraction, random_state=seed, stratify=labels
    )
    return Dataset.of(
        "digits", (images[train], labels[train]), (images[test], labels[test]), classes=10
    )


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, of pictures taken to [0, 1].

    Summed in float64 and in slices, so that no float copy of all pictures is made. A channel that
    never changes gets a standard deviation of 1, as it is divided by.

    Shape:
        - images: ``[N, C, ...]``, float32 or uint8
        - output: two of ``[C]``, float32
    """
    places = images.numel() // images.shape[1]
    slices = torch.split(images, 256)
    across = [axis for axis in range(images.ndim) if axis != 1]
    sums = [_in_unit_range(part).double().sum(across) for part in slices]
    mean = torch.stack(sums).sum(0) / places
    centre = _along_channels(mean, images)
    squares = [(_in_unit_range(part) - centre).square().sum(across) for part in slices]
    std = (torch.stack(squares).sum(0) / places).sqrt()
    return mean.float(), torch.where(std == 0, 1.0, std).float()


def _in_unit_range(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images


def _along_channels(values: Tensor, images: Tensor) -> Tensor:
    """Shape ``[C]`` so that it broadcasts against ``[N, C, ...]``."""
    return values.view(-1, *[1] * (images.ndim - 2))


def _check(subject: str, images: Tensor, labels: Tensor, classes: int) -> None:
    if len(images) != len(labels):
        raise ArgumentError(
            f"{subject} has {len(images)} samples and {len(labels)} labels; give one label each"
        )
    if images.ndim < 3 or images.numel() == 0:
        raise ArgumentError(
            f"{subject} has shape {list(images.shape)}; give [N, C, H, W] or [N, C, L], none of 0"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ArgumentError(
            f"{subject} has labels {int(labels.min())} to {int(labels.max())}; "
            f"classes={classes} allows 0 to {classes - 1}"
        )
    if images.is_floating_point():
        wrong = (~images.isfinite()).flatten(1).any(1).nonzero().flatten()
        if len(wrong):
            raise ArgumentError(
                f"{subject} holds NaN or infinite values, first in sample {int(wrong[0])}; "
                "give finite ones"
            )
