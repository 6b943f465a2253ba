"""Each model's own learning rate, and the part of the train split that it is chosen on."""

import copy

import pytest
import torch

from lean_fx.errors import ArgumentError
from lean_fx.experiment.datasets import digits
from lean_fx.experiment.rates import choose_rate
from lean_fx.experiment.training import Settings
from support.models import PaperNet
from test_ablation import small_digits


def test_the_best_rate_is_chosen_and_the_model_stays(tmp_path):
    torch.manual_seed(0)
    model, settings = PaperNet((4, 8), 1, 8, 10), Settings(epochs=2, accelerator="cpu")
    before = copy.deepcopy(model.state_dict())
    assert choose_rate(model, small_digits(), settings, (1e-7, 3e-2, 1e-6), tmp_path) == 3e-2
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == ["rate-0.03", "rate-1e-06", "rate-1e-07"]


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ((), "choose_rate: rates is empty; give one or more, such as 1e-3, 1e-2"),
        ((1e-3, 2.0), r"Settings: learning_rate=2.0 lies outside \]0, 1\]; use 1e-3"),
    ],
)
def test_rates_that_cannot_be_are_refused_before_any_training(tmp_path, rates, message):
    with pytest.raises(ArgumentError, match=f"^{message}$"):
        choose_rate(PaperNet((4, 8), 1, 8, 10), small_digits(), Settings(), rates, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_held_out_is_of_the_train_split_and_not_trained_on():
    data = digits()
    held = data.held_out(0.25, seed=3)
    assert len(held.test_y) == len(data.train_y) // 4
    both = torch.cat([held.train_x, held.test_x]).flatten(1)
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, data.train_x.flatten(1).tolist()))
    assert torch.equal(held.mean, held.train_x.mean((0, 2, 3)))
    assert not torch.equal(data.held_out(0.25, seed=4).test_y, held.test_y)


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1e-9, float("nan")])
def test_fractions_that_leave_a_part_empty(fraction):
    with pytest.raises(ArgumentError, match=r"holds out 0 of 1437 samples; give a fraction in"):
        digits().held_out(fraction)
