"""form="module": attention and recurrent stacks become modules that call their layers."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lean_fx
from graphs import both_forms
from lean_fx.capture.capturing import capture
from lean_fx.errors import ArgumentError
from lean_fx.layers.attention import SplitAttention
from lean_fx.passes import SplitLayers

X = torch.rand(2, 6, 5)


class Mixed(nn.Module):
    """A parameter of no layer, attention of both kinds, and a stack."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.stem, self.table = nn.Linear(5, 32), nn.Parameter(torch.randn(32, 32))
        self.itself = nn.MultiheadAttention(32, 4, dropout, batch_first=True)
        self.cross = nn.MultiheadAttention(32, 4, batch_first=True, kdim=24, vdim=24)
        self.narrow = nn.Linear(32, 24)
        self.rnn, self.head = nn.LSTM(32, 32, 3, True, True, dropout, True), nn.Linear(64, 2)

    def forward(self, x):
        x = self.stem(x) @ self.table
        x, weights = self.itself(x, x, x, average_attn_weights=False)
        y = self.narrow(x)
        x = self.cross(x, y, y, need_weights=False)[0]
        self.rnn.flatten_parameters()
        x, (h, c) = self.rnn(x)
        return self.head(x), h, c, weights


def test_attention_and_stacks_get_modules_that_call_their_layers():
    plan = lean_fx.plan(Mixed(), X, form="module")
    assert plan.split_layers == ("itself", "cross", "rnn")
    assert [site.layers for site in plan.sites] == [
        ("itself.in_proj",),
        ("itself.out_proj",),
        ("narrow", "cross.q_proj"),
        ("cross.k_proj", "cross.v_proj"),
        ("cross.out_proj",),
        ("rnn.0",),
        ("rnn.1",),
        ("rnn.2",),
        ("head",),
    ]
    reasons = {each.layer: str(each.reason) for each in plan.left_alone}
    assert reasons == {
        "stem": "in_channels=5 is below min_channels=16",
        "table": "only form='graph' changes the forward that applies it",
    }
    model = Mixed().double()
    one, other = both_forms(plan, model, X.double())
    for found, wanted in zip(one(X.double()), other(X.double()), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    assert (one.rnn.hidden_size, one.rnn.batch_first, one.itself.embed_dim) == (32, True, 32)
    assert one.cross.k_proj.reduction is one.cross.v_proj.reduction


def test_modules_of_split_layers_are_copied_saved_exported_and_trained(tmp_path):
    lean = lean_fx.leanify(Mixed(dropout=0.1), X, form="module")
    sum(each.sum() for each in lean(X)).backward()
    assert all(each.grad is not None for each in lean.parameters())
    lean.eval()
    lean_fx.save(lean, tmp_path / "lean.safetensors")
    lean_fx.export_onnx(lean, tmp_path / "lean.onnx", X)
    for made in (
        copy.deepcopy(lean),
        pickle.loads(pickle.dumps(lean)),
        lean_fx.load(tmp_path / "lean.safetensors", Mixed(dropout=0.1), X).eval(),
    ):
        for found, wanted in zip(made(X), lean(X), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_model_with_attention_and_without_values_is_refused():
    with pytest.raises(ArgumentError, match="has no values"):
        lean_fx.plan(Mixed().to("meta"), X, form="module")


def test_a_model_whose_attention_is_split_is_not_reduced_again():
    lean = lean_fx.leanify(Mixed(), X, form="module")
    with pytest.warns(lean_fx.LeanWarning):
        again = lean_fx.leanify(lean, X, form="module").eval()
    for found, wanted in zip(again(X), lean.eval()(X), strict=True):
        torch.testing.assert_close(found, wanted)


def test_split_attention_takes_other_values_than_it_was_planned_for():
    layer, (q, k, v) = nn.MultiheadAttention(8, 2).double(), torch.rand(3, 5, 2, 8).double()
    split = SplitAttention(layer, self_attention=True)
    torch.testing.assert_close(split(q, k, v), layer(q, k, v), rtol=1e-12, atol=1e-14)


def reads_a_weight(rnn, attention, x):
    return x * rnn.bias_hh_l1.shape[0]


def reads_a_bias(rnn, attention, x):
    return x * len(attention.in_proj_bias)


def asks_for_its_class(rnn, attention, x):
    return x * (2 if isinstance(rnn, nn.GRU) else 1)


def asks_for_an_attribute(rnn, attention, x):
    return x * (2 if hasattr(attention, "out_proj_weight") else 1) * rnn.hidden_size


ATTENTION = ["attention.in_proj", "attention.out_proj"]


def looking(code, branches):
    """A model whose code does more with its layers than call them, and may branch on numbers."""

    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.rnn = nn.Linear(5, 32), nn.GRU(32, 32, 2, batch_first=True)
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x):
            if branches and not x.isfinite().all():
                return x
            x = self.rnn(self.stem(x))[0]
            x = self.attention(x, x, x, need_weights=False)[0]
            return code(self.rnn, self.attention, x)

    return Looks()


LOOKS = pytest.mark.parametrize(
    ("code", "layers", "reason"),
    [
        (reads_a_weight, ["rnn", *ATTENTION], "it fails with AttributeError"),
        (reads_a_bias, ["rnn.0", "rnn.1"], "it fails with TypeError"),
        (asks_for_its_class, ["rnn", *ATTENTION], "its outputs differ"),
        (asks_for_an_attribute, ["rnn.0", "rnn.1", *ATTENTION], ""),
    ],
)


@LOOKS
@pytest.mark.parametrize("branches", [False, True])
def test_what_code_looks_into_stays_whole(code, layers, reason, branches):
    model = looking(code, branches)
    plan = lean_fx.plan(model, X, form="module")
    assert plan.traced != branches
    assert [layer for site in plan.sites for layer in site.layers] == layers
    left = {each.layer: str(each.reason) for each in plan.left_alone}
    assert ("rnn.1" in left, "attention" in left) == ("rnn" in layers, ATTENTION[0] not in layers)
    for told in left.keys() & {"rnn.1", "attention"}:
        text = f"the model is not the same with it split: {reason}"
        if code is reads_a_bias and not branches:  # the graph shows it
            text = "its parameter is used elsewhere: attention.in_proj_bias, read by attention_in"
        assert left[told].startswith(text)
    assert plan.apply(model, X)(X).shape == (2, 6, 32)


@LOOKS
@pytest.mark.parametrize("form", ["graph", "module"])
def test_layers_inside_of_what_is_not_traced_are_split_too(code, layers, reason, form):
    model = nn.Sequential(nn.Linear(5, 5), looking(code, True), nn.Linear(32, 4)).eval()
    plan = lean_fx.plan(model, X, form=form)
    assert plan.traced
    reduced = [layer for site in plan.sites for layer in site.layers]
    assert reduced == ["2", *(f"1.{layer}" for layer in layers)]
    left = {each.layer: str(each.reason) for each in plan.left_alone}
    told = left.keys() & {"1.rnn.1", "1.attention"}
    assert all(reason in left[each] for each in told)
    assert bool(told) == bool(reason)
    lean = lean_fx.Plan.from_json(plan.to_json()).apply(model, X)
    assert lean(X).shape == (2, 6, 4)


def test_splitting_inside_of_what_is_not_traced_keeps_the_numbers():
    model = nn.Sequential(nn.Linear(5, 5), looking(asks_for_an_attribute, True)).double().eval()
    x, captured = X.double(), capture(model, (X.double(),))
    split = SplitLayers(["1.rnn", "1.attention"], ["1.attention.in_proj"])
    assert split(captured).modified
    torch.testing.assert_close(captured(x), model(x), rtol=1e-12, atol=1e-14)
    assert not split(captured).modified
    assert type(captured.get_submodule("1.attention")) is SplitAttention
