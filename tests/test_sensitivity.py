"""How far noise moves a model's outputs: the figure itself, and what leanify says of it."""

import json
import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import lean_fx
from lean_fx.errors import ArgumentError, LeanWarning, PlanError


def deep_net(layers=8, width=64):
    """ReLU layers at the scale of their inputs, as batch norm keeps them."""
    return nn.Sequential(
        *(
            nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU())
            for _ in range(layers)
        ),
        nn.Linear(width, 10),
    )


def test_it_is_the_relative_change_of_the_outputs_by_that_of_the_inputs():
    layer, x = nn.Linear(5, 3).double(), torch.randn(7, 5, dtype=torch.float64)
    noise = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).double()
    moved = 0.01 * x.square().mean().sqrt() * noise @ layer.weight.T
    y = layer(x)
    wanted = (moved - moved.mean(0)).norm() / (y - y.mean(0)).norm() / 0.01
    assert lean_fx.sensitivity(layer, x, noise=0.01) == pytest.approx(wanted.item(), rel=1e-9)


def test_a_single_sample_is_not_centred():
    layer, x = nn.Linear(5, 3).double(), torch.randn(1, 5, dtype=torch.float64)
    noise = torch.randn(1, 5, generator=torch.Generator().manual_seed(0)).double()
    moved = 1e-3 * x.square().mean().sqrt() * noise @ layer.weight.T
    wanted = moved.norm() / layer(x).norm() / 1e-3
    assert lean_fx.sensitivity(layer, x) == pytest.approx(wanted.item(), rel=1e-9)


class Told(nn.Module):
    """Returns a mapping, and takes what is not a number too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, index, flag=True):
        return {"picked": self.layer(x["x"])[index], "index": index, "flag": flag}


def test_inputs_and_outputs_may_be_of_any_form():
    value = lean_fx.sensitivity(Told(), ({"x": torch.randn(6, 4)}, torch.tensor([0, 1, 2, 5])))
    assert 0.1 < value < 10


def test_inputs_of_eight_bits_are_no_place_for_noise():
    x = torch.randn(2, 4).to(torch.float8_e4m3fn)
    with pytest.raises(ArgumentError, match="no example input is floating-point"):
        lean_fx.sensitivity(nn.Identity(), x)
    net = nn.Sequential(Widened(), nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4))
    assert lean_fx.plan(net, x).sensitivity is None


class Widened(nn.Module):
    def forward(self, x):
        return x.float()


def test_a_constant_model_moves_nothing():
    layer = nn.Linear(4, 2)
    nn.init.zeros_(layer.weight)
    assert lean_fx.sensitivity(layer, torch.randn(3, 4)) == 0.0


def test_the_model_and_the_random_numbers_stay_as_they_are():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    numbers = torch.get_rng_state()
    first = lean_fx.sensitivity(
        model, torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    )
    assert torch.equal(torch.get_rng_state(), numbers)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert not any(module.training for module in model.modules())
    assert first < 10  # the same units are dropped in both runs: else it were near 1,000


@pytest.mark.parametrize(
    ("model", "inputs", "noise", "message"),
    [
        (
            nn.Linear(4, 2),
            torch.rand(2, 4),
            0,
            "sensitivity: noise=0 is not a finite number above 0; give 1e-3, say",
        ),
        (
            nn.Linear(4, 2),
            torch.rand(2, 4),
            math.nan,
            "sensitivity: noise=nan is not a finite number above 0; give 1e-3, say",
        ),
        (
            nn.Embedding(4, 2),
            torch.tensor([1, 2]),
            1e-3,
            "sensitivity: no example input is floating-point, so noise has no place; give one",
        ),
        (
            nn.Linear(4, 2),
            torch.rand(2, 5),
            1e-3,
            "sensitivity: Linear fails in training (RuntimeError: mat1 and mat2 shapes cannot be "
            "multiplied (2x5 and 4x2))",
        ),
        (
            nn.Linear(4, 2, device="meta"),
            torch.rand(2, 4),
            1e-3,
            "sensitivity: the model is on the meta device; give it numbers",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(model, inputs, noise, message):
    with pytest.raises(ArgumentError) as caught:
        lean_fx.sensitivity(model, inputs, noise=noise)
    assert str(caught.value) == message


@pytest.mark.parametrize("make", [lean_fx.leanify, lean_fx.plan])
@pytest.mark.parametrize("form", ["graph", "module"])
def test_a_result_that_amplifies_noise_is_told_and_stands_in_the_plan(make, form):
    model, x = deep_net(), torch.randn(64, 64)
    with pytest.warns(LeanWarning) as told:
        made = make(model, x, form=form)
    (message,) = (str(each.message) for each in told)
    plan = made if isinstance(made, lean_fx.Plan) else lean_fx.plan_of(made)
    before, after = plan.sensitivity
    assert before == lean_fx.sensitivity(model, x)
    assert after > 10 * before
    assert message == (
        f"Sequential: noise on its inputs moves the outputs of the reduced model "
        f"{after / before:.0f} times as far as its own, so it may train badly; "
        "reduction='lean_damped' does not amplify noise"
    )
    if make is lean_fx.leanify:
        assert after == lean_fx.sensitivity(made, x)


@pytest.mark.parametrize("reduction", ["lean_damped", "lean_gated", "lean_simplex"])
def test_the_conditioned_forms_do_not_amplify_noise(reduction):
    model, x = deep_net(), torch.randn(64, 64)
    before, after = lean_fx.plan(model, x, reduction=reduction).sensitivity
    assert after < 5 * before


def test_a_plan_is_the_same_each_time_and_draws_no_random_numbers():
    model, x = deep_net(2), torch.randn(64, 64)
    state = torch.get_rng_state()
    first = lean_fx.plan(model, x, reduction="lean_damped")
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(3)
    assert lean_fx.plan(model, x, reduction="lean_damped").to_json() == first.to_json()


def test_several_threads_make_the_same_plan():
    model, x = deep_net(2), torch.randn(64, 64)
    wanted = lean_fx.plan(model, x, reduction="lean_damped").to_json()
    with ThreadPoolExecutor(8) as pool:
        texts = pool.map(
            lambda _: lean_fx.plan(model, x, reduction="lean_damped").to_json(), range(24)
        )
    assert {*texts} == {wanted}


def test_without_numbers_the_plan_has_none():
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4))
    assert lean_fx.plan(model).sensitivity is None
    meta = nn.Sequential(nn.Linear(4, 32, device="meta"), nn.Linear(32, 4, device="meta"))
    assert lean_fx.plan(meta, torch.rand(2, 4, device="meta")).sensitivity is None


def test_it_goes_through_json():
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4))
    plan = lean_fx.plan(model, torch.rand(8, 4))
    assert len(plan.sensitivity) == 2
    assert lean_fx.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("value", [[1.0], [1.0, "2"], 3.0, [1.0, -1.0], [1.0, math.nan], "ab"])
def test_other_sensitivities_in_json_are_refused(value):
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4))
    content = json.loads(lean_fx.plan(model).to_json())
    with pytest.raises(PlanError, match="sensitivity=.* is not two numbers of 0 or more"):
        lean_fx.Plan.from_json(json.dumps({**content, "sensitivity": value}))


def test_leanify_without_a_site_measures_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeanWarning)
        lean = lean_fx.leanify(nn.Sequential(nn.Linear(4, 2)), torch.rand(2, 4))
    assert lean_fx.plan_of(lean).sensitivity is None
