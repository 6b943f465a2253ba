"""The four laws of a pass, for every pass, and graphs as text."""

from dataclasses import replace

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.fx import GraphModule, symbolic_trace
from torch.nn import functional as F

import lean_fx
from graphs import (
    CHANGED,
    UNCHANGED,
    Flattened,
    Grouped,
    InPlace,
    Residual,
    SharedFlatten,
    Tokens,
    Weights,
    WrittenOut,
    graph_text,
)
from lean_fx.capture import capture
from lean_fx.errors import ArgumentError, PassError, PlanError
from lean_fx.passes import (
    FindConsumers,
    InferSign,
    InsertReductions,
    MeasureScale,
    ModularizeCalls,
    ModularizeWeights,
    Pass,
    Pipeline,
    PropagateShapes,
    SplitLayers,
    SwapLayers,
    TrackChannels,
    TrackWrites,
    facts,
)
from lean_fx.passes.modularize_weights import weights_of_products
from lean_fx.tracing import LeanTracer

MODELS = CHANGED | UNCHANGED


def passes_for(model, inputs):
    plan = lean_fx.plan(model, inputs)
    return {
        "SplitLayers": SplitLayers(plan.split),
        "TrackWrites": TrackWrites(),
        "InferSign": InferSign(),
        "MeasureScale": MeasureScale((inputs,)),
        "PropagateShapes": PropagateShapes((inputs,)),
        "TrackChannels": TrackChannels(),
        "FindConsumers": FindConsumers(),
        "ModularizeCalls": ModularizeCalls(),
        "ModularizeWeights": ModularizeWeights(plan.weights),
        "SwapLayers": SwapLayers(plan.sites),
        "InsertReductions": InsertReductions(plan.sites),
    }


def description(graph_module):
    """All of a module that a pass may change: its graph, and its modules with their sizes."""
    return graph_text(graph_module) + str(graph_module)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", passes_for(nn.Linear(1, 1), torch.rand(1, 1)))
def test_laws(name, model):
    make, shape = MODELS[model]
    inputs = torch.rand(shape)
    original = make()
    graph_module = capture(original)
    Pipeline([PropagateShapes((inputs,)), TrackChannels(), TrackWrites(), FindConsumers()])(
        graph_module
    )
    the_pass = passes_for(original, inputs)[name]
    if name == "InsertReductions":
        for earlier in ("ModularizeWeights", "SplitLayers"):
            passes_for(original, inputs)[earlier](graph_module)

    before = description(graph_module)
    result = the_pass(graph_module)
    after = description(result.graph_module)
    assert result.graph_module is graph_module
    assert result.modified == (before != after)  # laws 1 and 2
    graph_module(inputs)
    again = the_pass(graph_module)  # law 3
    assert not again.modified
    assert description(graph_module) == after
    if not result.modified:
        graph_module.eval()
        torch.testing.assert_close(graph_module(inputs), original.eval()(inputs))  # law 4


def test_the_laws_are_not_vacuous():
    for model, changed in [(m, True) for m in CHANGED] + [(m, False) for m in UNCHANGED]:
        make, shape = MODELS[model]
        assert bool(lean_fx.plan(make(), torch.rand(shape)).sites) == changed, model


@pytest.mark.parametrize("model", CHANGED)
def test_numbers(model):
    """Law 4 of InsertReductions: each layer reads the reduction of what it read before."""
    make, shape = CHANGED[model]
    original, inputs = make().eval(), torch.rand(shape)
    plan = lean_fx.plan(original, inputs)
    lean = plan.apply(original).eval()
    seen = {}
    sites = [site for site in plan.sites if site.value]
    for site in sites:
        module = lean.get_submodule(f"reductions.{site.name}")
        module.register_forward_hook(lambda m, a, out, s=site: seen.update({s.name: (a[0], out)}))
        for layer in site.layers:
            lean.get_submodule(layer).register_forward_pre_hook(
                lambda m, a, name=layer: seen.update({name: a[0]})
            )
    lean(inputs)
    for site in sites:
        given, reduced = seen[site.name]
        dim = site.reduced_dim
        assert given.shape[dim] == site.in_channels
        assert reduced.shape[dim] == site.out_channels
        seed = lean.get_submodule(f"reductions.{site.name}").seed
        expected = lean_fx.lean_reduction(given, seed, dim)
        torch.testing.assert_close(reduced, expected)
        for consumer in site.consumers:
            read = reduced.flatten(1) if consumer.path else reduced
            read = reduced.flatten(dim - 1, dim) if site.groups > 1 else read
            torch.testing.assert_close(seen[consumer.layer], read, rtol=0, atol=0)


