"""Capturing what plain torch.fx cannot: one small model for each pitfall."""

import copy
import functools
import math
import pickle
import warnings
from collections.abc import Iterable

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lean_fx
from graphs import Net
from lean_fx.capture import capture
from lean_fx.errors import BranchError, CaptureError, LeanError
from lean_fx.guards import check_branch
from lean_fx.modes import ByMode, InMode
from lean_fx.passes.modularize_weights import weights_of_products


def X(*shape):  # noqa: N802
    return torch.rand(shape)


def checks(module):
    return [node for node in module.graph.nodes if node.target is check_branch]


def same_padding(x, kernel, stride):
    wanted = [max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:]]
    if any(each > 0 for each in wanted):
        x = F.pad(x, [part for n in reversed(wanted) for part in (n // 2, n - n // 2)])
    return x


def padded(self, x):
    return self.b(F.relu(self.a(same_padding(x, 3, 2))))


def heads(self, x):
    batch, length, _ = x.shape
    side = int(length**0.5)
    assert side * side == length, "no square"
    q, k = self.a(x).reshape(batch, length, 2, -1).unbind(2)
    return self.b((q + k).view(batch, side, side, -1).mean((1, 2)))


def looped(self, x):
    for each in x.shape[2:]:
        x = x * each
    return self.b(self.a(torch.cat([row + i for i, row in enumerate(x.unbind(2))], -1)))


def kinds(self, x):
    assert isinstance(x, Tensor)
    assert isinstance(x.shape[0], int)
    assert isinstance(x.shape, tuple)
    size = x.shape[-1] if x.size(0) > 1 or x.dtype == torch.float64 else 1
    size = (size, size) if not isinstance(size, Iterable) else size
    return self.b(self.a(x)) * size[0] if x.dim() == 2 and x.ndim == 2 else x


def assigned(self, x):
    mask = torch.zeros(x.shape[0], x.shape[1])
    mask[:, : x.shape[1] // 2] = 1.0
    y = self.a(x)
    if y.shape[1] > 1:
        y[:, 0] = 0.0
    return self.b(y), mask + torch.arange(x.shape[1])


def masked(self, x):
    scores = self.a(x)
    hidden = (1.0 - torch.ones_like(x[:, :1])) * torch.finfo(x.dtype).min
    if torch.finfo(scores.dtype).bits < 16 or torch.iinfo(torch.int64).bits < 64:
        hidden = hidden / 2
    return self.b((scores + hidden).masked_fill(x == 0, torch.finfo(x.dtype).tiny))


def layers(in_features=32, out_features=32):
    return {"a": nn.Linear(in_features, out_features), "b": nn.Linear(out_features, 4)}


FOLLOWED = {
    "padding": (
        lambda: Net(padded, a=nn.Conv2d(3, 32, 3, 2), b=nn.Conv2d(32, 8, 1)),
        (2, 3, 9, 9),
        (5, 3, 13, 11),
    ),
    "int, unpacking and unbind": (
        lambda: Net(heads, a=nn.Linear(16, 64), b=nn.Linear(32, 4)),
        (2, 9, 16),
        (5, 9, 16),
    ),
    "loops": (
        lambda: Net(looped, a=nn.Linear(12, 32), b=nn.Linear(32, 4)),
        (2, 5, 3, 4),
        (6, 5, 3, 4),
    ),
    "types": (lambda: Net(kinds, **layers()), (2, 32), (5, 32)),
    "assignment": (lambda: Net(assigned, **layers()), (2, 32), (5, 32)),
    "limits of a type": (lambda: Net(masked, **layers()), (2, 32), (5, 32)),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_branches_on_sizes_are_followed(name):
    make, shape, another = FOLLOWED[name]
    model = make()
    x, y = X(*shape), X(*another)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CaptureError):
        capture(model)
    captured = capture(model, (x,))
    torch.testing.assert_close(captured(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(captured(y), model(y), rtol=0, atol=0)
    for state in (model.state_dict(), captured.state_dict()):
        torch.testing.assert_close(state, before, rtol=0, atol=0)
    names = [node.name for node in captured.graph.nodes]
    assert names == [node.name for node in capture(model, (y,)).graph.nodes]


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_was_followed_is_copied_compiled_and_reduced(name):
    make, shape, _ = FOLLOWED[name]
    model, x = make(), X(*shape)
    captured = capture(model, (x,))
    for copied in (copy.deepcopy(captured), pickle.loads(pickle.dumps(captured))):
        torch.testing.assert_close(copied(x), model(x), rtol=0, atol=0)
        assert len(checks(copied)) == len(checks(captured))
    made = lean_fx.plan(model, x)
    assert [site.layers for site in made.sites] == [("b",)]
    torch.manual_seed(0)
    lean = made.apply(model, x)
    torch.manual_seed(0)
    again = lean_fx.leanify(model, x)
    torch.testing.assert_close(lean(x), again(x))
    assert len(checks(lean)) == len(checks(captured))


def branches(self, x):
    if x.shape[-1] > 8:
        x = F.avg_pool2d(x, 2)
    return self.b(F.relu(self.a(x)))


def convs():
    return {"a": nn.Conv2d(3, 32, 1), "b": nn.Conv2d(32, 8, 1)}


def test_the_limits_of_a_type_are_those_of_every_call():
    def lowest(self, x):
        y = self.b(self.a(x))
        return torch.zeros_like(y) + torch.finfo(y.dtype).min

    model = Net(lowest, **layers())
    captured = capture(model, (X(2, 32),)).double()
    assert captured(X(2, 32).double()).min().item() == torch.finfo(torch.float64).min


def test_another_branch_is_refused_by_name():
    captured = capture(Net(branches, **convs()), (X(2, 3, 8, 8),))
    assert captured(X(3, 3, 4, 4)).shape == (3, 8, 4, 4)
    with pytest.raises(BranchError) as caught:
        captured(X(2, 3, 9, 9))
    text = str(caught.value)
    assert text.startswith("Net (test_capture.py:")
    assert text.endswith(
        "if x.shape[-1] > 8:): gives True for these inputs, but the model was captured where it "
        "gives False; capture it with inputs of these sizes"
    )
    assert isinstance(caught.value, LeanError)


def test_another_number_of_axes_is_refused():
    captured = capture(Net(kinds, **layers()), (X(2, 32),))
    with pytest.raises(BranchError, match="gives 3 for these inputs"):
        captured(X(3, 2, 32))


def test_a_number_that_counts_as_true_does_so_for_others():
    def even(self, x):
        return self.b(self.a(x)) if x.shape[0] % 4 else x

    captured = capture(Net(even, **layers()), (X(2, 32),))
    assert captured(X(3, 32)).shape == (3, 4)
    with pytest.raises(BranchError):
        captured(X(4, 32))


def test_branches_on_numbers_are_not_followed():
    model = Net(lambda self, x: x if x.sum() > 0 else -x)
    with pytest.raises(CaptureError, match="x.sum.* depends on the numbers in a tensor"):
        capture(model, (X(2, 3),))


def test_branches_on_parameters_alone_need_no_check():
    def wide(self, x):
        return self.b(self.a(x)) if self.a.weight.shape[0] > 8 and x.shape[0] else x

    assert len(checks(capture(Net(wide, **layers()), (X(2, 32),)))) == 1


def test_defaults_are_followed():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 32)
            self.b = nn.Linear(32, 4)

        def forward(self, x, mask=None, features=False):
            x = self.a(x)
            if mask is not None:
                x = x * mask
            return x if features else self.b(x)

    model, x = Optional(), X(2, 8)
    captured = capture(model, (x,))
    torch.testing.assert_close(captured(x), model(x))
    with pytest.raises(BranchError, match="if features else"):
        captured(x, None, True)
    given = capture(model, (x, X(2, 32), True))
    torch.testing.assert_close(given(x, X(2, 32) * 0, True), torch.zeros(2, 32))


class Caching(nn.Module):
    """Keeps a tensor that fits the size of its input."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 32)
        self.b = nn.Linear(32, 4)
        self.register_buffer("table", torch.rand(10, 8))
        self.cache = None

    def forward(self, x):
        if self.cache is None or self.cache.shape[0] != x.shape[1]:
            self.cache = self.table[: x.shape[1]] + torch.arange(x.shape[1]).view(-1, 1)
        return self.b(self.a(x + self.cache))


@pytest.mark.parametrize("warm", [True, False])
def test_caches_are_neither_filled_nor_kept(warm):
    model, x = Caching(), X(2, 5, 8)
    if warm:
        model(x)
    before = model.cache
    captured = capture(model, (x,))
    lean = lean_fx.leanify(model, x)
    assert model.cache is before
    torch.testing.assert_close(captured(x), model(x))
    assert type(lean(x)) is Tensor
    again = copy.deepcopy(captured)
    torch.testing.assert_close(again(X(7, 5, 8)).shape, torch.Size([7, 5, 4]))


class Opaque(nn.Module):
    """Branches on numbers, and caches."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(32, 32)
        self.norm = nn.Identity()
        self.seen = None

    def forward(self, x):
        self.seen = x.detach()
        x = self.norm(x)
        return self.inner(x) if x.sum() > 0 else x


@pytest.mark.parametrize("given", [True, False])
def test_what_cannot_be_traced_is_a_leaf(given):
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), Opaque(), nn.ReLU(), nn.Linear(32, 4))
    x = X(2, 8)
    captured = capture(model, (x,) if given else ())
    torch.testing.assert_close(captured(x), model(x))
    made = lean_fx.plan(model, x if given else None)
    if given:  # what the layer reads is seen then, and it reduces its own input
        assert [site.layers for site in made.sites] == [("4",), ("2.inner",)]
    else:
        assert [site.layers for site in made.sites] == [("4",)]
        reasons = {each.layer: each.reason for each in made.left_alone}
        assert reasons["2.inner"] == "inside 2, which is not traced"
    lean = lean_fx.leanify(copy.deepcopy(model), x if given else None)
    assert type(copy.deepcopy(lean)(x)) is Tensor


def test_a_model_that_is_a_leaf_as_a_whole_is_refused():
    with pytest.raises(CaptureError, match="0 cannot be traced, and no layer is elsewhere"):
        capture(nn.Sequential(Opaque()), (X(2, 32),))


def test_lru_caches_get_no_proxies():
    @functools.lru_cache
    def doubled(size):
        return 2 * size

    def cached(self, x):
        return self.b(self.a(x)) * doubled(x.shape[0]) if x.shape[0] else x

    model, x = Net(cached, **layers()), X(3, 32)
    capture(model, (x,))
    torch.testing.assert_close(model(x), capture(model, (x,))(x))
    assert doubled(3) == 6


def test_a_followed_model_is_exported_with_any_batch(tmp_path):
    def batched(self, x):
        if x.shape[0] > 64 or x.shape[-1] % 2:
            return x
        return self.b(F.relu(self.a(same_padding(x, 3, 2))))

    model = Net(batched, a=nn.Conv2d(3, 32, 3, 2), b=nn.Conv2d(32, 8, 1))
    lean = lean_fx.leanify(model, X(2, 3, 8, 8))
    assert checks(lean)
    path = lean_fx.export_onnx(lean, tmp_path / "net.onnx", X(2, 3, 8, 8)).path
    assert "LEAN" in [node.op_type for node in onnx.load(path).graph.node]


def test_a_followed_model_is_compiled():
    model = Net(branches, **convs())
    captured = capture(model, (X(2, 3, 8, 8),))
    compiled = torch.compile(captured, backend="eager", fullgraph=True)
    x = X(2, 3, 8, 8)
    torch.testing.assert_close(compiled(x), model(x))


# Modes.


class Aux(nn.Module):
    """Auxiliary outputs in training only, dropout, a counter, and noise by the mode."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 32, 3)
        self.norm = nn.BatchNorm2d(32)
        self.aux = nn.Sequential(nn.Conv2d(32, 4, 5), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(32, 5, 1)
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x):
        x = F.relu(self.norm(self.body(x)))
        if self.training:
            self.steps.add_(1)
            extra = self.aux(x)
        x = F.batch_norm(
            x, self.norm.running_mean, self.norm.running_var, training=self.training, momentum=0.3
        )
        y = self.head(F.dropout(x, 0.5, self.training))
        if self.training:
            return y, {"aux": extra}
        return y


def run(model, mode, x):
    model = copy.deepcopy(model).train(mode)
    torch.manual_seed(0)
    return model(x), dict(model.state_dict())


@pytest.mark.parametrize("start", [True, False])
def test_a_graph_that_differs_between_modes_follows_the_mode(start):
    model, x = Aux().train(start), X(4, 3, 9, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error", lean_fx.LeanWarning)
        captured = capture(model, (x,))
    others = (copy.deepcopy(captured), pickle.loads(pickle.dumps(captured)))
    again = capture(captured, (x,))
    for module in (captured, *others, again):
        for mode in (True, False, True):
            torch.testing.assert_close(run(module, mode, x), run(model, mode, x), rtol=0, atol=0)
    small = X(4, 3, 4, 4)
    torch.testing.assert_close(run(captured, False, small), run(model, False, small))
    with pytest.raises(RuntimeError, match="Kernel size"):
        run(captured, True, small)


@pytest.mark.parametrize("start", [True, False])
def test_a_reduced_model_follows_the_mode(start, tmp_path):
    model, x = Aux().train(start), X(4, 3, 9, 9)
    before = copy.deepcopy(model.state_dict())
    lean = lean_fx.leanify(model, x)
    plan = lean.meta["lean_fx.plan"]
    assert [site.layers for site in plan.sites] == [("head",)]
    reasons = {each.layer: each.reason for each in plan.left_alone}
    assert reasons["aux.0"] == "called in training only, or in evaluation only"
    torch.testing.assert_close(model.state_dict(), before)
    aux = {name: value for name, value in lean.state_dict().items() if name.startswith("aux.")}
    torch.testing.assert_close(aux, {n: v for n, v in before.items() if n.startswith("aux.")})
    y, extra = lean.train()(x)
    assert (y.shape, extra["aux"].shape) == ((4, 5, 7, 7), (4, 4, 3, 3))
    (y.sum() + extra["aux"].sum()).backward()
    assert all(parameter.grad is not None for parameter in lean.parameters())
    assert lean.eval()(x).shape == (4, 5, 7, 7)
    assert lean_fx.export_onnx(lean, tmp_path / "net.onnx", x).path.exists()


def test_parts_of_a_mode_and_values_by_mode_are_seen():
    captured = capture(Aux())
    modules = [type(module) for module in captured.calls.children()]
    assert set(modules) == {ByMode, InMode, nn.Dropout}


def test_frozen_parts_keep_their_mode():
    block = Net(lambda self, x: F.rrelu(x - 0.5, training=self.training))
    model = nn.Sequential(nn.Linear(4, 32), block).train()
    block.eval()
    captured = capture(model)
    assert captured(X(3, 4)).shape == (3, 32)
    x = X(3, 4)
    torch.testing.assert_close(captured(x), model(x), rtol=0, atol=0)


def test_modes_that_cannot_be_one_are_told():
    def swapped(self, x):
        return self.a(self.b(x)) if self.training else self.b(self.a(x))

    model = Net(swapped, a=nn.Linear(32, 32), b=nn.Linear(32, 32)).eval()
    with pytest.warns(lean_fx.LeanWarning, match="^Net: does what it does in eval mode after"):
        captured = capture(model)
    x = X(2, 32)
    torch.testing.assert_close(captured.train()(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("followed", [False, True])
def test_the_size_of_a_parameter_is_a_constant(followed):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 32))

        def forward(self, x):
            if followed and len(x) > 100:
                return x
            width = self.weight.shape[1] // 2 + 2 * self.weight.size(0) + self.weight.dim()
            return (x @ self.weight).reshape(-1, width - 34, 2)

    model, x = Net(), torch.rand(3, 16)
    captured = capture(model, (x,))
    torch.testing.assert_close(captured(x), model(x))
    assert list(weights_of_products(captured)) == ["weight"]  # nothing else reads it


class Windows(nn.Module):
    """Branches on the length, which the sum over windows hides: it takes any."""

    def __init__(self, least):
        super().__init__()
        self.read, self.least = nn.Linear(32, 16), least

    def forward(self, x):
        if x.shape[1] > self.least:
            x = x[:, : self.least]
        return self.read(x)


@pytest.mark.parametrize(("least", "kept"), [(8, True), (100, False)])
def test_a_module_that_would_refuse_other_sizes_is_a_leaf(least, kept):
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), Windows(least), nn.Linear(16, 2))
    x = torch.rand(2, 6, 4)
    captured = capture(model, (x,))
    assert isinstance(captured.get_submodule("2"), Windows) == kept
    lean = lean_fx.leanify(model, x)
    layers = [site.layers[0] for site in lean.meta["lean_fx.plan"].sites]
    assert sorted(layers) == ["2.read", "3"]
    assert lean(torch.rand(3, 9, 4)).shape == (3, min(9, least), 2)


@pytest.mark.parametrize("given", [True, False])
def test_a_weight_that_a_whole_module_reads_too_stays_a_parameter(given):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.read = nn.Parameter(torch.rand(32, 32)), nn.Linear(32, 32)

        def forward(self, x):
            return self.read(x @ self.weight)

    def forward(self, x):
        x = self.a(x)
        return self.b(x @ self.inner.weight + F.linear(x, self.inner.read.weight) + self.inner(x))

    model, x = Net(forward, a=nn.Linear(8, 32), b=nn.Linear(32, 4), inner=Inner()), X(2, 8)
    model.inner.register_forward_hook(lambda module, args, out: out + 1)
    captured = capture(model, (x,) if given else ())
    torch.testing.assert_close(captured(x), model(x))
    lean = lean_fx.leanify(model, x if given else None)
    assert lean.get_submodule("b").in_features == 4
    assert lean(x).shape == (2, 4)


def test_sizes_of_samples_without_positions_are_probed(caplog):
    class Few(nn.Module):
        def __init__(self):
            super().__init__()
            self.read = nn.Linear(32, 16)

        def forward(self, x):
            return self.read(x[:2] if x.shape[0] > 2 else x)

    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), Few(), nn.Linear(16, 2))
    captured = capture(model, (X(2, 4),))
    torch.testing.assert_close(captured(x := X(3, 4)), model(x))
    assert not caplog.records


def test_a_model_that_takes_no_other_sizes_is_no_matter_for_a_log(caplog):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.give = nn.Linear(32, 16), nn.Linear(96, 4)

        def forward(self, x):
            x = self.read(x) if x.shape[1] > 2 else x
            return self.give(x.flatten(1))

    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), Fixed())
    assert capture(model, (X(2, 6, 4),))(X(3, 6, 4)).shape == (3, 4)
    assert not caplog.records


@pytest.mark.parametrize("given", [True, False])
def test_modules_without_parameters_that_forward_makes_are_traced(given):
    def forward(self, x):
        x = nn.Dropout(0.5)(nn.ReLU()(self.a(x)))
        return self.b(nn.Flatten()(nn.Sequential(nn.MaxPool2d(2), nn.Tanh())(x)))

    model, x = Net(forward, a=nn.Conv2d(3, 32, 1), b=nn.Linear(32 * 4, 4)), X(2, 3, 4, 4)
    captured = capture(model.eval(), (x,) if given else ())
    torch.manual_seed(0)
    found = captured(x)
    torch.manual_seed(0)  # a module that is made in forward is in training
    torch.testing.assert_close(found, model(x))
    (site,) = lean_fx.plan(model, x if given else None).sites
    assert (site.in_channels, site.layers) == (32, ("b",))


def test_layers_that_forward_makes_are_not_traced():
    with pytest.raises(CaptureError, match="module is not installed as a submodule"):
        capture(Net(lambda self, x: nn.Linear(4, 4)(self.a(x)), a=nn.Linear(4, 4)))
