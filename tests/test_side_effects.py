"""What forward does beyond calls on values stays what it is in a reduced model."""

import collections
import copy
import functools
import random
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule

import lean_fx
from lean_fx.capture.capturing import capture
from lean_fx.errors import CaptureError, LeanWarning

X = torch.rand(4, 8)


class Reversed(torch.autograd.Function):
    """Turns gradients around."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -3 * gradient


reverse = Reversed.apply


class Net(nn.Module):
    """Two layers, and what a function does between them."""

    def __init__(self, between):
        super().__init__()
        self.between = between
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)
        self.register_buffer("mean", torch.zeros(32))
        self.steps, self.state = 0, torch.zeros(32)

    def forward(self, x):
        return self.b(F.relu(self.between(self, x)))


def without_gradient(self, x):
    with torch.no_grad():
        return self.a(x)


def with_a_gradient_of_its_own(self, x):
    return Reversed.apply(self.a(x))


def with_a_gradient_by_another_name(self, x):
    return reverse(self.a(x)[: x.shape[0]])


def with_autocast(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = self.a(x)
    return y.float()


def with_noise(self, x):
    return self.a(x) + torch.normal(0.0, torch.ones(32)) if self.training else self.a(x)


def with_chance_of_python(self, x):
    return self.a(x) * (random.random() if self.training else 1.0)


def with_chance_of_numpy(self, x):
    return self.a(x) * (float(np.random.rand()) if self.training else 1.0)


def assigning_a_buffer(self, x):
    y = self.a(x)
    self.mean = 0.9 * self.mean + 0.1 * y.mean(0).detach()
    return y - self.mean


def writing_a_buffer(self, x):
    y = self.a(x)
    with torch.no_grad():
        self.mean.mul_(0.9).add_(y.mean(0), alpha=0.1)
    return y - self.mean


def assigning_data(self, x):
    y = self.a(x)
    self.mean.data = 0.9 * self.mean.data + 0.1 * y.mean(0).data
    return y - self.mean


def assigning_a_tensor(self, x):
    y = self.a(x) + self.state
    self.state = 0.5 * self.state + y.mean(0).detach()
    return y


def counting(self, x):
    self.steps += 1
    return self.a(x) * self.steps


UNRECORDED = [
    *(without_gradient, with_a_gradient_of_its_own, with_a_gradient_by_another_name),
    *(with_autocast, with_noise, with_chance_of_python, with_chance_of_numpy),
    *(assigning_a_buffer, assigning_data, writing_a_buffer, assigning_a_tensor, counting),
]


def steps_of(model, count=3):
    """Outputs, gradients and buffers of some steps of training, by name, all by the same chance."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = copy.deepcopy(model).train()
    seen = {}
    for step in range(count):
        model.zero_grad()
        seen[step, "output"] = model(X)
        seen[step, "output"].square().sum().backward()
        seen |= {(step, name): each.clone() for name, each in model.named_buffers()}
        seen |= {(step, name): each.grad for name, each in model.named_parameters()}
    return seen


@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("between", UNRECORDED)
def test_training_is_that_of_the_model(between, nested):
    model = Net(between)
    if nested:
        model = nn.Sequential(nn.Linear(8, 8), model, nn.Linear(4, 32), nn.Linear(32, 2))
    lean = lean_fx.leanify(model, X, min_channels=64)  # nothing to reduce
    found, wanted = steps_of(lean), steps_of(model)
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key])
    made = lean_fx.plan(model, X)
    layers = {layer for site in made.sites for layer in site.layers}
    assert layers == ({"1.b", "3"} if nested else {"b"})


@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
@pytest.mark.parametrize("nested", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("between", UNRECORDED)
def test_a_model_in_evaluation_is_trained_as_it_would_be(between, nested):
    def in_training(self, x):
        return between(self, x) if self.training else self.a(x)

    model = Net(in_training)
    if nested:
        model = nn.Sequential(nn.Linear(8, 8), model, nn.Linear(4, 32), nn.Linear(32, 2))
    model.eval()
    lean = lean_fx.leanify(model, X, min_channels=64)
    found, wanted = steps_of(lean), steps_of(model)
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key])
    torch.testing.assert_close(lean.eval()(X), model(X))


