"""Models that are not plain models: refused by name, or handled; and never touched."""

import contextlib
import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import lean_fx
from graphs import reasons
from lean_fx.errors import ArgumentError, CaptureError
from odd_models import (
    CHANGES,
    PICTURES,
    Net,
    Recurrent,
    X,
    dynamic,
    form,
    mlp,
    nested,
    on_meta,
    prepared,
    values,
    with_weight,
)

pytestmark = pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning", "ignore::FutureWarning")


WRAPPED = {
    "RecursiveScriptModule object is of TorchScript; give the model that it was made from": (
        torch.jit.script
    ),
    "OptimizedModule object is compiled; give the model itself, its _orig_mod": (
        lambda model: torch.compile(model, backend="eager")
    ),
    "DataParallel object is a wrapper; give the model itself, its module": nn.DataParallel,
}


@pytest.mark.parametrize("text", WRAPPED)
@pytest.mark.parametrize("inputs", [X, None], ids=["inputs", "none"])
def test_what_wraps_a_model_is_refused_by_name(text, inputs):
    with pytest.raises(ArgumentError, match=f"^model={text}$"):
        lean_fx.leanify(WRAPPED[text](mlp()), inputs)


@pytest.mark.parametrize("inputs", [X, None], ids=["inputs", "none"])
def test_buffers_that_are_not_saved_stay_so(inputs):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.rand(4), persistent=False)
            self.register_buffer("shift", torch.rand(4))

        def forward(self, x):
            return x + self.table + self.shift if self.training else x - self.table

    class Outer(Positions):
        def __init__(self):
            super().__init__()
            self.inner, self.a, self.b = Positions(), nn.Linear(4, 32), nn.Linear(32, 4)

        def forward(self, x):
            return self.b(self.a(self.inner(x) * self.table + self.shift))

    for training in (True, False):
        model = Outer().train(training)
        lean = lean_fx.leanify(model, inputs, min_channels=64)
        assert lean.state_dict().keys() == model.state_dict().keys()
        copied = copy.deepcopy(lean).get_submodule("inner")
        assert copied.state_dict().keys() == model.inner.state_dict().keys()


@pytest.mark.parametrize("add", ["register_buffer", "register_parameter", "register_module"])
def test_what_a_layer_holds_besides_is_not_lost(add):
    held = {"register_module": nn.Linear(8, 8)}.get(add, nn.Parameter(torch.ones(8)))
    model = mlp()
    getattr(model[2], add)("mask", held)
    assert reasons(model, X)["2"] == "it holds mask, which a rebuilt layer would lose"


def test_a_computed_attribute_is_refused_by_name(tmp_path):
    model = mlp()
    whole = nn.Parameter(torch.rand(8 * 32))
    model.register_parameter("whole", whole)
    del model[2].weight
    model[2].weight = whole.view(8, 32)
    text = (
        "Sequential: cannot be copied: '2.weight' is computed from other tensors; make it a "
        "parameter or a buffer, or compute it in forward"
    )
    for inputs in (None, X):
        with warnings.catch_warnings(record=True) as warned, pytest.raises(CaptureError) as caught:
            lean_fx.plan(model, inputs)
        assert str(caught.value) == text
        assert warned == []
    with pytest.raises(ArgumentError, match="^compare: 'a': Sequential: cannot be copied: '2"):
        lean_fx.compare({"a": model}, X)


def try_all(model, inputs, folder, exports=True):
    """Call everything on a model; whatever becomes of it, the model stays as it is."""
    before, held = form(model), values(model)
    calls = [
        lambda: lean_fx.plan(model),
        lambda: lean_fx.plan(model, inputs).apply(model, inputs),
        lambda: lean_fx.leanify(model, inputs),
        lambda: lean_fx.costs_of(model, inputs),
    ]
    if exports:
        calls.append(lambda: lean_fx.export_onnx(model, folder / "a.onnx", inputs, tolerance=None))
    for call in calls:
        with contextlib.suppress(lean_fx.LeanError):
            call()
        assert form(model) == before
    for now, then in zip(values(model), held, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


def trained(model, inputs=X):
    model(inputs).sum().backward()
    return model


MODELS = {
    "a trained model": lambda: (trained(Net()), X),
    "in eval mode": lambda: (Net().eval(), X),
    "half in eval mode": lambda: (nn.Sequential(mlp().eval(), nn.Linear(8, 2)), X),
    "frozen": lambda: (mlp().requires_grad_(False), X),
    "lazy": lambda: (nn.Sequential(nn.Linear(4, 32), nn.LazyLinear(8)), X),
    "lazy buffers": lambda: (nn.Sequential(nn.Linear(4, 32), nn.LazyBatchNorm1d(affine=False)), X),
    "meta": lambda: (on_meta(mlp), X),
    "quantised": lambda: (dynamic(), X),
    "for quantisation": lambda: (prepared(True), PICTURES),
    "weight norm": lambda: (nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 32))), X),
    "a new norm": lambda: (nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 32))), X),
    "hooks": lambda: (trained(nested()), X),
    "recurrent": lambda: (Recurrent(), torch.rand(2, 5, 32)),
    "NaN": lambda: (with_weight(torch.full((8, 32), float("nan"))), X),
    **{name: (lambda change=change: (Net(change), X)) for name, (change, *_) in CHANGES.items()},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_never_touched(name, tmp_path):
    model, inputs = MODELS[name]()
    given = inputs.clone()
    try_all(model, inputs, tmp_path, exports=name not in CHANGES)  # which differ in one layer
    torch.testing.assert_close(inputs, given, rtol=0, atol=0)


@pytest.mark.parametrize("shape", ["graph", "module"])
def test_a_reduced_model_is_never_touched_either(shape, tmp_path):
    lean = lean_fx.leanify(Net(), X, form=shape)
    before, held = form(lean), values(lean)
    learns = [(each.requires_grad, each.data_ptr()) for each in lean.parameters()]
    for call in (
        lambda: lean_fx.draw(lean, tmp_path / "net.svg", X),
        lambda: lean_fx.costs_of(lean, X),
        lambda: lean_fx.sensitivity(lean, X),
        lambda: lean_fx.compare({"lean": lean}, X, batches=(1,), rounds=2),
        lambda: lean_fx.export_onnx(lean, tmp_path / "net.onnx", X),
        lambda: lean_fx.save(lean, tmp_path / "net.safetensors"),
        lambda: lean_fx.plan(lean, X),
    ):
        call()
        assert form(lean) == before
        assert [(each.requires_grad, each.data_ptr()) for each in lean.parameters()] == learns
    for now, then in zip(values(lean), held, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)


@pytest.mark.parametrize("ask", [lean_fx.plan, lean_fx.leanify])
@pytest.mark.parametrize("named", [False, True])
def test_an_input_without_values(ask, named):
    given = X.to("meta")
    with pytest.raises(ArgumentError) as caught:
        ask(mlp(), {"input": given} if named else given)
    assert str(caught.value) == (
        "example_inputs: 'input' is on the meta device and has no values, and the model has some "
        "on cpu; give the input there"
    )


@pytest.mark.parametrize("model", [3, nn.Linear])
@pytest.mark.parametrize("inputs", [None, X])
def test_what_is_no_model(model, inputs):
    with pytest.raises(ArgumentError, match="^model=.* is not a torch.nn.Module; give the model"):
        lean_fx.plan(model, inputs)
