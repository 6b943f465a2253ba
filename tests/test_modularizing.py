"""Layers that a forward writes out, and parameters that it multiplies by, become modules."""

from dataclasses import replace

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.fx import GraphModule
from torch.nn import functional as F

import lean_fx
from graphs import CHANGED, Weights, WrittenOut, graph_text
from lean_fx.capture.capturing import capture
from lean_fx.capture.tracing import LeanTracer
from lean_fx.errors import PlanError
from lean_fx.passes import ModularizeWeights
from lean_fx.passes.modularize_weights import weights_of_products


def test_functional_dropout_follows_the_mode():
    make, shape = CHANGED["functional dropout"]
    assert_expected_inline(
        graph_text(capture(make())),
        """\
x = x()
inner = inner(x)  # Linear(in_features=8, out_features=32, bias=True)
relu = relu(inner, inplace=False)
calls_dropout = calls.dropout(relu)  # Dropout(p=0.25, inplace=False)
dropout_1 = dropout(calls_dropout, p=1e-09, training=True, inplace=False)
outer = outer(dropout_1)  # Linear(in_features=32, out_features=4, bias=True)
output = output(outer)
""",
    )
    inputs = torch.rand(shape)
    for captured in (capture(make().train()), capture(make().eval())):
        captured.eval()
        torch.testing.assert_close(captured(inputs), captured(inputs))
        captured.train()
        assert not torch.equal(captured(inputs), captured(inputs))


def test_layers_that_are_written_out_are_called():
    model, inputs = WrittenOut().eval(), torch.rand(2, 3, 8)
    captured = capture(model)
    assert_expected_inline(
        graph_text(captured),
        """\
x = x()
stem = stem(x)  # Conv1d(3, 32, kernel_size=(1,), stride=(1,))
relu = relu(stem, inplace=False)
k_bias = k_bias()
conv = conv(relu)  # Conv1d(32, 32, kernel_size=(3,), stride=(1,), padding=(1,), bias=False)
conv_bias = reshape(k_bias, (-1, 1))
conv_biased = add(conv, conv_bias)
q_bias = q_bias()
cat = cat((q_bias, k_bias))
getattr_1 = getattr(conv_biased, mT)
qkv = qkv(getattr_1)  # Linear(in_features=32, out_features=48, bias=False)
qkv_biased = add(qkv, cat)
relu_1 = relu(qkv_biased, inplace=False)
proj = proj(relu_1)  # Linear(in_features=48, out_features=32, bias=True)
output = output(proj)
""",
    )
    torch.testing.assert_close(captured(inputs), model(inputs))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: F.linear(F.linear(x, self.b.weight), self.b.weight),
        lambda self, x: F.linear(self.b(x), self.b.weight),
        lambda self, x: F.linear(x, self.a.weight, self.a.bias) + self.a.weight.sum(),
        lambda self, x: F.conv1d(x, self.c.weight, self.c.bias, stride=2),
        lambda self, x: F.conv2d(x[None], self.c.weight[..., None], self.c.bias),
    ],
)
def test_calls_that_are_not_a_layers_stay(forward):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
            self.c = nn.Conv1d(8, 8, 1)

    Net.forward = forward
    model = Net()
    assert graph_text(capture(model)) == graph_text(GraphModule(model, LeanTracer().trace(model)))


def test_a_layer_that_is_called_without_its_bias():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

        def forward(self, x):
            x = F.linear(x, self.a[0].weight, self.a[0].bias * 2)
            return F.linear(x, self.a[1].weight)

    model, inputs = Net(), torch.rand(2, 8)
    captured = capture(model)
    assert_expected_inline(
        graph_text(captured),
        """\
x = x()
a_0_bias = a.0_bias()
mul = mul(a_0_bias, 2)
a_0 = a.0(x)  # Linear(in_features=8, out_features=8, bias=False)
a_0_biased = add(a_0, mul)
a_1 = a.1(a_0_biased)  # Linear(in_features=8, out_features=8, bias=False)
output = output(a_1)
""",
    )
    torch.testing.assert_close(captured(inputs), model(inputs))
    assert model.a[0].bias is not None


