"""Layers whose weight has a norm that torch made of hooks are reduced, and get one of today."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import lean_fx
from graphs import reasons
from lean_fx.layers.gains import Gains
from lean_fx.layers.legacy_norms import as_parametrization
from lean_fx.layers.rebuild import rebuild

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::lean_fx.LeanWarning")

OLD = {"weight_norm": nn.utils.weight_norm, "spectral_norm": nn.utils.spectral_norm}
NEW = {
    "weight_norm": parametrizations._WeightNorm,
    "spectral_norm": parametrizations._SpectralNorm,
}
LAYERS = {
    "linear": (lambda: nn.Linear(32, 8), (2, 32)),
    "conv": (lambda: nn.Conv2d(32, 8, 3, bias=False), (2, 32, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose1d(32, 8, 3), (2, 32, 6)),
}


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("norm", OLD)
def test_it_is_the_same_layer(norm, kind, called):
    make, shape = LAYERS[kind]
    layer, x = OLD[norm](make()), torch.rand(shape)
    if called:
        layer(x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.5)  # as after some steps
    seed, before = torch.get_rng_state(), copy.copy(vars(layer))
    twin = as_parametrization(layer)
    assert torch.equal(torch.get_rng_state(), seed)
    assert vars(layer) == before
    assert {id(each) for each in twin.parameters()} == {id(each) for each in layer.parameters()}
    torch.testing.assert_close(twin.eval()(x), layer.eval()(x))


def test_layers_without_are_themselves():
    for layer in (nn.Linear(4, 2), parametrizations.weight_norm(nn.Linear(4, 2))):
        assert as_parametrization(layer) is layer
    on_bias = nn.utils.weight_norm(nn.Linear(4, 2), "bias")
    assert as_parametrization(on_bias) is on_bias


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("norm", OLD)
def test_they_are_reduced_and_export(norm, kind, tmp_path):
    make, shape = LAYERS[kind]
    layer = OLD[norm](make())
    layer(torch.rand(shape))
    model = nn.Sequential(nn.ReLU(), layer)
    inputs = torch.rand(shape)
    lean = lean_fx.leanify(model, inputs, channels=4, reduce_inputs=True)
    made = lean.get_submodule("1")
    assert type(made.parametrizations.weight[0]) is NEW[norm]
    assert (made.in_features if kind == "linear" else made.in_channels) == 4
    assert not parametrize.is_parametrized(layer)
    lean(inputs).square().sum().backward()
    assert all(each.grad is not None for each in lean.parameters())
    lean_fx.export_onnx(lean, tmp_path / "net.onnx", inputs)
    again = lean_fx.Plan.from_json(lean.meta["lean_fx.plan"].to_json()).apply(model)
    assert str(again) == str(lean)


def test_the_scale_is_that_of_the_layer():
    layer = nn.utils.weight_norm(nn.Linear(512, 256))
    with torch.no_grad():
        layer.weight_g.mul_(3)
    made = rebuild(layer, 64, gains=Gains(2.0))
    wanted = 3 * 2 * 8**0.5 * nn.Linear(512, 256).weight.std()
    torch.testing.assert_close(made.weight.std(), wanted, rtol=0.05, atol=0.0)


def test_more_than_one_norm_or_other_hooks_stay():
    twice = nn.utils.spectral_norm(nn.utils.weight_norm(nn.Linear(32, 8)), "weight_v")
    hooked = nn.utils.weight_norm(nn.Linear(32, 8))
    hooked.register_forward_hook(lambda *_: None)
    for layer in (twice, hooked):
        found = reasons(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), layer))
        assert found["2"] == "it has hooks, which a rebuilt layer would lose"


def test_what_is_not_traced_reduces_them_too():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 32), nn.utils.weight_norm(nn.Linear(32, 8))

        def forward(self, x):
            x = self.a(x)
            return self.b(x if x.sum() > 0 else -x)

    lean = lean_fx.leanify(Branching(), torch.rand(2, 4), channels=4)
    assert isinstance(lean, Branching)
    assert lean(torch.rand(2, 4)).shape == (2, 8)
    assert [site.layers for site in lean.meta["lean_fx.plan"].sites] == [("b",)]
