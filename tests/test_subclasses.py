"""Which subclasses keep the meaning of their base, and what is made of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import lean_fx
from graphs import Kinds, MyConv, SameConv, StandardConv
from lean_fx.errors import PassError
from lean_fx.layers.gains import Gains
from lean_fx.layers.rebuild import rebuild
from lean_fx.layers.subclasses import is_channel_linear


class Empty(nn.ConvTranspose1d):
    pass


class Cast(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class Masked(nn.Conv2d):
    """A mask over the kernel."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("mask", torch.ones(3, 3).tril())

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class Scaled(nn.Linear):
    """A number for each input channel."""

    def __init__(self, *args):
        super().__init__(*args)
        self.scales = nn.Parameter(torch.ones(self.in_features))

    def forward(self, x):
        return super().forward(x * self.scales)


class Skips(nn.Linear):
    def forward(self, x):
        return x + super().forward(x)


class Normed(nn.Linear):
    def forward(self, x):
        return super().forward(F.layer_norm(x, x.shape[-1:]))


class Unlike(nn.Linear):
    """Means more in training alone."""

    def forward(self, x):
        return super().forward(x) * (x.var() if self.training else 1)


class Stale(nn.Linear):
    """Multiplies with another tensor than its weight."""

    def __init__(self, *args):
        super().__init__(*args)
        self.other = self.weight.detach().clone()

    def forward(self, x):
        return F.linear(x, self.other[:, : x.shape[-1]]) + 0 * self.weight.sum()


class Raises(nn.Linear):
    def forward(self, x):
        if x.shape[-1] != 16:
            raise ValueError(x.shape)
        return super().forward(x)


@pytest.mark.parametrize(
    "layer",
    [
        Empty(16, 8, 3, groups=2),
        Cast(16, 8),
        Masked(16, 8, 3, groups=4, padding=1, stride=2),
        SameConv(16, 8, 3, stride=2, padding_mode="circular", padding=1),
        StandardConv(16, 8, 3),
    ],
)
def test_subclasses_that_keep_the_meaning(layer):
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    state = torch.get_rng_state()
    assert is_channel_linear(layer)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    made = rebuild(layer, 8)
    assert type(made) is type(layer)
    rank = len(getattr(layer, "kernel_size", ()))
    assert (
        made(torch.rand(2, 8, *(9,) * rank)).shape == layer(torch.rand(2, 16, *(9,) * rank)).shape
    )
    assert made.weight.is_leaf
    assert made.weight.requires_grad


@pytest.mark.parametrize(
    "layer",
    [
        *(MyConv(16, 8, 1), Scaled(16, 8), Skips(16, 16), Normed(16, 8), Unlike(16, 8)),
        *(Stale(16, 8), Raises(16, 8), Cast(16, 8, device="meta")),
    ],
)
def test_subclasses_that_may_mean_more(layer):
    assert not is_channel_linear(layer)
    with pytest.raises(PassError, match="is a subclass of (Linear|Conv2d) and may mean more$"):
        rebuild(layer, 8)


@pytest.mark.parametrize("form", ["graph", "module"])
def test_layers_inside_of_a_layer_are_in_the_plan(form):
    class Gated(nn.Linear):
        def __init__(self):
            super().__init__(32, 32)
            self.gate = nn.Linear(32, 32)

        def forward(self, x):
            return super().forward(x) * self.gate(x).sigmoid()

    model, x = (
        nn.Sequential(nn.Linear(8, 32), nn.ReLU(), Gated(), nn.Linear(32, 2)),
        torch.rand(2, 8),
    )
    lean = lean_fx.leanify(model, x, form=form)
    plan = lean_fx.plan_of(lean)
    assert [site.layers for site in plan.sites] == [("3",), ("2.gate",)]
    assert [each.layer for each in plan.left_alone] == ["0", "2"]
    lean(x).sum().backward()


def test_a_standardised_weight_keeps_the_scale_of_the_layer():
    torch.manual_seed(0)
    layer = StandardConv(64, 32, 3)
    made = rebuild(layer, 16, gains=Gains(3.0))
    x = torch.randn(4, 64, 16, 16)
    wanted = (layer(x) - layer.bias.view(-1, 1, 1)).std()
    found = (made(x[:, :16] / 3) - made.bias.view(-1, 1, 1)).std()
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("training", [True, False])
def test_norms_of_the_weight_are_made_anew(norm, training):
    torch.manual_seed(0)
    layer = norm(nn.Linear(64, 32)).train(training)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    made = rebuild(layer, 16)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    assert made.training == training
    assert made.weight.shape == (32, 16)
    assert {n for n, _ in made.named_parameters()} == {n for n, _ in layer.named_parameters()}
    if norm is parametrizations.spectral_norm:
        # Fifteen steps of power iteration at the start, as torch does: about 1.
        assert torch.linalg.matrix_norm(made.eval().weight, 2).item() == pytest.approx(1, abs=0.1)
    else:
        wanted = layer.weight.square().mean().sqrt() * 2  # of four times fewer channels
        torch.testing.assert_close(made.weight.square().mean().sqrt(), wanted)
        direction = made.parametrizations.weight.original1
        length = made.parametrizations.weight.original0
        literal = length * direction / direction.norm(dim=1, keepdim=True)
        torch.testing.assert_close(made.weight, literal)


def test_all_kinds_in_one_net():
    plan = lean_fx.plan(Kinds(), torch.rand(2, 3, 7, 7))
    assert [(c.layer, c.kind) for site in plan.sites for c in site.consumers] == [
        ("same", "SameConv"),
        ("standard", "StandardConv"),
        ("normed", "Conv2d"),
        ("head", "Linear"),
    ]
    assert lean_fx.plan(Kinds()).sites[0].groups == 2
