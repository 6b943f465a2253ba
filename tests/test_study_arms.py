"""The models that a study compares: sites, narrower nets, layers factored."""

import math
from types import SimpleNamespace

import onnx
import pytest
import torch
from torch import nn

from lean_fx import plan_of
from lean_fx.errors import ArgumentError
from lean_fx.experiment.arms import model_of
from lean_fx.experiment.budget import equal_budget
from lean_fx.experiment.configurations import Configuration, Space
from lean_fx.experiment.factored import depthwise_separable, low_rank
from lean_fx.measure.costs import count_macs, count_parameters
from lean_fx.reduction.lean import LeanReduction

X = torch.rand(2, 3, 8, 8)


def net(width):
    a, b, c = (max(1, round(full * width)) for full in (32, 48, 64))
    return nn.Sequential(
        *(nn.Conv2d(3, a, 3), nn.ReLU(), nn.Conv2d(a, b, 3), nn.ReLU(), nn.Conv2d(b, c, 3)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10)),
    )


def reduced_layers(model):
    return [each.layer for site in plan_of(model).sites for each in site.consumers]


@pytest.mark.parametrize(
    ("sites", "layers"),
    [
        ("all", ["2", "4", "8"]),
        ("late", ["4", "8"]),
        ("last", ["8"]),
        ("1", ["4"]),
        ("[24]", ["2", "4"]),
    ],
)
def test_sites(sites, layers):
    model = model_of(Configuration("slice", 8, sites), net, X)
    assert reduced_layers(model) == layers
    assert model(X).shape == (2, 10)


@pytest.mark.parametrize("sites", ["3", "features*"])
def test_sites_that_are_none(sites):
    with pytest.raises(ArgumentError, match=f"sites='{sites[:8]}.*' is none of the 3 sites; use"):
        model_of(Configuration("slice", 8, sites), net, X)


def test_options_reach_the_reductions_that_take_them():
    options = (("damping", 0.25),)
    model = model_of(Configuration("lean_damped", 8, options=options), net, X)
    found = [each.damping for each in model.modules() if isinstance(each, LeanReduction)]
    assert found == [0.25] * 3
    assert model_of(Configuration("slice", 8, options=options), net, X)(X).shape == (2, 10)


def test_options_that_an_arm_does_not_take_make_no_second_configuration():
    space = Space(arms=("slice", "lean_damped"), options={"damping": (0.5, 1.0)})
    names = [each.name for each in space]
    assert names == [
        "slice sqrt, rate 0.001",
        "lean_damped sqrt, damping 0.5, rate 0.001",
        "lean_damped sqrt, damping 1.0, rate 0.001",
    ]


@pytest.mark.parametrize("by", ["parameters", "macs"])
def test_the_narrower_net_is_the_nearest_of_all_widths(by):
    def count(model):
        return count_parameters(model) if by == "parameters" else count_macs(model, X[:1])

    budget = count(net(0.37))
    nearest = min((net(step / 256) for step in range(1, 257)), key=lambda m: abs(count(m) - budget))
    found = equal_budget(net, X, of=net(0.37), by=by)
    assert abs(count(found) - budget) <= abs(count(nearest) - budget)


def time_by(monkeypatch, latency):
    """Let a function of the parameters be the clock, which no other work disturbs."""

    def timed(files, *arrays):
        assert [each.shape for each in arrays] == [(1, *X.shape[1:])]
        counted = {}
        for name, file in files.items():
            weights = onnx.load(file).graph.initializer
            counted[name] = sum(math.prod(each.dims) for each in weights if each.data_type == 1)
        return {name: SimpleNamespace(median_ms=latency(n)) for name, n in counted.items()}

    monkeypatch.setattr("lean_fx.experiment.budget.time_onnx", timed)


def test_the_narrower_net_of_equal_latency_is_as_fast(monkeypatch):
    time_by(monkeypatch, lambda count: count)
    found = equal_budget(net, X, of=net(0.6), by="latency", steps=10)
    assert count_parameters(found) == count_parameters(net(0.6))


def test_of_nets_that_are_fast_enough_the_widest_is_taken(monkeypatch):
    whole = count_parameters(net(0.75))
    time_by(monkeypatch, lambda count: 1 if count == whole else count)  # a width the runtime likes
    found = equal_budget(net, X, of=net(0.37), by="latency", steps=8)
    assert count_parameters(found) == whole


