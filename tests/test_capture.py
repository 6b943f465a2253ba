"""Capturing what plain torch.fx cannot: one small model for each pitfall."""

import copy
import functools
import math
import pickle
import sys
import types
from collections.abc import Iterable

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lean_fx
from graphs import Net
from lean_fx.capture.capturing import capture
from lean_fx.capture.guards import check_branch
from lean_fx.errors import BranchError, CaptureError, LeanError
from lean_fx.passes.modularize_weights import weights_of_products

#: Of nets whose graph takes the example inputs' sizes only.
REFUSED = pytest.mark.filterwarnings("ignore:.*form='module' takes what the model takes")


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


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if number % 3 else [])
        for number, name in enumerate(FOLLOWED)
    ],
)
@REFUSED
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


def test_the_limits_of_whole_numbers_are_those_of_every_call():
    def share(self, x):
        return self.b(self.a(x / torch.iinfo(x.dtype).max))

    model, x = Net(share, **layers()), torch.randint(2**30, (2, 32))
    for captured in (capture(model), capture(model, (x,))):
        for given in (x, x.int()):
            torch.testing.assert_close(captured(given), model(given), rtol=0, atol=0)


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


@REFUSED
def test_the_plan_of_a_model_that_branches_on_sizes_needs_example_inputs():
    model, x = Net(branches, **convs()), X(2, 3, 8, 8)
    plan = lean_fx.Plan.from_json(lean_fx.plan(model, x).to_json())
    with pytest.raises(CaptureError) as caught:
        plan.apply(model)
    assert str(caught.value).endswith(
        "; move the part that depends on values out of forward, or give example_inputs: branches "
        "on sizes are followed by them, else each layer reduces its own input"
    )
    assert plan.apply(model, x).b.in_channels == plan.sites[0].out_channels


def test_given_example_inputs_are_not_asked_for():
    model = Net(lambda self, x: self.a(x) if x.sum() > 0 else x, a=nn.Linear(32, 4))
    with pytest.raises(CaptureError, match="the part that depends on values out of forward$"):
        lean_fx.costs_of(model, X(2, 32))


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


@REFUSED
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


LIBRARY = """
import functools

def uncached(size):
    return 2 * size

cached = functools.lru_cache(uncached)

def careless(size):
    return cached(size)

def careful(size):  # as einops
    try:
        return cached(size)
    except TypeError:  # it is a symbol
        return uncached(size)
"""


@pytest.mark.parametrize("name", ["careless", "careful"])
def test_caches_of_other_packages_get_no_proxies(name, monkeypatch):
    library = types.ModuleType("some_library")
    monkeypatch.setitem(sys.modules, "some_library", library)
    exec(LIBRARY, vars(library))
    doubled = getattr(library, name)

    def scaled(self, x):
        return self.b(self.a(x)) * doubled(x.shape[0]) if x.shape[0] else x

    model = nn.Sequential(nn.Linear(32, 32), Net(scaled, **layers()), nn.Linear(4, 2))
    x = X(3, 32)
    for _ in range(2):
        captured = capture(model, (x,))
        for other in (x, X(5, 32)):
            torch.testing.assert_close(captured(other), model(other))
    assert (library.cached(3), library.cached(5)) == (6, 10)
    whole = [node.target for node in captured.graph.nodes if node.op == "call_module"]
    assert ("1" in whole) == (name == "careless")


@REFUSED
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
