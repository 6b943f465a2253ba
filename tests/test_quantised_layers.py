"""Layers whose weights are not floating-point parameters: left alone, with their reason."""

import warnings

import pytest
import torch
import torch.ao.quantization as quantization
from torch import nn

import lean_fx
from graphs import reasons
from lean_fx.errors import ExportError, PlanError
from odd_models import PICTURES, Recurrent, X, dynamic, mlp, prepared, with_weight

pytestmark = pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning", "ignore::FutureWarning")


def static():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.convert(prepared(False))


QUANTISED = "its weights are quantised; reduce the float model, then quantise that"


@pytest.mark.parametrize("given", [True, False])
def test_quantised_layers_are_left_alone_with_a_reason(given):
    assert reasons(dynamic(), X if given else None) == {"0": QUANTISED, "2": QUANTISED}
    assert reasons(static(), PICTURES if given else None) == {"1": QUANTISED, "3": QUANTISED}
    model = quantization.quantize_dynamic(Recurrent(), {nn.LSTM})
    x = torch.rand(2, 5, 32)
    assert reasons(model, x if given else None)["lstm"] == QUANTISED
    lean = lean_fx.leanify(model, x if given else None)
    assert lean.b.in_features == 4
    assert lean(x).shape == (2, 5, 8)


def test_layers_in_training_for_quantisation_are_left_alone():
    found = reasons(prepared(True), PICTURES)
    assert set(found.values()) == {"it has hooks, which a rebuilt layer would lose"}


@pytest.mark.parametrize(
    ("make", "inputs", "layer"),
    [
        (dynamic, X, "layer '0' (torch.ao.nn.quantized.dynamic.modules.linear.Linear)"),
        (static, PICTURES, "layer '0' (torch.ao.nn.quantized.modules.Quantize)"),
        (lambda: prepared(False), PICTURES, "layer '0.activation_post_process' ("),
        (lambda: prepared(True), PICTURES, "layer '0.activation_post_process' ("),
    ],
)
def test_quantised_layers_are_not_exported(make, inputs, layer, tmp_path, capfd):
    with pytest.raises(ExportError) as caught:
        lean_fx.export_onnx(make(), tmp_path / "a.onnx", inputs)
    assert str(caught.value).startswith(f"export_onnx: {layer}")
    assert str(caught.value).endswith(
        " is of torch.ao.quantization, which has no ONNX form; export the float model, with "
        "quantize='dynamic' or 'static' for an INT8 file"
    )
    assert capfd.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_quantised_layers_have_no_formula():
    model = quantization.quantize_dynamic(Recurrent(), {nn.LSTM, nn.Linear})
    assert lean_fx.costs_of(model, torch.rand(2, 5, 32)).without_formula == ("a", "lstm", "b")


def test_a_reduced_graph_is_quantised_and_a_reduced_module_says_that_it_is_not():
    graph, module = (lean_fx.leanify(mlp().eval(), X, form=form) for form in ("graph", "module"))
    quantised = quantization.quantize_dynamic(graph, {nn.Linear})
    torch.testing.assert_close(quantised(X), graph(X), rtol=0.1, atol=0.1)
    with pytest.raises(PlanError, match="^Linear: it took the place of a layer that reduces its "):
        quantization.quantize_dynamic(module, {nn.Linear})(X)


class Scaled(nn.Parameter):
    """A parameter of a subclass."""


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (with_weight(torch.ones(8, 32, dtype=torch.int8)), "its weight is torch.int8, which is "),
        (with_weight(torch.ones(8, 32), parameter=False), "its weight is not a parameter"),
        (with_weight(Scaled(torch.ones(8, 32))), "its weight is a Scaled, which a "),
        (mlp().to(torch.complex64), "its weight is torch.complex64, which is not floating-point"),
    ],
)
def test_weights_that_cannot_be_made_anew(model, reason):
    assert reasons(model)["2"].startswith(reason)
    assert len(list(lean_fx.leanify(model).parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types(dtype):
    lean = lean_fx.leanify(mlp().to(dtype), X.to(dtype))
    assert lean(X.to(dtype)).dtype is dtype
    assert lean.get_submodule("2").in_features == 4
