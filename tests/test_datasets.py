"""The digits, and what every Dataset does to pictures."""

import sys

import pytest
import torch

from lean_fx.errors import ArgumentError, MissingDependencyError
from lean_fx.experiment.datasets import Dataset, channel_statistics, digits


def test_digits_are_grey_pictures_in_the_unit_range():
    data = digits()
    assert (data.name, data.classes) == ("digits", 10)
    assert data.train_x.dtype == data.test_x.dtype == torch.float32
    assert data.train_y.dtype == data.test_y.dtype == torch.int64
    everything = torch.cat([data.train_x, data.test_x])
    assert everything.shape == (1797, 1, 8, 8)
    assert (everything.min(), everything.max()) == (0, 1)


def test_the_split_loses_nothing_and_keeps_pictures_with_their_labels():
    def table(data):
        images = torch.cat([data.train_x, data.test_x]).flatten(1)
        labels = torch.cat([data.train_y, data.test_y]).unsqueeze(1)
        return sorted(torch.cat([images, labels], 1).tolist())

    assert table(digits(seed=0)) == table(digits(seed=1, test_fraction=0.5))


def test_the_split_is_stratified():
    data = digits(seed=3, test_fraction=0.25)
    train, test = (torch.bincount(y, minlength=10) for y in (data.train_y, data.test_y))
    torch.testing.assert_close(test / (train + test), torch.full((10,), 0.25), atol=0.01, rtol=0)


def test_the_seed_alone_decides_the_split():
    first, again, other = digits(seed=5), digits(seed=5), digits(seed=6)
    assert torch.equal(first.train_x, again.train_x)
    assert torch.equal(first.test_y, again.test_y)
    assert not torch.equal(first.train_x, other.train_x)


@pytest.mark.parametrize("fraction", [0, 1, -0.5, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ArgumentError, match=rf"^digits: test_fraction={fraction} lies outside"):
        digits(test_fraction=fraction)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(
        ArgumentError, match=rf"^digits: seed={seed} is not an int of 0 to 4294967295$"
    ):
        digits(seed=seed)


def test_without_scikit_learn_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependencyError, match=r"^sklearn .* pip install \"lean_fx\[exam"):
        digits()


@pytest.fixture
def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    # More than one slice, and channels of different spread.
    images = torch.randint(0, 256, (300, 3, 4, 5), generator=generator, dtype=torch.uint8)
    return images // torch.tensor([1, 2, 5], dtype=torch.uint8).view(3, 1, 1)


def test_statistics_are_those_of_all_places_of_a_channel(pictures):
    mean, std = channel_statistics(pictures)
    exact = pictures.double() / 255
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
    expected = exact.std((0, 2, 3), correction=0)
    torch.testing.assert_close(std.double(), expected, rtol=1e-6, atol=0)


def test_bytes_and_floats_of_the_same_pictures_are_normalised_alike(pictures):
    labels = torch.zeros(300, dtype=torch.int64)
    in_bytes = Dataset.of("bytes", (pictures, labels), (pictures, labels), classes=1)
    in_floats = Dataset.of("floats", (pictures / 255, labels), (pictures, labels), classes=1)
    out = in_bytes.normalised(pictures)
    torch.testing.assert_close(out, in_floats.normalised(pictures / 255))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3), correction=0), torch.ones(3))


def test_the_test_split_does_not_touch_the_statistics(pictures):
    labels = torch.zeros(300, dtype=torch.int64)
    one = Dataset.of("a", (pictures, labels), (pictures, labels), classes=1)
    other = Dataset.of("b", (pictures, labels), (pictures // 3, labels), classes=1)
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.std, other.std)


def test_a_channel_that_never_changes_stays_finite():
    images = torch.full((4, 1, 2, 2), 0.5)
    labels = torch.zeros(4, dtype=torch.int64)
    data = Dataset.of("flat", (images, labels), (images, labels), classes=1)
    assert torch.equal(data.normalised(images), torch.zeros(4, 1, 2, 2))


def test_sequences_are_normalised_by_channel():
    sequences = torch.randn(300, 3, 7) * torch.tensor([1.0, 2.0, 5.0]).view(3, 1) - 4
    labels = torch.zeros(300, dtype=torch.int64)
    data = Dataset.of("sequences", (sequences, labels), (sequences, labels), classes=1)
    exact = sequences.double()
    torch.testing.assert_close(data.mean.double(), exact.mean((0, 2)), rtol=1e-6, atol=0)
    expected = (exact - exact.mean((0, 2), keepdim=True)) / exact.std(
        (0, 2), keepdim=True, correction=0
    )
    torch.testing.assert_close(data.normalised(sequences).double(), expected, rtol=1e-5, atol=1e-6)


def broken(value: float) -> torch.Tensor:
    sequences = torch.zeros(4, 2, 5)
    sequences[2, 1, 3] = value
    return sequences


LABELS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ((broken(0), LABELS[:3]), "has 4 samples and 3 labels; give one label each"),
        ((torch.zeros(4, 2, 0), LABELS), r"has shape \[4, 2, 0\]; give \[N, C, H, W\] or \[N, "),
        ((torch.zeros(0, 2, 5), LABELS[:0]), r"has shape \[0, 2, 5\]; give \[N, C, H, W\] or"),
        ((broken(0), LABELS + 1), "has labels 1 to 1; classes=1 allows 0 to 0"),
        ((broken(0), LABELS - 1), "has labels -1 to -1; classes=1 allows 0 to 0"),
        ((broken(float("nan")), LABELS), "holds NaN or infinite values, first in sample 2; give"),
        ((broken(float("inf")), LABELS), "holds NaN or infinite values, first in sample 2; give"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_what_is_no_data_is_refused_by_the_name_of_its_split(split, pair, message):
    pairs = {"train": (broken(0), LABELS), "test": (broken(0), LABELS), split: pair}
    with pytest.raises(ArgumentError, match=f"^heard: {split} {message}"):
        Dataset.of("heard", pairs["train"], pairs["test"], classes=1)


def test_splits_of_different_lengths_are_refused():
    with pytest.raises(
        ArgumentError, match=r"^heard: train has samples of shape \[2, 5\], test of \[2, 6\]; give"
    ):
        Dataset.of("heard", (broken(0), LABELS), (torch.zeros(4, 2, 6), LABELS), classes=1)
