"""State that a forward keeps in other things than attributes, lists and dicts."""

import dataclasses
import itertools
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import lean_fx
from lean_fx.graph.reachable import Reachable

X = torch.rand(2, 32)
STEP = torch.zeros(())
GENERATOR = torch.Generator()


class Net(nn.Module):
    """Two layers; what is between scales by something that its owner holds."""

    def __init__(self, scale, held=None):
        super().__init__()
        self.a, self.b, self.scale, self.held = nn.Linear(32, 32), nn.Linear(32, 4), scale, held

    def forward(self, x):
        h = self.a(x)
        return self.b(torch.relu(h * self.scale(self, h)))


@dataclasses.dataclass(slots=True)
class Slots:
    step: int = 0


class Ramp:
    """Counts its calls."""

    count = 0

    def __call__(self):
        self.count += 1
        return self.count


def slots(self, _):
    self.held.step += 1
    return self.held.step


def array(self, _):
    self.held[0] += 1
    return float(self.held[0])


def counted(*_):
    counted.calls = getattr(counted, "calls", 0) + 1
    return counted.calls


def average(self, h):
    self.held.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
    return self.held


def tensor(self, _):
    self.held += 1
    return self.held


def global_tensor(*_):
    STEP.add_(1)
    return STEP


def global_generator(*_):
    return torch.rand((), generator=GENERATOR)


KINDS = {
    "slots": lambda: Net(slots, Slots()),
    "callable": lambda: Net(lambda self, _: self.held(), Ramp()),
    "iterator": lambda: Net(lambda self, _: next(self.held), itertools.count(1)),
    "array": lambda: Net(array, np.zeros(1)),
    "function": lambda: Net(counted),
    "Random": lambda: Net(lambda self, _: self.held.random(), random.Random(0)),
    "numpy": lambda: Net(lambda self, _: float(self.held.random()), np.random.default_rng(0)),
    "RandomState": lambda: Net(lambda self, _: self.held.rand(), np.random.RandomState(0)),
    "Generator": lambda: Net(global_generator),
    "tensor": lambda: Net(tensor, torch.zeros(())),
    "average": lambda: Net(average, torch.zeros(32)),
    "global tensor": lambda: Net(global_tensor),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_lives_on(kind, nested):
    def start():
        STEP.zero_()
        GENERATOR.manual_seed(0)
        vars(counted).clear()

    start()
    model = nn.Sequential(nn.Linear(32, 32), KINDS[kind]()) if nested else KINDS[kind]()
    before = GENERATOR.get_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lean_fx.LeanWarning)
        lean = lean_fx.leanify(model, X, min_channels=10**9)
    assert (STEP.item(), vars(counted)) == (0, {})
    assert torch.equal(GENERATOR.get_state(), before)
    results = []
    for each in (model, lean):
        start()
        results.append([each(X) for _ in range(3)])
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)
    assert not torch.equal(*results[0][:2])


class Biased(nn.Module):
    """As LeViT: in evaluation it keeps what follows from its parameters."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 4)
        self.bias, self.cache = nn.Parameter(torch.rand(32)), {}

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x):
        if self.training:
            return self.b(self.a(x) + 2 * self.bias)
        if x.device not in self.cache:
            self.cache[x.device] = 2 * self.bias
        return self.b(self.a(x) + self.cache[x.device])


@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
@pytest.mark.parametrize("nested", [True, False])
def test_a_model_that_was_run_is_as_good_as_a_fresh_one(nested):
    model = nn.Sequential(nn.Linear(32, 32), Biased()) if nested else Biased()
    wanted = model.eval()(X)
    lean = lean_fx.leanify(model, X, min_channels=10**9)
    torch.testing.assert_close(lean(X), wanted)
    for mode in (True, False):
        torch.testing.assert_close(lean.train(mode)(X), model.train(mode)(X))


def test_a_table_of_tables_is_data_and_what_is_held_after_it_is_state():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.table = nn.Linear(32, 4), [[float(i)] * 100 for i in range(100)]
            self.state = {"step": 0}

        def forward(self, x):
            self.state["step"] += 1
            return self.a(x) * self.table[1][2] + self.state["step"]

    model = Counts()
    assert len(Reachable.of(model).held) < 2000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lean_fx.LeanWarning)
        lean = lean_fx.leanify(model, X, min_channels=10**9)
    assert model.state == {"step": 0}
    for _ in range(3):
        torch.testing.assert_close(lean(X), model(X))
