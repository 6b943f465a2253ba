"""What forward writes in place, it writes in the graph: to what it made, and through views."""

import pytest
import torch
from torch import nn

import lean_fx

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


WRITES = [accumulates, accumulates_in_a_value, fills_a_tensor]


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
        torch.testing.assert_close(lean(x), model(x))
