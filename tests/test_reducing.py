"""Layers that are never called: the forward of another module applies their weights."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

import lean_fx
from lean_fx.capture.capturing import capture
from lean_fx.errors import LeanWarning, PlanError
from reference import reduce_all


def attend(x, linear_qkv, linear_proj, side, training):
    """Attention in windows of ``side``, as Swin's: sizes decide what is padded and shifted."""
    length = x.shape[1]
    x = F.pad(x, (0, 0, 0, -length % side))
    shift = 0 if side >= x.shape[1] else side // 2
    x = x.roll(-shift, 1)
    windows = x.reshape(-1, side, x.shape[2])
    q, k, v = linear_qkv(windows).chunk(3, -1)
    out = linear_proj((q @ k.mT).softmax(-1) @ v).reshape(x.shape).roll(shift, 1)
    return F.dropout(out[:, :length], 0.5, training)


def without_first(bias):
    bias = bias.clone()
    bias[:8].zero_()
    return bias


@torch.fx.wrap
def windowed(x, qkv, proj, qkv_bias, proj_bias, side, training):
    def linear_qkv(x):
        return F.linear(x, qkv, without_first(qkv_bias))

    def linear_proj(x):
        return F.linear(bias=proj_bias, weight=proj, input=x)

    return attend(x, linear_qkv, linear_proj, side, training)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        weights = self.qkv.weight, self.proj.weight, self.qkv.bias, self.proj.bias
        return windowed(x, *weights, 4, self.training)


class Swin(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 32)
        self.blocks = nn.Sequential(Attention(), nn.LayerNorm(32), Attention())
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).relu().mean(1))


@pytest.fixture
def swin():
    torch.manual_seed(0)
    model = Swin().double().eval()
    return model, lean_fx.leanify(model, torch.rand(2, 7, 6).double(), channels=8).eval()


def by_hand(layer, bias=None):
    def linear(x):
        reduced = reduce_all(x.detach(), layer.reduction.seed, -1)
        return F.linear(reduced, layer.weight, layer.bias if bias is None else bias)

    return linear


def test_weights_that_a_wrapped_function_applies(swin):
    model, lean = swin
    before = copy.deepcopy(model.state_dict())
    assert_expected_inline(
        str(lean.meta["lean_fx.plan"]),
        """\
Plan for Swin: 5 reductions (lean) before 5 of 6 layers
their weights: 8,288 -> 2,072, of 8,835 parameters in all
value      sign  MACs  layer          type    channels  weights       note
mean       >= 0  128   head           Linear  32 -> 8   96 -> 24
its input  any   320   blocks.0.qkv   Linear  32 -> 8   3,072 -> 768  applied by blocks.0
its input  any   320   blocks.0.proj  Linear  32 -> 8   1,024 -> 256  applied by blocks.0
its input  any   320   blocks.2.qkv   Linear  32 -> 8   3,072 -> 768  applied by blocks.2
its input  any   320   blocks.2.proj  Linear  32 -> 8   1,024 -> 256  applied by blocks.2
left alone
stem  Linear  in_channels=6 is below min_channels=16""",
    )
    for length in (7, 3, 8, 13):  # on both sides of every branch
        x = torch.rand(2, length, 6).double()
        value = lean.stem(x)
        for block in lean.blocks.children():
            if isinstance(block, Attention):
                qkv = by_hand(block.qkv, without_first(block.qkv.bias))
                value = attend(value, qkv, by_hand(block.proj), 4, False)
            else:
                value = block(value)
        value = value.relu().mean(1)
        expected = lean.head(reduce_all(value.detach(), lean.reductions.mean.seed, -1))
        torch.testing.assert_close(lean(x), expected)
        assert model(x).shape == expected.shape
    assert [*model.state_dict()] == [*before]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert type(lean.get_submodule("blocks.0.qkv")) is nn.Linear
    assert not model.blocks[0]._forward_hooks


def test_it_trains_and_follows_the_mode(swin):
    _, lean = swin
    x = torch.rand(2, 9, 6).double()
    torch.testing.assert_close(lean(x), lean(x), rtol=0, atol=0)
    lean.train()
    assert not torch.equal(lean(x), lean(x))
    lean(x).sum().backward()
    assert all(parameter.grad is not None for parameter in lean.parameters())
    with torch.no_grad():
        assert not lean(x).requires_grad


def test_copies_pickles_and_plans_in_json(swin):
    _, lean = swin
    x = torch.rand(2, 9, 6).double()
    plan = lean.meta["lean_fx.plan"]
    assert lean_fx.Plan.from_json(plan.to_json()) == plan
    again = lean_fx.Plan.from_json(plan.to_json()).apply(Swin().double().eval())
    again.load_state_dict(lean.state_dict())
    for other in (copy.deepcopy(lean), pickle.loads(pickle.dumps(lean)), again):
        torch.testing.assert_close(other(x), lean(x), rtol=0, atol=0)
        with torch.no_grad():
            other.get_parameter("blocks.0.proj.reduction.seed").neg_()
        assert not torch.equal(other(x), lean(x))