def test_parameters_that_multiply_become_layers():
    model, inputs = Weights().double(), torch.rand(2, 3, 8, 8).double()
    captured = capture(model)
    ModularizeWeights(weights_of_products(captured))(captured)
    assert_expected_inline(
        graph_text(captured),
        """\
x = x()
stem = stem(x)  # Conv2d(3, 16, kernel_size=(1, 1), stride=(1, 1))
relu = relu(stem, inplace=False)
inner_shift = inner.shift()
inner_kernel_call = inner.kernel(relu)  # Conv2d(16, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=2, bias=False)
inner_kernel_call_bias = reshape(inner_shift, (-1, 1, 1))
inner_kernel_call_biased = add(inner_kernel_call, inner_kernel_call_bias)
relu_1 = relu(inner_kernel_call_biased, inplace=False)
mean = mean(relu_1, (2, 3))
product_call = product(mean)  # Linear(in_features=16, out_features=32, bias=False)
relu_2 = relu(product_call, inplace=False)
transposed_call = transposed(relu_2)  # Linear(in_features=32, out_features=16, bias=False)
getitem = getitem(inner_shift, slice(None, 1, None))
added_call = added(transposed_call)  # Linear(in_features=16, out_features=24, bias=False)
added_call_biased = add(added_call, getitem)
linear_call = linear(added_call_biased)  # Linear(in_features=24, out_features=5, bias=False)
output = output(linear_call)
""",
    )
    torch.testing.assert_close(captured(inputs), model(inputs))
    assert {id(each.weight) for each in (captured.inner.kernel, captured.linear)} <= {
        id(parameter) for parameter in captured.parameters()
    }
    numels = [sum(map(torch.numel, each.parameters())) for each in (captured, model)]
    assert numels[0] == numels[1]
    lean = lean_fx.leanify(model, inputs, min_channels=8)
    layers = [site.layers[0] for site in lean.meta["lean_fx.plan"].sites]
    assert layers == ["inner.kernel", "product", "transposed", "added", "linear"]
    plan = lean_fx.plan(model, inputs, skip=["product"])
    assert plan.weights == ("transposed", "added", "linear")
    left = {each.layer: each.reason.text for each in plan.left_alone}
    assert left["product"] == "skip='product'"
    assert left["inner.kernel"] == "in_channels=8 of each of 2 groups is below min_channels=16"
    again = lean_fx.Plan.from_json(plan.to_json())
    assert again == plan
    assert isinstance(again.apply(model).product, nn.Parameter)
    with pytest.raises(
        PlanError, match="'product' is not a parameter that multiplies one value only"
    ):
        replace(plan, weights=("product",)).apply(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x @ self.shared + x @ self.shared,
        lambda self, x: x @ self.shared.t() + self.shared.sum(),
        lambda self, x: x @ self.tied @ self.other,
        lambda self, x: self.shared @ x,
        lambda self, x: x @ (self.shared * 2),
        lambda self, x: x @ self.many,
        lambda self, x: x @ self.buffer,
        lambda self, x: torch.addmm(x, x, self.shared, beta=2),
        lambda self, x: x @ self.shared.permute(0, 1),
        lambda self, x: x + self.shared @ self.tied,
    ],
)
def test_parameters_that_are_no_layers_weight_stay(forward):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Parameter(torch.randn(8, 8))
            self.tied = self.other = nn.Parameter(torch.randn(8, 8))
            self.many = nn.Parameter(torch.randn(3, 8, 8))
            self.register_buffer("buffer", torch.randn(8, 8))

    Net.forward = forward
    model = Net()
    assert not weights_of_products(capture(model))


class ListedWeights(nn.Module):
    """Weights in a list, whose names end with numbers."""

    def __init__(self):
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.randn(32, 32)) for _ in range(3)])
        self.last = nn.Linear(32, 4)

    def forward(self, x):
        for weight in self.w:
            x = torch.relu(x @ weight)
        return self.last(x)


@pytest.mark.parametrize("inputs", [None, torch.rand(2, 32)])
def test_names_do_not_depend_on_which_parameters_become_layers(inputs):
    """The plan is made with all of them as layers, and applied with those that are reduced."""
    lean = lean_fx.leanify(ListedWeights(), inputs)
    made = lean_fx.plan_of(lean)
    assert made.weights == ("w.1", "w.2")
    assert [site.layers for site in made.sites] == [("w.1",), ("w.2",), ("last",)]
    assert lean(torch.rand(5, 32)).shape == (5, 4)


def test_a_module_named_like_a_product_is_none():
    class Compared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.matmul = nn.Linear(8, 32), nn.CosineSimilarity()
            self.weight = nn.Parameter(torch.randn(32, 32))

        def forward(self, x):
            return self.matmul(self.first(x), self.weight)

    model, x = Compared(), torch.rand(32, 8)
    assert not weights_of_products(capture(model, (x,)))
    assert not lean_fx.plan(model, x).weights
