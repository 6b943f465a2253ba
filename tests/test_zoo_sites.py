"""The count of call sites, on nets where it is known."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lean_fx
from support.zoo_sites import CallSite, find_call_sites, worth_reducing
from zoo_nets import OneSize, small


def calls(model, *inputs):
    return [
        (site.kind, site.layer, site.in_channels) for site in find_call_sites(model.eval(), inputs)
    ]


def left(model, *inputs):
    return [
        site.layer
        for site in find_call_sites(model, inputs)
        if worth_reducing(site) and not site.reads_reduction
    ]


class Formulas(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 20))
        self.table = nn.Parameter(torch.randn(24, 7))
        self.kernel = nn.Conv1d(7, 5, 1)

    def forward(self, x):
        y = F.linear(x, self.weight)  # [2, 4, 24]
        scores = y @ y.transpose(1, 2)  # of two values: no site
        z = scores.softmax(-1) @ y @ self.table  # [2, 4, 7]
        weight = self.kernel.weight
        weight = (weight - weight.mean((1, 2), keepdim=True)) * 2
        return F.conv1d(z.transpose(1, 2), weight)


def test_functions_formulas_and_computed_weights_are_counted():
    assert calls(Formulas(), torch.rand(2, 4, 20)) == [
        ("linear", "", 20),
        ("linear", "", 24),
        ("conv", "kernel", 7),
    ]
    found = find_call_sites(Formulas().eval(), (torch.rand(2, 4, 20),))
    assert [site.weight for site in found] == ["weight", "table", "kernel.weight"]


def test_kinds_of_convolutions():
    model = nn.Sequential(
        nn.Conv2d(6, 8, 1),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ConvTranspose2d(8, 12, 2),
        nn.ConvTranspose2d(12, 6, 2, groups=3),
    )
    found = find_call_sites(model, (torch.rand(1, 6, 9, 9),))
    assert [(site.kind, site.in_channels, site.groups) for site in found] == [
        ("conv", 6, 1),
        ("depthwise", 8, 8),
        ("conv", 8, 2),
        ("conv", 8, 1),
        ("conv", 12, 3),
    ]


def test_attention_is_two_sites_also_where_torch_has_a_fast_path():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    assert calls(layer, torch.rand(2, 5, 16)) == [
        ("attention", "self_attn", 16),
        ("attention", "self_attn.out_proj", 16),
        ("linear", "linear1", 16),
        ("linear", "linear2", 32),
    ]
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.filterwarnings("ignore:TF32")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("fused", [True, False])
def test_recurrent_layers_count_once_a_layer_and_direction(kind, fused):
    layers = kind(16, 20, num_layers=2, bidirectional=True)
    with torch.backends.mkldnn.flags(enabled=fused):
        found = calls(layers, torch.rand(7, 2, 16))
    assert found == [
        ("recurrent", "", 16),
        ("recurrent", "", 16),
        ("recurrent", "", 40),
        ("recurrent", "", 40),
    ]


def test_a_layer_that_is_called_twice_is_two_sites():
    layer = nn.Linear(16, 16)
    assert calls(nn.Sequential(layer, nn.ReLU(), layer), torch.rand(2, 16)) == [
        ("linear", "0", 16),
        ("linear", "0", 16),
    ]


@pytest.mark.parametrize("reduction", ["lean", "projection"])
def test_reduced_sites_are_not_left_and_reductions_are_none(reduction):
    images = torch.rand(2, 3, 64, 64)
    model = small().eval()
    lean = lean_fx.leanify(model, images, reduction=reduction)
    assert Counter(site.kind for site in find_call_sites(lean, (images,))) == Counter(
        site.kind for site in find_call_sites(model, (images,))
    )
    assert left(model, images) == ["4", "8"]
    assert left(lean, images) == []


def test_a_reduction_is_known_behind_a_flatten():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Dropout(), nn.Flatten(), nn.Linear(64, 2)).eval()
    images = torch.rand(2, 3, 4, 4)
    lean = lean_fx.leanify(model, images)
    assert lean.get_submodule("3").in_features == 16
    assert left(lean, images) == []


def test_what_is_not_reduced_is_left():
    images = torch.rand(2, 3, 96, 96)
    model = OneSize().eval()
    assert left(model, images) == ["", "head"]
    assert left(lean_fx.leanify(model, images), images) == [""]


def test_the_model_stays_as_it_is():
    model = small().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_call_sites(model, (torch.rand(2, 3, 64, 64),))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_depthwise_and_narrow_sites_are_not_worth_reducing():
    assert worth_reducing(CallSite("conv", "a", 16))
    assert not worth_reducing(CallSite("conv", "a", 15))
    assert not worth_reducing(CallSite("depthwise", "a", 64, 64))
