"""Layers that reduce their own input: called several times, or in a model that cannot be traced."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

import lean_fx
from graphs import Again
from lean_fx.errors import ArgumentError, CaptureError, LeanWarning, PlanError
from lean_fx.planning import observed

UNTRACED = "cannot trace its forward .*; each layer reduces its own input"


class Loop(nn.Module):
    """Cells in a Python loop over as many steps as there are: torch.fx cannot trace it."""

    def __init__(self, kind=nn.GRUCell):
        super().__init__()
        self.embed = nn.Linear(6, 32)
        self.cell = kind(32, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        state = None
        for step in range(x.size(1)):
            state = self.cell(input=self.embed(x[:, step]), hx=state)
        return self.head(state[0] if isinstance(state, tuple) else state)


def untraced(model, *arguments, **options):
    with pytest.warns(LeanWarning, match=UNTRACED):
        return lean_fx.leanify(model, *arguments, **options)


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_cells_in_a_loop(kind):
    model, x = Loop(kind), torch.randn(4, 5, 6)
    lean = untraced(model, x, channels=8)
    assert type(lean) is Loop
    assert [site.layers for site in lean.meta["lean_fx.plan"].sites] == [("cell",), ("head",)]
    for length in (5, 2, 9):  # any number of steps
        x = torch.randn(4, length, 6)
        state = None
        for step in range(length):
            reduced = lean_fx.lean_reduction(lean.embed(x[:, step]), lean.cell.reduction.seed)
            state = kind.forward(lean.cell, reduced, state)
        last = state[0] if kind is nn.LSTMCell else state
        expected = F.linear(
            lean_fx.lean_reduction(last, lean.head.reduction.seed),
            lean.head.weight,
            lean.head.bias,
        )
        torch.testing.assert_close(lean(x), expected)
    assert isinstance(model.cell, kind)
    assert model.cell.input_size == 32


class Holds(nn.Module):
    """What cannot be traced is a part of it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 32)
        self.second = nn.Linear(32, 6)
        self.loop = Loop()

    def forward(self, x):
        return self.loop(self.second(self.first(x).relu()))


def test_skip_a_type_of_module_that_holds_layers():
    model, x = Holds(), torch.randn(4, 5, 6)
    assert {site.layers for site in lean_fx.plan(model, x, skip=Loop).sites} == {("second",)}
    with pytest.warns(LeanWarning, match=UNTRACED):
        assert not lean_fx.plan(nn.Sequential(Loop()), x, skip=Loop).sites


