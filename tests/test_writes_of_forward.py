"""What forward writes in place, it writes in the graph: to what it made, and through views."""

import operator

import pytest
import torch
from torch import nn

import lean_fx
from lean_fx.capture.capturing import capture

X = torch.rand(2, 32)

pytestmark = pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")


class Net(nn.Module):
    """Two layers, and what a function makes of the first one's values."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(32, 32), nn.Linear(32, 4), between

    def forward(self, x):
        return self.b(torch.relu(self.between(self.a(x))))


def accumulates(h):
    loss = torch.zeros(())
    loss += h.pow(2).mean()
    return h * loss


def accumulates_in_a_value(h):
    loss = torch.tensor(0.0)
    loss.add_(h.mean())
    return h + loss


def fills_a_tensor(h):
    filled = torch.zeros(2, 32)
    filled[:, 1:] = h[:, :-1]
    return filled * 2


def adds_to_a_view(h):
    h = h.clone()
    half = h[:, :16]
    half += 1
    return h


def adds_by_another_name(h):
    kept = h
    h += 1
    return h * kept


def adds_through_a_view_of_a_view(h):
    rows = h.clone().view(2, 4, 8)
    first = rows[:, 0]
    first *= 3
    first -= 1
    return rows.flatten(1)


def adds_to_an_attribute_that_is_a_view(h):
    h = h.clone()
    turned = h.T
    turned -= 1
    return h


def adds_to_a_list(h):
    parts = [h]
    both = parts
    parts += [2 * h]
    return sum(both)


def counts(h):
    size = h.shape[1]
    half = size
    half //= 2
    return h * half + size


WRITES = [accumulates, accumulates_in_a_value, fills_a_tensor, adds_to_a_view]
WRITES += [adds_by_another_name, adds_through_a_view_of_a_view, adds_to_a_list, counts]
WRITES += [adds_to_an_attribute_that_is_a_view]


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("between", WRITES)
def test_writes(between, given, nested):
    model = nn.Sequential(nn.Linear(32, 32), Net(between)) if nested else Net(between)
    try:
        lean = lean_fx.leanify(model, X if given else None, min_channels=10**9)
    except lean_fx.LeanError:
        assert not given
        return
    for x in (X, 3 * X, X):
        torch.testing.assert_close(lean(x.clone()), model(x.clone()))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 32)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.norm(self.a(x))
        y += x
        return self.b(self.relu(y))


def test_a_residual_sum_is_an_addition():
    graph = capture(nn.Sequential(Residual(), Residual()), (X,)).graph
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    assert called == [operator.add, operator.add]


def test_the_callers_input_is_written_too():
    class Writes(Residual):
        def forward(self, x):
            x += 1
            return self.b(self.a(x))

    model, x, y = Writes(), X.clone(), X.clone()
    lean = lean_fx.leanify(model, X, min_channels=10**9)
    torch.testing.assert_close(lean(x), model(y))
    torch.testing.assert_close(x, y)
    torch.testing.assert_close(x, X + 1)


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("form", ["graph", "module"])
def test_example_inputs_are_not_written(form, branches, tmp_path):
    class Writes(Residual):
        def forward(self, x):
            x += 1
            return self.b(self.a(x)) if branches and x.sum() > 0 else self.a(x)

    model, x = Writes(), X.clone()
    made = lean_fx.plan(model, x, form=form)
    lean_fx.leanify(model, x, form=form)
    made.apply(model, x)
    lean_fx.sensitivity(model, x)
    if not branches:
        lean_fx.costs_of(model, x)
        lean_fx.draw(model, tmp_path / "net.svg", x)
    torch.testing.assert_close(x, X, rtol=0, atol=0)
