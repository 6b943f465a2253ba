"""The order of the batches, and their shares: together they are the batch, whatever its size."""

import pytest
import torch
from torch.nn import functional as F

from lean_fx.experiment.batches import Shares, ShuffledBatches, batches, epoch_seed
from lean_fx.experiment.datasets import Dataset
from lean_fx.experiment.processes import Processes


@pytest.fixture(scope="module")
def data() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(10, 1, 2, 2, generator=generator)
    labels = torch.arange(10) % 3
    return Dataset.of("ten", (images, labels), (images, labels), classes=3)


def test_each_epoch_has_its_own_order():
    order = ShuffledBatches(100, 32, seed=0)
    first = [part.tolist() for part in order]
    order.set_epoch(1)
    assert [part.tolist() for part in order] != first
    assert [len(part) for part in order] == [32, 32, 32, 4]
    assert len(order) == 4


def test_each_process_draws_its_own_random_numbers():
    seeds = {epoch_seed(s, e, r) for s in range(3) for e in range(50) for r in range(8)}
    assert len(seeds) == 3 * 50 * 8


def test_one_process_takes_whole_batches(data):
    order = list(ShuffledBatches(10, 4, seed=5))
    for share, places in zip(batches(data, 4, 5, Processes()), order, strict=True):
        assert torch.equal(share.images, data.train_x[places])
        assert torch.equal(share.labels, data.train_y[places])
        assert share.weight == 1
        assert share.batch_size == len(places)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [1, 2, 3, 9, 10])
def test_the_mean_of_the_shares_is_that_of_the_batch(data, size, count):
    weight = torch.rand(4, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def loss_of(images, labels):
        return F.cross_entropy(images.flatten(1) @ weight, labels)

    batch = torch.arange(size)
    shares = [Shares(data, Processes(rank, count, count))[batch] for rank in range(count)]
    loss = sum(s.weight * loss_of(s.images, s.labels) for s in shares) / count
    whole = loss_of(data.train_x[batch], data.train_y[batch])
    torch.testing.assert_close(loss, whole)
    (gradient,), (wanted,) = (torch.autograd.grad(x, weight) for x in (loss, whole))
    torch.testing.assert_close(gradient, wanted)
    taken = torch.cat([share.images for share in shares if share.weight])
    assert sorted(taken.flatten().tolist()) == sorted(data.train_x[batch].flatten().tolist())
    assert all(len(share.labels) for share in shares)