def test_each_reduction_is_one_node_in_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    x = torch.rand(2, 7, 6)
    lean = lean_fx.leanify(Swin().eval(), x, channels=8)
    lean_fx.export_onnx(lean, tmp_path / "net.onnx", x)
    kinds = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert kinds.count("LEAN") == 5


def test_a_reduced_model_is_captured_as_it_is(swin):
    _, lean = swin
    x = torch.rand(2, 9, 6).double()
    for inputs in ((), (x,)):
        torch.testing.assert_close(capture(lean, inputs)(x), lean(x), rtol=0, atol=0)
    block, value = lean.get_submodule("blocks.0"), lean.stem(x)
    torch.testing.assert_close(capture(block)(value), block(value), rtol=0, atol=0)
    again = lean_fx.plan(lean, x)
    assert again.sites == ()
    reasons = {each.layer: each.reason.text for each in again.left_alone}
    assert reasons["blocks.0.qkv"] == "it reads a reduction already"
    assert not _get_current_function_mode_stack()


def test_without_example_inputs_they_are_left_alone():
    plan = lean_fx.plan(Swin())
    assert [site.layers for site in plan.sites] == [("head",)]
    reasons = {each.layer: each.reason.text for each in plan.left_alone}
    assert reasons["blocks.0.qkv"] == "inside blocks.0, which is not traced"


class Applies(nn.Module):
    """Control flow on numbers, and weights of convolutions without their calls."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(4, 32, 1)
        self.convs = nn.ModuleList([nn.Conv1d(32, 64, 3), nn.Conv1d(64, 48, 3, groups=2)])
        self.linear = nn.Linear(48, 5)

    def forward(self, x):
        x = self.first(x)
        if float(x.detach().sum()) > 1e9:
            return x
        x = F.conv1d(x, self.convs[0].weight, padding=1).relu()
        x = torch.conv1d(x, self.convs[1].weight, None, 2, 1, 1, 2)
        return F.linear(x.mean(2), self.linear.weight, self.linear.bias)


def untraced(model, x, **options):
    with pytest.warns(LeanWarning, match="each layer reduces its own input"):
        return lean_fx.leanify(model, x, **options).eval()


def test_convolutions_in_a_model_that_cannot_be_traced():
    x = torch.rand(2, 4, 9).double()
    lean = untraced(Applies().double(), x, channels=8)
    plan = lean.meta["lean_fx.plan"]
    (first, grouped), linear = lean.convs, lean.linear
    consumers = [consumer for site in plan.sites for consumer in site.consumers]
    assert [(each.layer, each.applied_by) for each in consumers] == [
        ("convs.0", ""),
        ("convs.1", ""),
        ("linear", ""),
    ]
    assert [site.note for site in plan.sites] == ["applied by Applies"] * 3
    assert type(lean) is Applies
    x = torch.rand(3, 4, 11).double()
    value = F.conv1d(first.reduction(lean.first(x)), first.weight, padding=1).relu()
    value = torch.cat([grouped.reduction(part[:, None])[:, 0] for part in value.split(32, 1)], 1)
    value = F.conv1d(value, grouped.weight, None, 2, 1, 1, 2).mean(2)
    expected = F.linear(linear.reduction(value), linear.weight, linear.bias)
    torch.testing.assert_close(lean(x), expected)
    again = lean_fx.Plan.from_json(plan.to_json()).apply(Applies().double())
    again.load_state_dict(lean.state_dict())
    for other in (again, copy.deepcopy(lean), pickle.loads(pickle.dumps(lean))):
        torch.testing.assert_close(other(x), expected)


class Fails(nn.Module):
    """Applies a weight, within itself if asked to, and fails if asked to."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.proj = nn.Linear(32, 32)
        self.fails, self.depth = False, 0

    def forward(self, x, depth=None):
        depth = self.depth if depth is None else depth
        if depth:
            x = self(x, depth - 1)
        x = F.linear(2 * x, self.inner.proj.weight)
        if self.fails and not depth:
            raise self.fails("as asked")
        return x if float(x.detach().sum()) < 1e9 else -x


def test_what_fails_or_runs_within_itself():
    model, x = Fails(), torch.rand(3, 32)
    lean = untraced(model, x)
    (layer,) = [module for module in lean.modules() if isinstance(module, nn.Linear)]

    def once(x):
        return F.linear(layer.reduction(2 * x), layer.weight)

    torch.testing.assert_close(lean(x), once(x))
    lean.depth = 2
    torch.testing.assert_close(lean(x), once(once(once(x))))
    for lean.depth in (0, 2):
        lean.fails = ValueError
        with pytest.raises(ValueError, match="as asked"):
            lean(x)
        assert not _get_current_function_mode_stack()
    lean.fails = False
    for first in (False, True):  # after our hook, before it
        lean.register_forward_pre_hook(lambda module, args: 1 / 0, prepend=first)
        with DeviceContext(torch.device("cpu")), pytest.raises(ZeroDivisionError):
            lean(x)
        assert not _get_current_function_mode_stack()


