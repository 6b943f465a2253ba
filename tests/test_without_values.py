"""Models that have no values yet: lazy layers, and the meta device."""

import pytest
import torch
from torch import nn

import lean_fx
from lean_fx.errors import ArgumentError
from odd_models import PICTURES, Recurrent, X, form, layers, mlp, on_meta

pytestmark = pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning", "ignore::FutureWarning")


LAZY = {
    "layer '2' (LazyLinear)": lambda: (
        nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.LazyLinear(8)),
        X,
    ),
    "layer '1.1' (LazyConv2d)": lambda: (
        nn.Sequential(nn.Conv2d(3, 32, 3), nn.Sequential(nn.ReLU(), nn.LazyConv2d(8, 3))),
        PICTURES,
    ),
    "layer '1' (LazyBatchNorm2d)": lambda: (
        nn.Sequential(nn.Conv2d(3, 32, 3), nn.LazyBatchNorm2d(affine=False)),
        PICTURES,
    ),
    "LazyLinear": lambda: (nn.LazyLinear(8), X),
}


@pytest.mark.parametrize("name", LAZY)
def test_lazy_layers_are_refused_by_name(name, tmp_path):
    model, inputs = LAZY[name]()
    before = form(model)
    text = f"{name} has no shape yet; call the model once on a batch first"
    calls = {
        "model": lambda: lean_fx.plan(model, inputs),
        "export_onnx": lambda: lean_fx.export_onnx(model, tmp_path / "a.onnx", inputs),
        "compare: 'a'": lambda: lean_fx.compare({"a": model}, inputs),
    }
    for subject, call in calls.items():
        with pytest.raises(ArgumentError) as caught:
            call()
        assert str(caught.value) == f"{subject}: {text}"
    with pytest.raises(ArgumentError, match="has no shape yet"):
        lean_fx.costs_of(model, inputs)
    assert form(model) == before
    assert list(tmp_path.iterdir()) == []


def test_lazy_layers_that_know_their_shape_are_reduced():
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.LazyBatchNorm2d(), nn.LazyConv2d(8, 3))
    model(PICTURES)
    assert layers(model, PICTURES) == ["2"]


@pytest.mark.parametrize("inputs", [None, X, X.to("meta")], ids=["none", "cpu", "meta"])
def test_models_on_the_meta_device_are_planned_and_reduced(inputs):
    model = on_meta(mlp)
    assert lean_fx.plan(model, inputs).sites[0].consumers == lean_fx.plan(mlp()).sites[0].consumers
    lean = lean_fx.leanify(model, inputs)
    assert all(parameter.is_meta for parameter in lean.parameters())
    lean.to_empty(device="cpu").load_state_dict(lean_fx.leanify(mlp(), X).state_dict())
    assert lean(X).isfinite().all()


def test_branches_are_followed_on_the_meta_device():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 32), nn.Linear(32, 8)

        def forward(self, x):
            x = self.a(x)
            return self.b(x) if x.shape[0] > 1 else x

    model = on_meta(Branching)
    assert layers(model, X) == layers(model, X.to("meta")) == ["b"]


def test_a_part_on_the_meta_device():
    model = mlp()
    model[2].to("meta")
    for inputs in (None, X, X.to("meta")):
        lean = lean_fx.leanify(model, inputs)
        assert [name for name, each in lean.named_parameters() if each.is_meta] == [
            *("2.weight", "2.bias", "reductions._1.seed")
        ]


META = "'0.weight' is on the meta device and has no values; give it some first, with to_empty() "


def test_what_needs_values_refuses_the_meta_device(tmp_path):
    model = on_meta(mlp)
    lean = lean_fx.leanify(model)
    for each in (model, lean):
        for inputs in (X, X.to("meta")):
            with pytest.raises(
                ArgumentError, match=rf"^export_onnx: {META}".replace("()", r"\(\)")
            ):
                lean_fx.export_onnx(each, tmp_path / "a.onnx", inputs)
            with pytest.raises(ArgumentError, match=f"^compare: 'a': {META[:60]}"):
                lean_fx.compare({"a": each}, inputs)
    with pytest.raises(ArgumentError, match="^compare: example_inputs are on the meta device"):
        lean_fx.compare({"a": mlp()}, X.to("meta"))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_traced_must_have_values():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 32), nn.Linear(32, 8)

        def forward(self, x):
            x = self.a(x)
            return self.b(x if x.sum() > 0 else -x)

    with pytest.raises(ArgumentError, match="^model: 'a.weight' is on the meta device and has no "):
        lean_fx.plan(on_meta(Untraceable), X)


@pytest.mark.parametrize("make", [mlp, Recurrent])
def test_costs_on_the_meta_device_are_those_on_the_cpu(make):
    x = X if make is mlp else torch.rand(2, 5, 32)
    costs = lean_fx.costs_of(make(), x)
    for model, inputs in (
        (on_meta(make), x),
        (on_meta(make), x.to("meta")),
        (make(), x.to("meta")),
    ):
        assert lean_fx.costs_of(model, inputs) == costs
