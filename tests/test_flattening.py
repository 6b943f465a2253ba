"""What stands between a flatten, or an in-place change, and the layer that reads it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lean_fx
from graphs import Net, reasons, sites


def test_unbatched_inputs():
    def padded(self, x):
        return self.b(F.pad(F.relu(self.a(x)), (1, 1)))

    model = Net(padded, a=nn.Conv2d(3, 32, 3), b=nn.Conv2d(32, 8, 3))
    inputs = torch.rand(3, 32, 32)
    assert sites(model, inputs) == [("pad", 0, 32, ("b",))]
    assert lean_fx.leanify(model, inputs)(inputs).shape == model(inputs).shape


def test_inputs_of_three_axes_may_be_sequences():
    def residual(self, x):
        return self.b((x + self.p(x)).flatten(1))

    model = Net(residual, p=nn.Linear(32, 32), b=nn.Linear(16 * 32, 4))
    assert sites(model, torch.rand(2, 16, 32)) == [("add", -1, 32, ("b",))]
    model = Net(residual, p=nn.Conv1d(32, 32, 1), b=nn.Linear(16 * 32, 4))
    assert sites(model, torch.rand(2, 32, 16)) == [("add", 1, 32, ("b",))]
    model = Net(lambda self, x: self.b(x.flatten(1)), b=nn.Linear(32 * 24, 4))
    for shape, found in (((2, 32, 24), []), ((2, 32, 6, 4), [("x", 1, 32, ("b",))])):
        assert sites(model, torch.rand(shape), reduce_inputs=True) == found
    scaled = Net(
        lambda self, x: self.b((x * self.gain).flatten(1)),
        gain=nn.Parameter(torch.ones(24)),
        b=nn.Linear(32 * 24, 4),
    )
    wanted = "the channels of what is flattened before it are unknown"
    assert reasons(scaled, torch.rand(2, 32, 24))["b"] == wanted


def test_a_view_that_merges_rows_is_no_flatten():
    model = Net(
        lambda self, x: self.b(F.relu(self.a(x)).view(-1, 64)),
        a=nn.Conv1d(1, 32, 3, padding=1),
        b=nn.Linear(64, 1),
    )
    for inputs in (None, torch.rand(2, 1, 64)):
        assert sites(model, inputs) == [("view", -1, 64, ("b",))]


def test_the_view_of_a_later_branch_may_use_sizes_computed_late():
    def heads(self, x):
        x = F.relu(self.a(x))
        return self.policy(x), self.value(x.view(x.size(0), -1))

    model = Net(
        heads, a=nn.Conv2d(3, 32, 1), policy=nn.Conv2d(32, 2, 1), value=nn.Linear(32 * 16, 1)
    )
    lean = lean_fx.leanify(model)
    assert [out.shape for out in lean(torch.rand(2, 3, 4, 4))] == [(2, 2, 4, 4), (2, 1)]
    assert len(lean.meta["lean_fx.plan"].sites) == 1


def test_an_in_place_change_between_two_readers_parts_them():
    def changes(self, x):
        x = self.a(x)
        y = self.b(x)
        F.relu(x, inplace=True)
        return y, self.c(x)

    model = Net(changes, a=nn.Conv2d(3, 32, 1), b=nn.Conv2d(32, 4, 1), c=nn.Conv2d(32, 4, 1))
    model.eval()
    assert [layers for *_, layers in sites(model)] == [("b",), ("c",)]
    lean = lean_fx.leanify(model)
    inputs = torch.rand(2, 3, 4, 4)
    with torch.no_grad():
        second = lean(inputs)[1]
        value = F.relu(lean.a(inputs))
        torch.testing.assert_close(second, lean.c(lean.reductions.a_1(value)))


def test_an_in_place_change_between_flatten_and_layer_is_refused():
    def changes(self, x):
        x = self.a(x)
        flat = x.permute(0, 2, 3, 1).flatten(1)
        x.clamp_(min=0.5)
        return self.b(flat)

    model = Net(changes, a=nn.Conv2d(3, 32, 1), b=nn.Linear(32 * 16, 4))
    assert reasons(model)["b"] == "an in-place operation stands between the flatten and it"


def test_an_in_place_dropout_between_flatten_and_layer_moves():
    def forward(self, x):
        return self.b(self.drop(self.pool(F.relu(self.a(x))).flatten(1)))

    model = Net(
        forward,
        a=nn.Conv2d(3, 32, 1),
        pool=nn.AdaptiveMaxPool2d(2),
        drop=nn.Dropout(0.5, inplace=True),
        b=nn.Linear(128, 4),
    )
    inputs = torch.rand(2, 3, 4, 4)
    for given in (None, inputs):
        assert sites(model, given) == [("pool", 1, 32, ("b",))]
    for reduction in ("lean", "max"):  # the gradient of a maximum needs the maximum
        lean = lean_fx.leanify(model, inputs, reduction=reduction)
        assert not lean.drop.inplace
        lean(inputs).square().sum().backward()
        lean.eval()
        pooled = lean.pool(F.relu(lean.a(inputs)))
        wanted = lean.b(lean.reductions.pool(pooled).flatten(1))
        torch.testing.assert_close(lean(inputs), wanted)
    assert model.drop.inplace


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x, y, flat: self.b(self.drop(flat)) + y.mean((1, 2, 3))[:, None],
        lambda self, x, y, flat: self.b(self.drop(flat)) + flat[:, :4],
        lambda self, x, y, flat: self.b(self.drop(self.drop(flat))),
        lambda self, x, y, flat: self.b(F.dropout(flat, 0.5, True, True)),
    ],
)
def test_an_in_place_dropout_that_others_see_is_refused(forward):
    def whole(self, x):
        y = self.a(x)
        return forward(self, x, y, y.flatten(1))

    model = Net(whole, a=nn.Conv2d(3, 32, 1), b=nn.Linear(512, 4), drop=nn.Dropout(inplace=True))
    for inputs in (None, torch.rand(2, 3, 4, 4)):
        assert reasons(model, inputs)["b"].startswith("an in-place operation stands between")


@pytest.mark.parametrize("view", [lambda y: y.view(1, 1), lambda y: y.flatten(0, -1)])
def test_a_number_that_is_given_axes_is_no_flatten(view):
    def scaled(self, x):
        return self.b(self.a(x)) * view(x.mean())

    model, x = Net(scaled, a=nn.Linear(8, 32), b=nn.Linear(32, 4)), torch.rand(2, 8)
    assert sites(model, x) == [("a", -1, 32, ("b",))]
    assert lean_fx.leanify(model, x)(x).shape == (2, 4)


def test_the_flatten_of_one_position_changes_nothing():
    model = Net(
        lambda self, x: self.b(self.a(x).roll(1, 1).mean((2, 3), keepdim=True).flatten(1)),
        a=nn.Conv2d(3, 32, 1),
        b=nn.Linear(32, 4),
    )
    inputs = torch.rand(2, 3, 4, 4)
    assert sites(model, inputs) == [("flatten", -1, 32, ("b",))]
    assert lean_fx.leanify(model, inputs)(inputs).shape == (2, 4)
    assert reasons(model)["b"] == "the channels of what is flattened before it are unknown"


def test_functional_norms_keep_the_channels():
    def forward(self, x):
        return self.b(F.batch_norm(self.a(x), None, None, training=True).flatten(1))

    model = Net(forward, a=nn.Conv2d(3, 32, 1), b=nn.Linear(512, 4))
    assert sites(model) == [("batch_norm", 1, 32, ("b",))]


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.permute(dims=(0, 2, 3, 1)),
        lambda x: torch.permute(x, (0, 2, 3, 1)),
        lambda x: x.transpose(dim0=1, dim1=3),
        lambda x: x.transpose(1, dim1=3),
    ],
)
def test_axes_may_be_given_by_name(move):
    model = Net(
        lambda self, x: self.b(torch.flatten(input=move(self.a(x)), start_dim=1)),
        a=nn.Conv2d(3, 32, 1),
        b=nn.Linear(32 * 16, 4),
    )
    assert sites(model, torch.rand(2, 3, 4, 4))[0][1:] == (-1, 32, ("b",))


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.flatten(1, 3),
        lambda x: x.flatten(-3),
        lambda x: x.flatten(2).flatten(1),
        lambda x: x.reshape(shape=(x.size(0), -1)),
        lambda x: torch.reshape(x, shape=(x.shape[0], -1)),
        lambda x: (x + 1).flatten(1),
        lambda x: (x**2).softmax(1).flatten(1),
        lambda x: x.to(torch.float32).add(1).flatten(1),
    ],
)
def test_flatten_in_other_words(flatten):
    model = Net(
        lambda self, x: self.b(flatten(self.a(x))), a=nn.Conv2d(3, 32, 1), b=nn.Linear(512, 4)
    )
    inputs = torch.rand(2, 3, 4, 4)
    assert sites(model, inputs)[0][1:] == (1, 32, ("b",))
    assert lean_fx.leanify(model, inputs)(inputs).shape == (2, 4)


def test_a_flatten_of_unknown_channels_is_refused():
    model = Net(
        lambda self, x: self.b(self.a(x).roll(1, 1).flatten(1)),
        a=nn.Conv2d(3, 32, 1),
        b=nn.Linear(512, 4),
    )
    assert reasons(model)["b"] == "the channels of what is flattened before it are unknown"


def test_what_stands_between_flatten_and_layer_is_named():
    model = Net(
        lambda self, x: self.b(F.relu(self.a(x).flatten(1))),
        a=nn.Conv2d(3, 32, 1),
        b=nn.Linear(512, 4),
    )
    assert reasons(model)["b"] == "relu stands between the flatten and it; put it before"
