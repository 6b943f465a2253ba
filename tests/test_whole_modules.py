"""Which modules are called whole, and what is captured around them."""

import copy
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lean_fx
from graphs import Net
from lean_fx.capture.capturing import capture
from lean_fx.errors import CaptureError


def X(*shape):  # noqa: N802
    return torch.rand(shape)


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
        reasons = {each.layer: each.reason.text for each in made.left_alone}
        assert reasons["2.inner"] == "inside 2, which is not traced"
    lean = lean_fx.leanify(copy.deepcopy(model), x if given else None)
    assert type(copy.deepcopy(lean)(x)) is Tensor


def test_a_model_that_is_a_leaf_as_a_whole_is_refused():
    with pytest.raises(CaptureError, match="0 cannot be traced, and no layer is elsewhere"):
        capture(nn.Sequential(Opaque()), (X(2, 32),))


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


def test_a_slice_of_the_models_own_layers_is_traced():
    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                *(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
            )

        def forward(self, x):
            middle = self.layers[:2](x)
            return self.layers[2:](middle), middle

    plan = lean_fx.plan(Sliced(), X(2, 8))
    assert plan.traced
    assert [(each.layers, each.nonnegative) for each in plan.sites] == [
        (("layers.2",), True),
        (("layers.4",), True),
    ]


def test_layers_that_forward_makes_are_not_traced():
    with pytest.raises(CaptureError, match="module is not installed as a submodule"):
        capture(Net(lambda self, x: nn.Linear(4, 4)(self.a(x)), a=nn.Linear(4, 4)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))


def doubled(forward):
    return lambda x: 2 * forward(x)


@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
@pytest.mark.parametrize("form", ["graph", "module"])
@pytest.mark.parametrize(
    "wrapped", [doubled, partial(torch.compile, backend="eager")], ids=["closure", "compile"]
)
def test_what_wraps_the_forward_of_a_part_calls_the_part_of_the_result(wrapped, form):
    block, listed = Block(), []
    block.forward = wrapped(block.forward)
    block.functions = [lambda x: (block.a(x), listed)[0]]
    listed.append(block)
    model, x = nn.Sequential(nn.Linear(8, 32), block, nn.Linear(32, 4)), torch.rand(2, 8)
    torch.testing.assert_close(
        lean_fx.leanify(model, x, min_channels=10**9, form=form)(x), model(x)
    )
    lean = lean_fx.leanify(model, x, form=form)
    lean(x).sum().backward()
    assert all(parameter.grad is not None for parameter in lean.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    if form == "module":
        (function,) = lean.get_submodule("1").functions
        cells = {type(each.cell_contents): each.cell_contents for each in function.__closure__}
        assert cells[Block] is cells[list][0] is lean.get_submodule("1")
    assert listed == [block]


class Child(nn.Module):
    def __init__(self, parent):
        super().__init__()
        self.a, self.parent = nn.Linear(32, 32), weakref.ref(parent)

    def forward(self, x):
        return self.a(x) + self.parent().side(x)


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.side, self.head = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        self.child = Child(self)

    def forward(self, x):
        return self.head(self.child(self.stem(x)))


@pytest.mark.parametrize("form", ["graph", "module"])
def test_a_weak_reference_to_the_parent_is_to_the_parent_in_the_result(form):
    model, x = Parent(), torch.rand(2, 8)
    lean = lean_fx.leanify(model, x, form=form)
    lean(x).sum().backward()
    assert all(parameter.grad is not None for parameter in lean.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@torch.compile(fullgraph=True, backend="eager")
def gated(x, weight):
    return torch.relu(x) * weight.sigmoid()


def helper(x, weight):
    return gated(x, weight)


def either(x, weight):
    return torch.cond(x.sum() > 0, lambda y: 2 * y, lambda y: 3 * y, (x * weight,))


@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
@pytest.mark.parametrize("form", ["graph", "module"])
@pytest.mark.parametrize("between", [helper, either])
def test_compiled_functions_run_as_written_while_a_model_is_planned(between, form):
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)
            self.weight = nn.Parameter(torch.rand(32))

        def forward(self, x):
            return self.b(between(self.a(x), self.weight))

    model, x = Between(), torch.rand(2, 8)
    lean = lean_fx.leanify(model, x, form=form)
    assert [site.layers for site in lean_fx.plan_of(lean).sites] == [("b",)]
    assert lean(x).shape == model(x).shape == (2, 4)


class Activated(nn.Module):
    """Branches on numbers, with an activation that its parent calls too, by another name."""

    def __init__(self, act):
        super().__init__()
        self.linear, self.act = nn.Linear(32, 32), act

    def forward(self, x):
        return self.act(self.linear(x)) if x.isfinite().all() else x


class SharedActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act = nn.Linear(8, 32), nn.ReLU()
        self.part = Activated(self.act)
        self.last = nn.Linear(32, 32)

    def forward(self, x):
        return self.last(self.act(self.part(self.first(x))))


@pytest.mark.parametrize("form", ["graph", "module"])
def test_a_module_called_by_one_name_may_be_in_a_leaf_by_another(form):
    model, x = SharedActivation(), X(2, 8)
    torch.testing.assert_close(capture(model, (x,))(x), model(x))
    plan = lean_fx.plan(model, x, channels=4, form=form)
    assert {name for site in plan.sites for name in site.layers} == {"part.linear", "last"}
    assert plan.apply(model, x)(x).shape == (2, 32)
