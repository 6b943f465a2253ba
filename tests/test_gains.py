"""The gains of a reduction, and the weights that make up for them."""

import pytest
import torch
from torch import nn

import lean_fx
from lean_fx.layers.gains import Gains, gains_between, scaled
from lean_fx.layers.rebuild import rebuild
from lean_fx.reduction.registry import make_reduction


def positive(channels=64):
    torch.manual_seed(0)
    return torch.randn(4096, channels).relu()


@pytest.mark.parametrize(
    ("reduction", "shared", "apart"), [("slice", 1.0, 1.0), ("mean", 1.0, 8**0.5)]
)
def test_gains_of_channels_that_are_alike(reduction, shared, apart):
    values = positive()
    gains = gains_between(1.0, values, make_reduction(reduction, 64, 8, dim=-1)(values))
    assert gains.shared == pytest.approx(shared, rel=0.03)
    assert gains.apart == pytest.approx(apart, rel=0.03)
    assert gains.channels == 8


@pytest.mark.parametrize(
    ("values", "reduced"),
    [
        (positive(), positive(1)),
        (positive() - 0.1, positive(8)),
        (positive(), positive(8) - 0.1),
        (positive(), torch.ones(4096, 8)),
        (torch.eye(64), torch.ones(64, 8)),
    ],
    ids=["one channel", "signs before", "signs after", "nothing differs", "nothing shared"],
)
def test_one_number_where_the_parts_are_not_known(values, reduced):
    whole = 3.0 / float(reduced.square().mean().sqrt())
    assert gains_between(3.0, values, reduced) == Gains(pytest.approx(whole))


GAINS = Gains(7.0, shared=2.0, apart=5.0, channels=4)


def check(weight, made):
    """Channels are the last axis."""
    mean = weight.mean(-1, keepdim=True)
    torch.testing.assert_close(made, 2 * mean + 5 * (weight - mean))


def test_each_arrangement_of_weights():
    linear = torch.randn(3, 4 * 6)
    check(linear.view(3, 4, 6).mT, scaled(linear, GAINS, axis=1).view(3, 4, 6).mT)
    last = Gains(**{**vars(GAINS), "channels_last": True})
    check(linear.view(3, 6, 4), scaled(linear, last, axis=1).view(3, 6, 4))
    conv = torch.randn(3, 4, 5, 5)
    check(conv.movedim(1, -1), scaled(conv, GAINS, axis=1).movedim(1, -1))
    transposed = torch.randn(2 * 4, 3, 5)
    made = scaled(transposed, GAINS, axis=0, groups=2)
    check(transposed.view(2, 4, 3, 5).movedim(1, -1), made.view(2, 4, 3, 5).movedim(1, -1))
    torch.testing.assert_close(scaled(conv, Gains(3.0), axis=1), 3 * conv)


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x + 0)


@pytest.mark.parametrize(
    ("layer", "axis", "divided"),
    [
        (nn.Linear(64, 2048), 1, True),
        (nn.Conv2d(64, 512, 3), 1, True),
        (nn.Conv2d(128, 512, 3, groups=2), 1, True),
        (nn.ConvTranspose2d(128, 512, 3, groups=2), 0, True),
        (nn.GRU(64, 512), 1, True),
        (nn.utils.parametrizations.weight_norm(nn.Linear(64, 2048)), 1, True),
        (Own(64, 2048), 1, False),
    ],
)
def test_rebuilt_layers_answer_to_both_parts_as_before(layer, axis, divided):
    groups = getattr(layer, "groups", 1)
    made = rebuild(layer, 4 * groups, GAINS)

    def parts(layer):
        weight = layer.weight_ih_l0 if isinstance(layer, nn.GRU) else layer.weight
        weight = weight.detach().unflatten(axis, (groups if axis == 0 else 1, -1))
        mean = weight.sum(axis + 1)
        return mean.square().mean(), weight.var(axis + 1).mean() * weight.shape[axis + 1]

    (shared, apart), (new_shared, new_apart) = parts(layer), parts(made)
    wanted = (4, 25) if divided else (49, 49)
    assert new_shared / shared == pytest.approx(wanted[0], rel=0.15)
    assert new_apart / apart == pytest.approx(wanted[1], rel=0.15)


class Flattened(nn.Module):
    """Reads a flatten of channels that are first or last."""

    def __init__(self, last):
        super().__init__()
        self.stem = nn.Linear(8, 32) if last else nn.Conv1d(8, 32, 1)
        self.head = nn.Linear(32 * 6, 512)

    def forward(self, x):
        return self.head(self.stem(x).relu().flatten(1))


@pytest.mark.parametrize("form", ["graph", "module"])
@pytest.mark.parametrize("last", [True, False])
def test_behind_a_flatten_channels_are_found(last, form):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8) if last else torch.randn(2, 8, 6)
    lean = lean_fx.leanify(Flattened(last), x, reduction="mean", channels=8, form=form)
    weight = lean.get_submodule("head").weight.detach()
    parts = weight.view(512, 6, 8) if last else weight.view(512, 8, 6).mT
    ratio = parts.var(-1).mean() / (8 * parts.mean(-1).square().mean())
    assert ratio == pytest.approx(4, rel=0.2)
