"""Scikit-learn's handwritten digits: 8x8 grey pictures."""

from __future__ import annotations

import torch

from lean_fx.checks import check_int
from lean_fx.errors import ArgumentError, require
from lean_fx.experiment.datasets import Dataset


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