def test_a_part_that_cannot_be_traced():
    model, x = Holds(), torch.randn(4, 5, 6)
    lean = lean_fx.leanify(model, x, channels=8)
    plan = lean.meta["lean_fx.plan"]
    assert [(site.value, site.layers) for site in plan.sites] == [
        ("relu", ("second",)),
        ("", ("loop.cell",)),
        ("", ("loop.head",)),
    ]
    assert isinstance(lean.loop, Loop)
    lean(torch.randn(4, 3, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in lean.parameters())
    again = lean_fx.Plan.from_json(plan.to_json()).apply(Holds(), x)
    again.load_state_dict(lean.state_dict())
    torch.testing.assert_close(again(x), lean(x), rtol=0, atol=0)
    assert lean(torch.randn(2, 9, 6)).shape == (2, 3)


class Deep(nn.Module):
    """What cannot be traced lies deep inside."""

    def __init__(self):
        super().__init__()
        self.holds = Holds()

    def forward(self, x):
        return self.holds(x)


def test_a_part_deep_inside_that_cannot_be_traced():
    plan = lean_fx.plan(Deep(), torch.randn(4, 5, 6), channels=8)
    layers = [layer for site in plan.sites for layer in site.layers]
    assert layers == ["holds.second", "holds.loop.cell", "holds.loop.head"]


def test_the_result_is_an_ordinary_module():
    x = torch.randn(4, 5, 6)
    lean = untraced(Loop(), x)
    for other in (copy.deepcopy(lean), pickle.loads(pickle.dumps(lean))):
        torch.testing.assert_close(other(x), lean(x), rtol=0, atol=0)
        assert other.meta["lean_fx.plan"] == lean.meta["lean_fx.plan"]
    plan = lean.meta["lean_fx.plan"]
    again = lean_fx.Plan.from_json(plan.to_json()).apply(Loop())
    again.load_state_dict(lean.state_dict())
    torch.testing.assert_close(again(x), lean(x), rtol=0, atol=0)
    lean(x).sum().backward()
    assert all(parameter.grad is not None for parameter in lean.parameters())


def test_it_exports(tmp_path):
    x = torch.randn(4, 5, 6)
    lean_fx.export_onnx(untraced(Loop(), x), tmp_path / "net.onnx", x)
    assert lean_fx.plan_of(tmp_path / "net.onnx").form == "module"


def test_the_plan_of_a_model_that_cannot_be_traced():
    with pytest.warns(LeanWarning, match=UNTRACED):
        plan = lean_fx.plan(Loop(), torch.randn(4, 5, 6))
    assert_expected_inline(
        str(plan),
        """\
Plan for Loop: 2 reductions (lean) before 2 of 3 layers
their weights: 2,376 -> 300, of 4,475 parameters in all
value      sign  MACs  layer  type     channels  weights       note
its input  any   192   cell   GRUCell  32 -> 4   2,304 -> 288  5.66 wanted, 4 is the nearest divisor
its input  any   144   head   Linear   24 -> 4   72 -> 12
left alone
embed  Linear  in_channels=6 is below min_channels=16""",
    )


def test_without_example_inputs_it_is_an_error():
    with pytest.raises(CaptureError, match="else each layer reduces its own input$"):
        lean_fx.leanify(Loop())
    with pytest.raises(
        ArgumentError,
        match="^keep='saving' needs a graph, keep='all' does not; Loop: torch.fx cannot",
    ):
        lean_fx.leanify(Loop(), torch.randn(4, 5, 6), keep="saving")
    with pytest.raises(ArgumentError, match="^example_inputs: Loop cannot run on them"):
        lean_fx.leanify(Loop(), torch.randn(4, 5, 7))


class Odd(nn.Module):
    """Layers that a model uses otherwise than by calling them, and one in attention."""

    def __init__(self):
        super().__init__()
        self.inputs = nn.Linear(32, 32)
        self.plain = nn.Linear(32, 32)
        self.read = nn.Linear(32, 32)
        self.both = nn.Linear(32, 32)
        self.unused = nn.Linear(32, 32)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.hooked = nn.MultiheadAttention(32, 2, batch_first=True)
        self.hooked.register_forward_hook(lambda *_: None)
        self.conv = nn.Conv1d(32, 8, 1)

    def forward(self, x):
        if float(x.sum()) < 0:
            return x
        x = self.plain(self.inputs(x[:, :3]))
        x = F.linear(x, self.read.weight)
        x = self.both(x) + F.linear(x, self.both.weight)
        x = self.hooked(*[self.attention(x, x, x)[0]] * 3)[0]
        return self.conv(x.transpose(1, 2)) + self.conv(x[0].T)  # with and without a batch


def test_what_is_left_alone_and_why():
    lean = untraced(Odd(), torch.rand(2, 4, 32))
    plan = lean.meta["lean_fx.plan"]
    assert [(site.layers, site.dim) for site in plan.sites] == [
        (("plain",), -1),
        (("read",), -1),
        (("attention.in_proj",), -1),
        (("attention.out_proj",), -1),
        (("conv",), -2),
    ]
    reasons = {each.layer: each.reason.text for each in plan.left_alone}
    assert reasons.pop("both").startswith("the model fails where it reduces its input: RuntimeErr")
    assert reasons == {
        "inputs": "reads the model's input, no intermediate value; reduce_inputs=True reduces it "
        "too",
        "unused": "not called in forward on the example inputs",
        "hooked": "it has hooks, which a rebuilt layer would lose",
        "hooked.out_proj": "inside MultiheadAttention, which reads its weights itself",
    }


def test_the_few_layers_that_fail_are_found_in_a_few_runs(monkeypatch):
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(33))

        def forward(self, x):
            if float(x.sum()) < 0:
                return x
            for place, layer in enumerate(self.layers):
                x = layer(x)
                if place == 20:
                    x = x + F.linear(x, layer.weight)
            return x

    runs = []
    failure = observed._failure
    monkeypatch.setattr(observed, "_failure", lambda *args: runs.append(1) or failure(*args))
    plan = untraced(Deep(), torch.rand(2, 32)).meta["lean_fx.plan"]
    failing = [each.layer for each in plan.left_alone if each.reason.code == "fails_reduced"]
    assert failing == ["layers.20"]
    assert len(plan.sites) == 31
    assert len(runs) <= 2 * 6 + 1  # a pair for each halving of 32


