"""The checks of options that everything shares."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import lean_fx
from lean_fx.checks import check_choice, check_int, check_ints
from lean_fx.errors import ArgumentError
from lean_fx.experiment.training import Settings
from lean_fx.planning.policy import check_channels_policy


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_an_int_is_one_of_python(value):
    assert type(check_int("f: n", value, 1)) is int
    assert check_int("f: n", value, 3, 3) == 3
    assert json.dumps(check_ints("f: n", [value, 4], 1)) == "[3, 4]"


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), 3.0, np.float64(3), "3", None, torch.tensor(3), 0, -1, 10]
)
def test_what_is_no_int_in_the_range(value):
    with pytest.raises(ArgumentError) as caught:
        check_int("f: n", value, 1, 9)
    assert str(caught.value) == f"f: n={value!r} is not an int of 1 to 9"


@pytest.mark.parametrize("values", [(), [0], [1, True], 3, "12", None, {1}])
def test_what_is_no_list_of_ints(values):
    with pytest.raises(ArgumentError) as caught:
        check_ints("f: n", values, 1)
    assert str(caught.value) == f"f: n={values!r} is not a list of ints of 1 or more"


@pytest.mark.parametrize("value", ["c", "", None, 3, ["a"]])
def test_what_is_no_choice(value):
    check_choice("f: way", "b", ("a", "b"))
    with pytest.raises(ArgumentError) as caught:
        check_choice("f: way", value, ("a", "b"))
    assert str(caught.value) == f"f: way={value!r} is not known; use a or b"


def test_ints_of_numpy_are_taken_everywhere():
    n = np.int64(4)
    module = lean_fx.LeanReduction(2 * n, n, iterations=n, dim=np.int64(-1))
    kept = (module.in_channels, module.out_channels, module.iterations, module.dim)
    assert list(map(type, kept)) == [int] * 4
    assert module(torch.rand(3, 8)).shape == (3, 4)
    assert lean_fx.lean_reduction(torch.rand(3, 8), torch.rand(4), n - 3, iterations=n).shape == (
        3,
        4,
    )
    check_channels_policy(n)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    plan = lean_fx.plan(net, channels=n, round_to=n, min_channels=n)
    assert [site.out_channels for site in plan.sites] == [4]
    assert lean_fx.Plan.from_json(plan.to_json()) == plan
    one, two = np.int64(1), np.int64(2)
    found = lean_fx.compare({"net": net}, torch.rand(2, 4), batches=[one], threads=one, rounds=two)
    assert [latency.threads for latency in found.models[0].latencies] == [1]
    assert "net" in found.to_json()
    assert type(Settings(epochs=n, batch_size=n, seed=n).seed) is int