def test_threads_and_other_parameters(swin):
    _, lean = swin
    x = torch.rand(2, 9, 6).double()
    expected, found = lean(x), {}

    def run(number):
        torch.get_num_threads()  # until it is asked, nn.Linear alone rounds otherwise in a thread
        found[number] = [lean(x) for _ in range(20)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, expected) for number in range(4) for each in found[number])

    negated = {name: -parameter for name, parameter in lean.named_parameters()}
    other = copy.deepcopy(lean)
    other.load_state_dict(negated, strict=False)
    torch.testing.assert_close(torch.func.functional_call(lean, negated, (x,)), other(x))


def test_after_an_interrupt_the_numbers_are_the_same():
    model, x = Fails(), torch.rand(3, 32)
    lean = untraced(model, x)
    expected, other = lean(x), copy.deepcopy(lean)
    lean.fails = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        lean(x)
    (mode,) = _get_current_function_mode_stack()
    try:
        lean.fails = False
        for each in (lean, other):
            torch.testing.assert_close(each(x), expected, rtol=0, atol=0)
    finally:
        mode.__exit__(None, None, None)
    assert not _get_current_function_mode_stack()


def replicated(module):
    """As nn.DataParallel makes replicas, whose parameters are plain tensors."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = replicated(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else -parameter)
    return replica


def test_replicas(swin):
    _, lean = swin
    x = torch.rand(2, 9, 32).double()
    block = lean.get_submodule("blocks.0")
    negated = copy.deepcopy(block)
    for parameter in negated.parameters():
        parameter.data.neg_()
    torch.testing.assert_close(replicated(block)(x), negated(x))


class Elsewhere(nn.Module):
    """Weights that are read otherwise, and in more than one module."""

    def __init__(self):
        super().__init__()
        self.stem, self.scaled = nn.Linear(4, 32), nn.Linear(32, 32)
        self.summed, self.shared = nn.Linear(32, 32), nn.Linear(32, 32)
        self.first, self.second = nn.Identity(), nn.Identity()

    def forward(self, x):
        x = F.linear(self.stem(x), 2 * self.scaled.weight)
        x = F.linear(x, self.summed.weight) + torch.stack([self.summed.weight]).mean()
        x = self.first(x) if float(x.detach().sum()) < 1e9 else -x
        return F.linear(F.linear(x, self.shared.weight), self.shared.weight)


def test_weights_that_are_read_otherwise():
    lean = untraced(Elsewhere(), torch.rand(2, 4))
    plan = lean.meta["lean_fx.plan"]
    assert [site.layers for site in plan.sites] == [("shared",)]
    reasons = {each.layer: each.reason.text for each in plan.left_alone}
    assert reasons["scaled"] == reasons["summed"] == "forward reads its weight itself"


class Reads(nn.Module):
    """Applies the weight of a layer that it is given."""

    def forward(self, x, layer):
        return F.linear(x, layer.weight) if float(x.detach().sum()) < 1e9 else x


class Lends(nn.Module):
    """The module that applies a weight does not hold the layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.lent, self.reads = nn.Linear(4, 32), nn.Linear(32, 32), Reads()

    def forward(self, x):
        x = self.stem(x)
        return (
            self.reads(self.reads(x, self.lent), self.lent) if float(x.detach().sum()) < 1e9 else x
        )


def test_the_innermost_module_around_the_layer_that_runs_has_the_hooks():
    model = nn.Sequential(Lends(), nn.ReLU(), nn.Linear(32, 2))
    lean = lean_fx.leanify(model, torch.rand(3, 4))
    sites = {site.layers[0]: site for site in lean.meta["lean_fx.plan"].sites}
    assert sites["0.lent"].consumers[0].applied_by == "0"
    lent = lean.get_submodule("0.lent")
    x = torch.rand(5, 4)
    value = lean.get_submodule("0.stem")(x)
    for _ in range(2):
        value = F.linear(lent.reduction(value), lent.weight)
    torch.testing.assert_close(lean.get_submodule("0")(x), value)


def test_it_is_compiled_and_exported_by_torch(swin):
    _, lean = swin
    x = torch.rand(2, 9, 6).double()
    compiled = torch.compile(lean, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), lean(x))
    exported = torch.export.export(lean, (x,)).module()
    torch.testing.assert_close(exported(x), lean(x))
    assert not _get_current_function_mode_stack()


def test_a_plan_of_another_model():
    x = torch.rand(2, 7, 6)
    text = lean_fx.plan(Swin(), x, channels=8).to_json()
    text = text.replace('"applied_by": "blocks.0"', '"applied_by": "blocks.2"')
    with pytest.raises(PlanError, match="^plan: layer 'blocks.0.qkv' is not inside 'blocks.2'"):
        lean_fx.Plan.from_json(text).apply(Swin())
    text = text.replace('"applied_by": "blocks.2"', '"applied_by": 2')
    with pytest.raises(PlanError, match="applied_by=2 is not str"):
        lean_fx.Plan.from_json(text)