def lean_text(model):
    lean = lean_fx.leanify(model)
    return graph_text(lean)


def test_shared_reduction_and_untouched_residual():
    assert_expected_inline(
        lean_text(Residual()),
        """\
x = x()
stem = stem(x)  # Conv2d(3, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
relu = relu(stem, inplace=False)
reductions_relu = reductions.relu(relu)  # LeanReduction(32, 4, dim=1, nonnegative)
left = left(reductions_relu)  # Conv2d(4, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
right = right(reductions_relu)  # Conv2d(4, 32, kernel_size=(1, 1), stride=(1, 1))
sigmoid = sigmoid(right)
mul = mul(left, sigmoid)
add = add(relu, mul)
mean = mean(add, (2, 3))
reductions_mean = reductions.mean(mean)  # LeanReduction(32, 4, dim=-1)
head = head(reductions_mean)  # Linear(in_features=4, out_features=5, bias=True)
output = output(head)
""",
    )


def test_reduction_before_flatten():
    assert_expected_inline(
        lean_text(Flattened()),
        """\
x = x()
conv = conv(x)  # Conv2d(1, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
relu = relu(conv, inplace=False)
pool = pool(relu)  # MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
reductions_pool = reductions.pool(pool)  # LeanReduction(16, 4, dim=1, nonnegative)
flatten = flatten(reductions_pool, 1)
drop = drop(flatten)  # Dropout(p=0.5, inplace=False)
head = head(drop)  # Linear(in_features=36, out_features=5, bias=True)
output = output(head)
""",
    )


def test_view_becomes_reshape_where_shapes_show_that_it_flattens():
    lean = lean_fx.leanify(Flattened("view with features"), torch.rand(2, 1, 6, 6))
    assert_expected_inline(
        graph_text(lean),
        """\
x = x()
conv = conv(x)  # Conv2d(1, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
relu = relu(conv, inplace=False)
pool = pool(relu)  # MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
reductions_pool = reductions.pool(pool)  # LeanReduction(16, 4, dim=1, nonnegative)
reshape = reshape(reductions_pool, (-1, 36))
drop = drop(reshape)  # Dropout(p=0.5, inplace=False)
head = head(drop)  # Linear(in_features=36, out_features=5, bias=True)
output = output(head)
""",
    )


def test_view_that_may_merge_rows_is_read_as_it_is():
    assert_expected_inline(
        lean_text(Flattened("view with features")),
        """\
x = x()
conv = conv(x)  # Conv2d(1, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
relu = relu(conv, inplace=False)
pool = pool(relu)  # MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
view = view(pool, -1, 144)
drop = drop(view)  # Dropout(p=0.5, inplace=False)
reductions_drop = reductions.drop(drop)  # LeanReduction(144, 12, dim=-1, nonnegative)
head = head(reductions_drop)  # Linear(in_features=12, out_features=5, bias=True)
output = output(head)
""",
    )


def test_sizes_of_a_replaced_view_go():
    assert_expected_inline(
        lean_text(Flattened("view of sizes")),
        """\
x = x()
conv = conv(x)  # Conv2d(1, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
relu = relu(conv, inplace=False)
pool = pool(relu)  # MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
size = size(pool, 0)
reductions_pool = reductions.pool(pool)  # LeanReduction(16, 4, dim=1, nonnegative)
reshape = reshape(reductions_pool, (size, -1))
drop = drop(reshape)  # Dropout(p=0.5, inplace=False)
head = head(drop)  # Linear(in_features=36, out_features=5, bias=True)
output = output(head)
""",
    )


def test_flatten_that_others_read_is_copied():
    assert_expected_inline(
        lean_text(SharedFlatten()),
        """\
x = x()
conv = conv(x)  # Conv2d(1, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
relu = relu(conv, inplace=False)
flatten = flatten(relu, 1)
reductions_relu = reductions.relu(relu)  # LeanReduction(16, 4, dim=1, nonnegative)
flatten_1 = flatten(reductions_relu, 1)
head = head(flatten_1)  # Linear(in_features=144, out_features=5, bias=True)
output = output((head, flatten))
""",
    )


def test_reduction_stands_behind_the_in_place_call():
    assert_expected_inline(
        lean_text(InPlace()),
        """\
x = x()
stem = stem(x)  # Conv2d(3, 16, kernel_size=(1, 1), stride=(1, 1))
relu = relu(stem)  # ReLU(inplace=True)
reductions_stem = reductions.stem(stem)  # LeanReduction(16, 4, dim=1)
left = left(reductions_stem)  # Conv2d(4, 4, kernel_size=(1, 1), stride=(1, 1))
reductions_relu = reductions.relu(relu)  # LeanReduction(16, 4, dim=1, nonnegative)
right = right(reductions_relu)  # Conv2d(4, 4, kernel_size=(1, 1), stride=(1, 1))
add = add(left, right)
output = output(add)
""",
    )