def test_where_none_is_fast_enough_the_fastest_is_taken(monkeypatch):
    time_by(monkeypatch, lambda count: count)
    found = equal_budget(net, X, of=net(0.01), by="latency", steps=4)
    assert count_parameters(found) == count_parameters(net(0.25))


@pytest.mark.parametrize("steps", [0, 2.5, "4"])
def test_steps_are_checked(steps):
    with pytest.raises(ArgumentError, match="^equal_width: steps="):
        equal_budget(net, X, of=net(0.5), steps=steps)


def test_a_width_that_changes_nothing_is_refused():
    with pytest.raises(ArgumentError, match="the same for 11 widths from 0.000977 to 1; give a"):
        equal_budget(lambda _: net(1.0), X, of=net(0.5))


def test_a_width_that_changes_no_latency_is_refused(monkeypatch):
    time_by(monkeypatch, lambda count: count)
    with pytest.raises(
        ArgumentError, match="parameters of make.* the same for 3 widths from 0.333"
    ):
        equal_budget(lambda _: net(1.0), X, of=net(0.5), by="latency", steps=3)


def test_a_factory_that_gives_no_module_is_refused():
    with pytest.raises(ArgumentError, match=r"make\(1\) gives a int, which is not an nn.Module"):
        equal_budget(lambda _: 3, X, of=net(0.5))


LAYERS = [
    nn.Conv2d(32, 48, 3, stride=2, padding=1, dilation=2),
    nn.Conv2d(32, 48, (1, 5), groups=4, bias=False, padding_mode="circular", padding=(0, 2)),
    nn.Conv1d(32, 48, 3),
    nn.Linear(32, 48, bias=False),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda each: type(each).__name__)
def test_factored_layers_give_the_shapes_of_the_whole(layer):
    spatial = {nn.Linear: (), nn.Conv1d: (16,)}.get(type(layer), (16, 16))
    x = torch.rand(2, 32, *spatial)
    for model in (
        low_rank(nn.Sequential(layer), {"0": 8}),
        depthwise_separable(nn.Sequential(layer), ["0"]),
    ):
        assert model(x).shape == layer(x).shape
        bias = {name for name, _ in model.named_parameters() if name.endswith("bias")}
        assert bool(bias) == (layer.bias is not None)


def test_a_layer_of_full_rank_can_be_the_whole_layer():
    layer = nn.Conv2d(4, 6, 3, padding=1).double()
    model = low_rank(nn.Sequential(layer), {"0": 6}).double()
    first, second = model.get_submodule("0")
    with torch.no_grad():
        first.weight.copy_(layer.weight)
        second.weight.copy_(torch.eye(6).view(6, 6, 1, 1))
        second.bias.copy_(layer.bias)
    x = torch.rand(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(model(x), layer(x))


def test_parameters_of_factored_layers():
    model = model_of(Configuration("low_rank", 8), net, X)
    by_hand = (3 * 9 * 32 + 32) + (32 * 9 * 8 + 8 * 48 + 48) + (48 * 9 * 8 + 8 * 64 + 64)
    assert count_parameters(model) == by_hand + 64 * 8 + 8 * 10 + 10
    model = model_of(Configuration("depthwise", 8), net, X)
    by_hand = (3 * 9 * 32 + 32) + (32 * 9 + 32 * 48 + 48) + (48 * 9 + 48 * 64 + 64)
    assert count_parameters(model) == by_hand + 64 * 10 + 10


def test_other_layers_cannot_be_factored():
    with pytest.raises(ArgumentError, match="low_rank: '0' is a GRU; only linear layers and"):
        low_rank(nn.Sequential(nn.GRU(32, 8)), {"0": 4})


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"arms": ()}, "Space: arms is empty; give one choice or more"),
        ({"arms": "slice"}, "Space: arms='slice' is not a list of choices; give \\('slice',\\)"),
        ({"arms": ("slize",)}, "Space: arm='slize' is not known; use baseline, narrow,"),
        ({"learning_rates": (0.0,)}, "Space: learning rate=0.0 lies outside"),
        ({"seeds": (-1,)}, "Space: seed=-1 is not an int of 0 to"),
        ({"options": 3}, "Space: options=3 is not a mapping"),
        ({"like": "narrow"}, "Space: like='narrow' is not known"),
    ],
)
def test_choices_out_of_range(choices, message):
    with pytest.raises(ArgumentError, match=message):
        Space(**choices)
