"""Models whose forward reads values of NumPy, or objects that answer for any attribute."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import lean_fx
from lean_fx.capture.capturing import capture

X = torch.rand(2, 32)
ROOT, COUNT, FLAG = np.sqrt(2.0), np.int64(3), np.bool_(True)


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


def test_objects_that_answer_for_any_attribute():
    config, held = AttrDict(scale=2.0), Growing(scale=2.0)
    for scale in (lambda self, h: h * config.scale, lambda self, h: h * self.held.scale):
        lean = lean_fx.leanify(Net(scale, held), X)
        assert lean(X).shape == (2, 4)
    assert held == {"scale": 2.0}