def test_groups_are_reduced_one_by_one():
    lean = lean_fx.leanify(Grouped(), torch.rand(2, 3, 8, 8), channels=4).eval()
    assert_expected_inline(
        graph_text(lean),
        """\
x = x()
stem = stem(x)  # Conv2d(3, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
relu = relu(stem, inplace=False)
reductions_relu = reductions.relu(relu)  # LeanReduction(64, 4, dim=1, nonnegative)
plain = plain(reductions_relu)  # Conv2d(4, 48, kernel_size=(1, 1), stride=(1, 1))
unflatten = unflatten(relu, 1, (4, 16))
reductions_relu_1 = reductions.relu_1(unflatten)  # LeanReduction(16, 4, dim=2, nonnegative)
flatten = flatten(reductions_relu_1, 1, 2)
left = left(flatten)  # Conv2d(16, 48, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=4)
add = add(plain, left)
unflatten_1 = unflatten(relu, 1, (2, 32))
reductions_relu_2 = reductions.relu_2(unflatten_1)  # LeanReduction(32, 4, dim=2, nonnegative)
flatten_1 = flatten(reductions_relu_2, 1, 2)
right = right(flatten_1)  # Conv2d(8, 48, kernel_size=(1, 1), stride=(1, 1), groups=2, bias=False)
add_1 = add(add, right)
relu_1 = relu(add_1, inplace=False)
unflatten_2 = unflatten(relu_1, 1, (2, 24))
reductions_relu_1_1 = reductions.relu_1_1(unflatten_2)  # LeanReduction(24, 4, dim=2, nonnegative)
flatten_2 = flatten(reductions_relu_1_1, 1, 2)
up = up(flatten_2)  # ConvTranspose2d(8, 4, kernel_size=(2, 2), stride=(2, 2), groups=2)
output = output(up)
""",
    )
    x = torch.rand(1, 64, 5, 5)
    reduction = lean.reductions.relu_1
    parts = [reduction(part.unsqueeze(1)).squeeze(1) for part in x.split(16, 1)]
    literal = [  # each group of the layer is a conv of its own
        F.conv2d(part, weight, bias, padding=1)
        for part, weight, bias in zip(
            parts, lean.left.weight.split(12), lean.left.bias.split(12), strict=True
        )
    ]
    grouped = reduction(x.unflatten(1, (4, 16))).flatten(1, 2)
    torch.testing.assert_close(lean.left(grouped), torch.cat(literal, 1))


def test_channels_last():
    assert_expected_inline(
        lean_text(Tokens()),
        """\
x = x()
patch = patch(x)  # Conv2d(3, 32, kernel_size=(4, 4), stride=(4, 4))
flatten = flatten(patch, 2)
transpose = transpose(flatten, 1, 2)
norm = norm(transpose)  # LayerNorm((32,), eps=1e-05, elementwise_affine=True, bias=True)
reductions_norm = reductions.norm(norm)  # LeanReduction(32, 4, dim=-1)
up = up(reductions_norm)  # Linear(in_features=4, out_features=64, bias=True)
gelu = gelu(up)
reductions_gelu = reductions.gelu(gelu)  # LeanReduction(64, 8, dim=-1)
down = down(reductions_gelu)  # Linear(in_features=8, out_features=32, bias=True)
add = add(transpose, down)
reductions_add = reductions.add(add)  # LeanReduction(32, 4, dim=-1)
flatten_1 = flatten(reductions_add, 1)
head = head(flatten_1)  # Linear(in_features=16, out_features=5, bias=True)
output = output(head)
""",
    )


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
reshape = reshape(k_bias, (-1, 1))
add = add(conv, reshape)
q_bias = q_bias()
cat = cat((q_bias, k_bias))
getattr_1 = getattr(add, mT)
qkv = qkv(getattr_1)  # Linear(in_features=32, out_features=48, bias=False)
add_1 = add(qkv, cat)
relu_1 = relu(add_1, inplace=False)
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
add = add(a_0, mul)
a_1 = a.1(add)  # Linear(in_features=8, out_features=8, bias=False)
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
inner_kernel_1 = inner.kernel(relu)  # Conv2d(16, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=2, bias=False)
reshape = reshape(inner_shift, (-1, 1, 1))
add = add(inner_kernel_1, reshape)
relu_1 = relu(add, inplace=False)
mean = mean(relu_1, (2, 3))
product_1 = product(mean)  # Linear(in_features=16, out_features=32, bias=False)
relu_2 = relu(product_1, inplace=False)
transposed_1 = transposed(relu_2)  # Linear(in_features=32, out_features=16, bias=False)
getitem = getitem(inner_shift, slice(None, 1, None))
added_1 = added(transposed_1)  # Linear(in_features=16, out_features=24, bias=False)
add_1 = add(added_1, getitem)
linear_2 = linear(add_1)  # Linear(in_features=24, out_features=5, bias=False)
output = output(linear_2)
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
    left = {each.layer: each.reason for each in plan.left_alone}
    assert left["product"] == "skip='product'"
    assert left["inner.kernel"] == "in_channels=8 of each of 2 groups is below min_channels=16"
    again = lean_fx.Plan.from_json(plan.to_json())
    assert again == plan
    assert isinstance(again.apply(model).product, nn.Parameter)
    with pytest.raises(PlanError, match="'product' is no parameter that multiplies a value once"):
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