def test_what_forward_makes_once_is_traced():
    def keeping(self, x):
        if self.made is None:
            self.made = torch.ones(32)
        return self.a(x) * self.made

    model = Net(keeping)
    model.made = None
    lean = lean_fx.leanify(model)
    assert isinstance(lean, GraphModule)
    assert lean(X).shape == (4, 4)


@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
@pytest.mark.parametrize("before", ["None", "absent"])
@pytest.mark.parametrize("stored", [lambda y: y.pow(2).mean(), lambda y: {"loss": y.mean()}])
def test_what_forward_stores_for_a_trainer_is_there(stored, before):
    def storing(self, x):
        y = self.a(x)
        self.aux = stored(y)
        return y

    part = Net(storing)
    if before == "None":
        part.aux = None
    model = nn.Sequential(nn.Linear(8, 8), part)
    lean = lean_fx.leanify(model, X, min_channels=10**9)
    lean(X)
    model(X)
    torch.testing.assert_close(lean.get_submodule("1").aux, model[1].aux)


@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
def test_a_size_that_forward_stores_is_no_state():
    def measuring(self, x):
        self.count, self.step = x.nelement(), x.stride(0)
        return self.a(x)

    assert isinstance(lean_fx.leanify(Net(measuring), X, min_channels=10**9), GraphModule)


def test_a_cache_within_what_cannot_be_traced_holds_values():
    def caching(self, x):
        if self.made is None:
            self.made = x.new_ones(32)
        return self.a(x) * self.made

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Net(caching)
            self.inner.made = None

        def forward(self, x):
            x = self.inner(x)
            return x if x.sum() > 0 else -x

    model = nn.Sequential(nn.Linear(8, 8), Branching(), nn.Linear(4, 32), nn.Linear(32, 2))
    lean = lean_fx.leanify(model, X, min_channels=32)
    assert {layer for site in lean.meta["lean_fx.plan"].sites for layer in site.layers} == {
        "1.inner.b",
        "3",
    }
    assert lean(X).shape == (4, 2)


@pytest.mark.parametrize("between", UNRECORDED)
def test_without_inputs_it_is_refused_by_name(between):
    with pytest.raises(
        CaptureError, match=r"Net: torch.fx cannot trace its forward \(SideEffect: "
    ):
        capture(Net(between))


def test_noise_is_a_value_where_inputs_are_given():
    model = Net(lambda self, x: self.a(x) + torch.randn(32))
    captured = capture(model, (X,))
    assert not torch.equal(captured(X), captured(X))


def test_what_has_no_gradient_needs_none():
    def masked(self, x):
        with torch.no_grad():
            mask = (x > 0.5).float()
        return self.a(x * mask)

    model = Net(masked)
    captured = capture(model)
    torch.testing.assert_close(captured(X), model(X))


@pytest.mark.parametrize("name", ["size", "long", "shape"])
def test_a_module_may_have_the_name_of_what_a_tensor_tells(name):
    def without_gradient_behind_it(self, x):
        y = self.get_submodule(name)(self.a(x))
        with torch.no_grad():
            return 2 * y

    def written_to(self, x):
        y = z = self.get_submodule(name)(x)
        y += 1
        return y * z

    refused, taken = Net(without_gradient_behind_it), Net(written_to)
    refused.add_module(name, nn.ReLU())
    taken.add_module(name, nn.Linear(8, 32))
    with pytest.raises(CaptureError, match="mul is computed without a gradient"):
        capture(refused)
    torch.testing.assert_close(capture(taken)(X), taken(X))


class Frozen(Net):
    """Its norm stays in evaluation when it is trained."""

    def __init__(self):
        super().__init__(lambda self, x: self.norm(self.a(x)))
        self.norm = nn.BatchNorm1d(32)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
