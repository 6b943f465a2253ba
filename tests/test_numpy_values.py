"""Models whose forward reads values of NumPy, or objects that answer for any attribute."""

import enum

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import lean_fx
from lean_fx.capture.capturing import capture
from lean_fx.errors import CaptureError

X = torch.rand(2, 32)
ROOT, COUNT, FLAG = np.sqrt(2.0), np.int64(3), np.bool_(True)


class Way(enum.Enum):
    THERE, BACK = 1, 2


class AttrDict(dict):
    """Answers for every attribute, or raises a KeyError."""

    __getattr__ = dict.__getitem__


class Growing(dict):
    """Makes whatever attribute it is asked for."""

    def __getattr__(self, name):
        if name.startswith("__"):  # for copies
            raise AttributeError(name)
        return self.setdefault(name, Growing())


class Net(nn.Module):
    def __init__(self, scale, held=None):
        super().__init__()
        self.a, self.b, self.scale, self.held = nn.Linear(32, 32), nn.Linear(32, 4), scale, held

    def forward(self, x):
        return self.b(self.scale(self, torch.relu(self.a(x))))


@pytest.mark.parametrize(
    "scale",
    [
        lambda self, h: h * ROOT,
        lambda self, h: h / COUNT,
        lambda self, h: h * self.held,
        lambda self, h: h.sum(COUNT - 2, keepdim=bool(FLAG)) + h,
    ],
)
@pytest.mark.parametrize("inputs", [(), (X,)])
def test_scalars_are_constants_of_the_graph(scale, inputs):
    model = Net(scale, np.float32(0.3))
    captured = capture(model, inputs)
    torch.testing.assert_close(captured(X), model(X))
    assert isinstance(lean_fx.leanify(model, *inputs), GraphModule)


@pytest.mark.parametrize("form", ["graph", "module"])
def test_an_array_that_is_read_only_stays(form):
    held = np.broadcast_to(np.float32(2), (32,))
    lean = lean_fx.leanify(Net(lambda self, h: h * float(held[0])), X, form=form)
    assert lean(X).shape == (2, 4)


@pytest.mark.parametrize("value", [np.float64(9.0), Way.BACK, frozenset((1,))])
def test_another_constant_is_refused(value):
    def scale(self, h):
        known = self.held
        return h * 2 if known is not None else h

    lean = lean_fx.leanify(
        Net(scale, type(value)(value) if value is not Way.BACK else Way.THERE), X
    )
    lean.held = lean.held
    other = frozenset((2,)) if isinstance(value, frozenset) else value
    if isinstance(value, np.float64):
        other = np.float64(1.0)
    with pytest.raises(CaptureError, match="^held was .* when the model was captured"):
        lean.held = other


def test_objects_that_answer_for_any_attribute():
    config, held = AttrDict(scale=2.0), Growing(scale=2.0)
    for scale in (lambda self, h: h * config.scale, lambda self, h: h * self.held.scale):
        lean = lean_fx.leanify(Net(scale, held), X)
        assert lean(X).shape == (2, 4)
    assert held == {"scale": 2.0}
