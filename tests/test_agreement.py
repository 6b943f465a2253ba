"""A captured model runs beside its model on the example inputs, and what differs stays whole."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import lean_fx
from lean_fx.capture.agreement import disagreement
from lean_fx.capture.capturing import capture
from lean_fx.capture.side_effects import keeping_rng_state
from lean_fx.errors import CaptureError

X = torch.rand(2, 32)


class Net(nn.Module):
    """Two layers, and what a function makes of the first one's values."""

    def __init__(self, between=lambda h: h):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(32, 32), nn.Linear(32, 4), between

    def forward(self, x):
        return self.b(torch.relu(self.between(self.a(x))))


def by_text(h):
    return h * {"2": 3.0}.get(f"{h.shape[0]}", 11.0)


def by_text_of_a_dtype(h):
    return h * 3 if "float32" in f"{h.dtype}" else h


def by_identity(h):
    return h * 3 if h.device == torch.device("cpu") and f"{h.device}" == "cpu" else h


UNSEEN = [by_text, by_text_of_a_dtype, by_identity]


@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
@pytest.mark.parametrize("between", UNSEEN)
def test_a_part_that_differs_is_whole(between):
    model = nn.Sequential(nn.Linear(32, 32), Net(), nn.Linear(4, 32), nn.ReLU(), Net(between))
    captured = capture(model, (X,))
    torch.testing.assert_close(captured(X), model(X))
    assert isinstance(captured.get_submodule("4"), Net)
    lean = lean_fx.leanify(Net(between), X)
    assert isinstance(lean, Net)


@pytest.mark.parametrize("between", UNSEEN)
def test_a_model_that_differs_itself_is_refused(between):
    with pytest.raises(CaptureError, match="^Net: a graph would not do what it does"):
        capture(Net(between), (X,))


def test_the_random_numbers_of_gpus_are_put_back_too(monkeypatch):
    put_back = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: ["state"])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", put_back.append)
    with keeping_rng_state():
        assert put_back == []
    assert put_back == [["state"]]


def test_what_is_asked_leaves_no_trace():
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Dropout(0.5))
    graph = torch.fx.symbolic_trace(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate()
    x = X.clone()
    assert disagreement(model, graph, (x,)) == ""
    torch.testing.assert_close(dict(model.state_dict()), before)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert torch.equal(x, X)


def by_torch(self):
    return torch.rand(()) < 0.5


def by_python(self):
    return random.random() < 0.5


def by_numpy(self):
    return np.random.rand() < 0.5


@pytest.mark.parametrize("chance", [by_torch, by_python, by_numpy])
@pytest.mark.parametrize("form", ["graph", "module"])
@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
def test_a_plan_moves_no_generator_whatever_forward_draws(chance, form):
    class Draws(Net):
        def forward(self, x):
            h = self.a(x)
            return self.b(h.relu() if chance(self) else h)

    model = Draws()

    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1:3]

    before = states()
    lean_fx.plan(model, X, form=form)
    np.testing.assert_equal(states(), before)


class Fixed(nn.Module):
    """Gives something, whatever comes."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


ONE = torch.ones(2)
ANSWERS = [
    (ONE, ONE, ""),
    (ONE, ONE + 1e-6, ""),
    (ONE * torch.nan, ONE * torch.nan, ""),
    (ONE, ONE.double(), "its outputs differ"),
    (ONE, ONE[:1], "its outputs differ"),
    (ONE, [ONE], "its outputs differ"),
    ({"a": ONE}, {"b": ONE}, "its outputs differ"),
    ((ONE, 1), (ONE, 2), "its outputs differ"),
    (ONE > 0, ONE > 1, "its outputs differ"),
    (ONE, ValueError("no"), "it fails with ValueError"),
    (ValueError("no"), ONE, ""),
]


@pytest.mark.parametrize(("one", "other", "text"), ANSWERS)
def test_what_counts_as_the_same(one, other, text):
    assert disagreement(Fixed(one), Fixed(other), (X,)) == text
