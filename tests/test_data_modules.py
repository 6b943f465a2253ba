"""A LightningDataModule as the data of a study."""

import dataclasses
from pathlib import Path

import pytest
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset, random_split

from lean_fx.errors import ArgumentError
from lean_fx.experiment.configurations import Configuration
from lean_fx.experiment.data_modules import DataModule, dataset_of
from lean_fx.experiment.datasets import Dataset, digits
from lean_fx.experiment.training import Settings
from lean_fx.experiment.trials import Job, data_of


class Digits(LightningDataModule):
    """The digits as users write a data module: split by chance, shuffled, the last batch lost."""

    def prepare_data(self):
        self.prepared = True

    def setup(self, stage):
        assert self.prepared
        data = digits()
        if stage == "fit":
            whole = TensorDataset(data.train_x, data.train_y)
            self.train, self.held = random_split(whole, [1200, 237])
        else:
            self.test = TensorDataset(data.test_x, data.test_y.int())

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=64, shuffle=True, drop_last=True, num_workers=2)

    def val_dataloader(self):
        raise AssertionError("the study holds a part out itself")

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=64)


def job_of(data):
    return Job(
        Configuration("baseline"),
        lambda width: None,
        data,
        False,
        "lean",
        Settings(),
        Path(),
        Path(),
    )


@pytest.mark.parametrize("data", [Digits, Digits()], ids=["class", "instance"])
def test_a_trial_reads_all_samples_and_the_same_each_time(data):
    before = torch.get_rng_state()
    read, again = data_of(job_of(data)), data_of(job_of(Digits))
    assert torch.equal(torch.get_rng_state(), before)
    assert (read.name, read.classes, read.train_x.shape) == ("Digits", 10, (1200, 1, 8, 8))
    assert torch.equal(read.test_x, digits().test_x)
    assert torch.equal(read.test_y, digits().test_y)
    assert torch.equal(read.train_x, again.train_x)
    assert torch.equal(read.train_y, again.train_y)


def test_lightning_still_has_what_is_asked():
    assert isinstance(LightningDataModule(), DataModule)


def replaced(method, result):
    return type("Odd", (Digits,), {method: lambda self: result})()


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1], "gives a list; give one DataLoader"),
        (DataLoader([]), "is empty; give one sample or more"),
        (DataLoader([1.0]), "gives batches of Tensor; give pairs of tensors, samples and labels"),
        (DataLoader([(1, 2, 3)]), "gives batches of list; give pairs of tensors,"),
    ],
)
def test_other_loaders_are_refused(result, message):
    with pytest.raises(ArgumentError, match=rf"^Odd\.test_dataloader {message}"):
        dataset_of(replaced("test_dataloader", result))


def test_what_is_no_data_is_refused():
    with pytest.raises(ArgumentError, match=r"^data is a int; give a Dataset or a LightningDat"):
        data_of(job_of(lambda: 3))


def test_labels_that_are_no_classes_are_refused():
    loader = DataLoader([(torch.ones(1, 2, 2), -1)])
    with pytest.raises(ArgumentError, match="Odd: train has labels -1 to -1"):
        dataset_of(replaced("train_dataloader", loader))


def test_a_data_set_stays_what_it_is():
    data = digits()
    assert data_of(job_of(data)) is data
    assert isinstance(data_of(dataclasses.replace(job_of(digits), held_out=True)), Dataset)