class Sequences(nn.Module):
    """A stack and attention of two values that branch on numbers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 32)
        self.rnn, self.first = (nn.GRU(32, 32, depth, batch_first=True) for depth in (3, 2))
        self.cross = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x):
        if not x.isfinite().all():
            return x
        x = self.stem(x)
        x = self.rnn(x)[0] + self.first(x)[0]
        return self.cross(x, x[:, :2], x[:, :2])[0]


def test_stacks_and_attention_are_split():
    x = torch.rand(2, 5, 4)
    with pytest.warns(lean_fx.LeanWarning):
        plan = lean_fx.plan(Sequences(), x, channels=8, skip=["first.1", "cross.out_proj"])
    layers = [layer for site in plan.sites for layer in site.layers]
    assert layers == ["rnn.0", "rnn.1", "rnn.2", "first", *(f"cross.{n}_proj" for n in "qkv")]
    assert plan.split_layers == ("rnn", "cross")
    lean = lean_fx.Plan.from_json(plan.to_json()).apply(Sequences(), x)
    assert lean(x).shape == (2, 5, 32)
    assert lean.rnn.get_submodule("2").input_size == lean.cross.k_proj.in_features == 8


def test_a_layer_that_is_called_again():
    model, x = Again(), torch.randn(2, 3, 5, 5)
    lean = lean_fx.leanify(model, x, channels=8)
    assert_expected_inline(
        str(lean.meta["lean_fx.plan"]),
        """\
Plan for Again: 1 reduction (lean) before 1 of 2 layers
their weights: 9,216 -> 2,304, of 9,376 parameters in all
value      sign  MACs  layer  type    channels  weights         note
its input  >= 0  128   again  Conv2d  32 -> 8   9,216 -> 2,304  called 3 times
left alone
first  Conv2d  in_channels=3 is below min_channels=16""",
    )
    layer = lean.again

    def call(value):
        reduced = lean_fx.lean_reduction(value, layer.reduction.seed)
        return F.conv2d(reduced, layer.weight, layer.bias, padding=1)

    value = F.relu(call(F.relu(lean.first(x))))
    torch.testing.assert_close(lean(x), call(call(value).abs()))
    plan = lean.meta["lean_fx.plan"]
    again = lean_fx.Plan.from_json(plan.to_json()).apply(Again())
    again.load_state_dict(lean.state_dict())
    torch.testing.assert_close(again(x), lean(x), rtol=0, atol=0)
    with lean_fx.checking_signs():
        lean(x)


class Signed(Again):
    def forward(self, x):
        x = self.first(x)
        return self.again(self.again(x).abs())


def test_the_sign_is_that_of_all_that_the_layer_reads():
    for model in (Again(), Signed()):
        lean = lean_fx.leanify(model)
        assert lean.again.reduction.nonnegative is (type(model) is Again)
    plan = lean_fx.plan(Again())  # proved of one model, applied to another
    assert not plan.apply(Signed()).again.reduction.nonnegative


def test_a_second_leanify_leaves_swapped_layers_alone():
    lean = lean_fx.leanify(Again())
    plan = lean_fx.plan(lean)
    assert plan.sites == ()
    assert "it reads a reduction already" in str(plan)


def test_a_plan_that_does_not_fit():
    plan = lean_fx.plan(Again())
    other = Again()
    other.again = nn.Conv2d(32, 32, 3, padding=1, groups=2)
    other.first = nn.Conv2d(3, 16, 1)
    other.again = nn.Conv2d(16, 16, 1)
    with pytest.raises(PlanError) as caught:
        plan.apply(other)
    assert str(caught.value) == (
        "plan: layer 'again' reads 16 channels, but the plan says 32; make the plan anew from this "
        "model"
    )


class GroupedTwice(nn.Module):
    """A grouped convolution called twice, in a forward that may not be traced."""

    def __init__(self, traced):
        super().__init__()
        self.traced = traced
        self.first = nn.Conv2d(3, 64, 1)
        self.again = nn.Conv2d(64, 64, 3, padding=1, groups=4)

    def forward(self, x):
        if not self.traced and x.sum() > 1e9:
            return x
        return self.again(self.again(self.first(x).relu()).relu())


@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
@pytest.mark.parametrize("traced", [True, False])
def test_a_swapped_layer_reduces_each_of_its_groups(traced):
    model, inputs = GroupedTwice(traced).eval(), torch.rand(2, 3, 8, 8)
    lean = lean_fx.leanify(model, inputs)
    (site,) = lean.meta["lean_fx.plan"].sites
    assert (site.in_channels, site.out_channels, site.groups) == (16, 4, 4)
    again = lean.again
    assert again.weight.shape == (64, 4, 3, 3)
    x = torch.rand(2, 64, 5, 5)
    literal = torch.cat([again.reduction(part[:, None])[:, 0] for part in x.split(16, 1)], 1)
    convolved = F.conv2d(literal, again.weight, again.bias, padding=1, groups=4)
    torch.testing.assert_close(again(x), convolved)
    assert lean(inputs).shape == (2, 64, 8, 8)
    assert again.weight.std() > 2 * model.again.weight.std()  # scaled to what it reads