@pytest.mark.parametrize("nested", [False, True])
def test_a_train_of_its_own_is_kept(nested):
    model = nn.Sequential(Frozen(), nn.ReLU(), nn.Linear(4, 2)) if nested else Frozen()
    lean = lean_fx.leanify(model, X)
    frozen = "0." if nested else ""
    assert lean.train().get_submodule(f"{frozen}a").training
    assert not lean.get_submodule(f"{frozen}norm").training
    assert lean.get_submodule(f"{frozen}b").in_features == 4
    assert type(capture(Frozen(), (X,), purpose="evaluation")(X)) is torch.Tensor


def test_a_train_of_its_own_needs_inputs():
    with pytest.raises(CaptureError, match="Frozen has a train of its own, which a graph has not"):
        lean_fx.plan(Frozen())


@functools.lru_cache
def positions(length):
    """A table that is made once for each length."""
    return torch.arange(length).float()


@pytest.mark.parametrize("count", [lambda x: int(x.shape[1]), lambda x: x.shape[1]])
def test_caches_of_the_models_code_hold_no_proxies(count):
    model = Net(lambda self, x: self.a(x + positions(count(x))))
    positions.cache_clear()
    captured = capture(model, (X,))
    assert type(positions(8)) is torch.Tensor
    torch.testing.assert_close(captured(X), model(X))
    assert positions.cache_info().currsize == 1


class Tapped(Net):
    """Adds what a hook on its first layer has stored."""

    def __init__(self, register):
        super().__init__(lambda self, x: self.a(x))
        self.taken = {}
        register(self)

    def forward(self, x):
        return super().forward(x) + sum(each.mean() for each in (self.taken | TAKEN).values())


TAKEN = {}


def by_method(net):
    net.store = types.MethodType(lambda self, m, args, out: self.taken.update(a=out.detach()), net)
    net.a.register_forward_hook(net.store)


def by_partial(net):
    def store(taken, m, args, out):
        taken["a"] = out.detach()

    net.a.register_forward_hook(functools.partial(store, net.taken))


def by_global(net):
    net.a.register_forward_hook(lambda m, args, out: TAKEN.update(a=out.detach()))


@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("register", [by_method, by_partial, by_global])
def test_what_a_hook_stores_is_read_at_every_call(register, nested):
    TAKEN.clear()
    model = Tapped(register)
    model = nn.Sequential(nn.Linear(8, 8), model) if nested else model
    model(X)
    lean = lean_fx.leanify(model, X, min_channels=10**9)
    torch.testing.assert_close(lean(3 * X), model(3 * X))


def doubling(function):
    @functools.wraps(function)
    def wrapper(self, *args):
        return 2 * function(self, *args)

    return wrapper


class Wrapped(nn.Module):
    """Has a forward whose two wrappers have one name, and so have their variables."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)

    @doubling
    @doubling
    def forward(self, x):
        return self.b(self.a(x).relu())


@pytest.mark.parametrize("form", ["graph", "module"])
def test_wrappers_of_one_name_are_not_mixed_up(form):
    model = Wrapped()
    expected = model(X)
    with pytest.warns(LeanWarning, match="has no layer to reduce"):
        unreduced = lean_fx.leanify(model, X, min_channels=10**9, form=form)
    assert torch.equal(unreduced(X), expected)
    assert torch.equal(model(X), expected)


class Making(collections.OrderedDict):
    """Gives an instance of each class that it holds, as the activations of transformers."""

    def __getitem__(self, name):
        return super().__getitem__(name)()


MADE = Making(relu=nn.ReLU)


class Chosen(nn.Module):
    """Makes its activation in forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.b(MADE["relu"](self.a(x)))


@pytest.mark.parametrize("form", ["graph", "module"])
@pytest.mark.filterwarnings("ignore:.*each layer reduces its own input")
def test_a_dict_that_makes_what_it_gives_stays_as_it_is(form):
    model = Chosen()
    expected = model(X)
    lean = lean_fx.leanify(model, X, form=form)
    assert [each.layers for each in lean_fx.plan_of(lean).sites] == [("b",)]
    assert dict.items(MADE) == {"relu": nn.ReLU}.items()
    assert torch.equal(model(X), expected)
