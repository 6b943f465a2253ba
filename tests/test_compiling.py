"""Reductions that torch.compile has made kernels of."""

import copy

import pytest
import torch
from torch import nn

import lean_fx
from lean_fx.reduction.compiling import compile_reductions


def net_and_inputs(depth):
    layers = [nn.Linear(8, 64), nn.ReLU()]
    for width in range(64, 64 - 4 * depth, -4):
        layers += [nn.Linear(width, width - 4), nn.ReLU()]
    return nn.Sequential(*layers), torch.rand(6, 8)


def outputs_and_gradients(model, inputs):
    out = model(inputs)
    return out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_more_reductions_than_torch_keeps_forms_of_one_code_equal_the_eager_ones(backend):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model, inputs = net_and_inputs(depth=10)
    lean = lean_fx.leanify(model, inputs)
    expected = outputs_and_gradients(lean, inputs)
    compiled = copy.deepcopy(lean)
    assert compile_reductions(compiled, backend=backend) is compiled
    found = outputs_and_gradients(compiled, inputs)
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other)
    assert torch._dynamo.utils.counters["frames"]["ok"] == 10
    more = torch.rand(3, 8)  # another batch
    torch.testing.assert_close(compiled(more), lean(more))


def test_a_copy_is_eager_and_an_export_the_same(tmp_path):
    model, inputs = net_and_inputs(depth=1)
    lean = compile_reductions(lean_fx.leanify(model, inputs), backend="aot_eager")
    assert [module._compiled_call_impl for module in copy.deepcopy(lean).modules()] == [None] * 7
    lean_fx.export_onnx(lean, tmp_path / "lean.onnx", inputs)


def test_without_a_reduction_there_is_nothing_to_compile():
    with pytest.raises(lean_fx.LeanError) as caught:
        compile_reductions(nn.Linear(8, 8))
    assert str(caught.value) == (
        "compile_reductions: model=Linear has no LeanReduction; give what leanify makes"
    )
    with pytest.raises(lean_fx.errors.ArgumentError) as caught:
        compile_reductions(3)
    assert str(caught.value) == "compile_reductions: model=int object is not a module"
