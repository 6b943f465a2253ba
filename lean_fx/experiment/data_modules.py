"""A LightningDataModule as the data of a study."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lean_fx.errors import ArgumentError
from lean_fx.experiment.datasets import Dataset


@runtime_checkable
class DataModule(Protocol):
    """What is asked of a LightningDataModule."""

    def prepare_data(self) -> None: ...  # noqa: D102
    def setup(self, stage: str) -> None: ...  # noqa: D102
    def train_dataloader(self) -> Any: ...  # noqa: D102
    def test_dataloader(self) -> Any: ...  # noqa: D102


def dataset_of(module: DataModule) -> Dataset:
    """Read all samples of a data module into memory.

    The samples come in the order of their data sets, none left out, whatever the loaders do about
    order, batches and workers. What is random in ``setup`` or in a transform is drawn once, by
    seed 0, so that all trials have the same samples. The module's part for validation is not read:
    a study holds out a part of the train split itself (:class:`~lean_fx.experiment.study.Study`).

    Args:
        module: whose ``train_dataloader`` and ``test_dataloader`` give one DataLoader each, of
            pairs of a sample and its label.

    Raises:
        ArgumentError: a loader gives something else, or the samples make no
            :class:`~lean_fx.experiment.datasets.Dataset`.

    Example::

        study = Study(make, MNISTDataModule, Space(channels=(4, 8)), "runs/study")
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        module.prepare_data()
        module.setup("fit")
        train = _samples(module, "train_dataloader")
        module.setup("test")
        test = _samples(module, "test_dataloader")
    classes = 1 + max(int(labels.max()) for _, labels in (train, test))
    return Dataset.of(type(module).__name__, train, test, classes)


def _samples(module: DataModule, method: str) -> tuple[Tensor, Tensor]:
    subject = f"{type(module).__name__}.{method}"
    loader = getattr(module, method)()
    if not isinstance(loader, DataLoader):
        raise ArgumentError(f"{subject} gives a {type(loader).__name__}; give one DataLoader")
    batches: Iterable[Any] = DataLoader(
        loader.dataset, batch_size=loader.batch_size or 1, collate_fn=loader.collate_fn
    )
    pairs = []
    for batch in batches:
        if not (isinstance(batch, tuple | list) and [type(each) for each in batch] == [Tensor] * 2):
            raise ArgumentError(
                f"{subject} gives batches of {type(batch).__name__}; give pairs of tensors, "
                "samples and labels"
            )
        pairs.append(batch)
    if not pairs:
        raise ArgumentError(f"{subject} is empty; give one sample or more")
    samples, labels = zip(*pairs, strict=True)
    return torch.cat(samples), torch.cat(labels).long()