def test_shapes_are_written_and_buffers_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    captured = capture(model)
    before = {name: value.clone() for name, value in captured.state_dict().items()}
    PropagateShapes((torch.rand(2, 3, 9, 9),))(captured)
    shapes = {node.name: facts(node).shape for node in captured.graph.nodes}
    assert shapes["_0"] == shapes["_1"] == (2, 4, 7, 7)
    for name, value in captured.state_dict().items():
        assert torch.equal(value, before[name])


def test_channels_along_an_axis_that_is_pooled_are_not_tracked():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 32, 1), nn.MaxPool2d(2)
            self.read = nn.Linear(8 * 16 * 4, 5)

        def forward(self, x):
            return self.read(self.pool(self.conv(x).permute(0, 2, 1, 3)).flatten(1))

    x = torch.rand(2, 3, 8, 8)
    for inputs in (None, x):
        (left,) = lean_fx.plan(Turned(), inputs).left_alone[1:]
        assert left.reason == "the channels of what is flattened before it are unknown"


def test_channels_are_tracked_without_shapes():
    captured = capture(Tokens())
    TrackChannels()(captured)
    found = {node.name: facts(node).channels for node in captured.graph.nodes}
    assert (found["patch"].axis, found["patch"].count) == (1, 32)
    assert (found["down"].axis, found["down"].count) == (-1, 32)
    assert (found["flatten"].axis, found["flatten"].count) == (1, 32)
    assert found["transpose"] is None


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            (torch.rand(2, 4, 8, 8),),
            "example_inputs: the model cannot run on them: stem([2, 4, 8, 8],) failed (",
        ),
        (
            (torch.rand(2, 3, 8, 8), torch.rand(1)),
            "example_inputs: 2 given, but the model takes 1 (x); give one tensor, or a tuple of them",
        ),
        ((), "example_inputs: 0 given, but the model takes 1 (x)"),
    ],
)
def test_example_inputs_that_do_not_fit(inputs, message):
    with pytest.raises(ArgumentError) as caught:
        PropagateShapes(inputs)(capture(Residual()))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_failing_pass_is_named_with_those_before_it():
    class Breaks(Pass):
        def run(self, graph_module):
            raise ZeroDivisionError("no")

    pipeline = Pipeline([TrackChannels(), FindConsumers(), Breaks()])
    with pytest.raises(PassError) as caught:
        pipeline(symbolic_trace(Residual()))
    assert str(caught.value) == (
        "Breaks failed (ZeroDivisionError: no); passes before it: TrackChannels, FindConsumers"
    )


def test_sites_that_do_not_fit_leave_the_graph_whole():
    plan = lean_fx.plan(Residual())
    other = capture(nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)))
    before = description(other)
    with pytest.raises(
        PlanError, match="^plan: layer 'left' is not called by 'left' in this model; make"
    ):
        InsertReductions(plan.sites)(other)
    assert description(other) == before

    wider = Residual()
    wider.right = nn.Conv2d(64, 32, 1)
    with pytest.raises(PlanError) as caught:
        plan.apply(wider)
    assert str(caught.value) == (
        "plan: layer 'right' reads 64 channels, but the plan says 32; make the plan anew from this "
        "model"
    )
    wider.left = nn.ConvTranspose2d(32, 32, 3)
    with pytest.raises(PlanError, match="'left' is a ConvTranspose2d, but the plan says Conv2d"):
        plan.apply(wider)
