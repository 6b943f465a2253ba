"""A plan names the same nodes in another process, and after an unrelated layer was added."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lean_fx
from lean_fx.errors import PlanError

X = torch.rand(3, 5, 8)
# What is skipped leaves one of the rewritings without a use; what reads its result stays reduced.
SKIPS = [(), ("gru.1",), ("attention.*",), ("projection",), ("gru.1", "attention.*", "projection")]


class Net(nn.Module):
    """A stack, attention and a parameter, each read by a layer; ``extra`` layers before them."""

    def __init__(self, extra=False):
        super().__init__()
        self.extra = nn.GRU(8, 8, 2, batch_first=True) if extra else None
        self.mixed = nn.MultiheadAttention(8, 2, batch_first=True) if extra else None
        self.stem = nn.Linear(8, 32)
        self.gru = nn.GRU(32, 32, 2, batch_first=True)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.projection = nn.Parameter(torch.rand(32, 48))
        self.shift = nn.Parameter(torch.rand(48))
        self.head = nn.Linear(48, 2)

    def forward(self, x):
        if self.extra is not None:
            x = self.extra(x)[0]
            x = self.mixed(x, x, x)[0]
        x = self.gru(F.relu(self.stem(x)))[0]
        x = self.attention(x, x, x)[0]
        return self.head(torch.addmm(self.shift, x.mean(1), self.projection))


@pytest.mark.parametrize("skip", SKIPS)
def test_a_plan_applies_after_an_unrelated_layer_was_added(skip):
    made = lean_fx.plan(Net(), X, skip=skip)
    assert "head" in {layer for site in made.sites for layer in site.layers}
    assert made.apply(Net(), X)(X).shape == (3, 2)
    larger = made.apply(Net(extra=True), X)
    assert larger(X).shape == (3, 2)
    again = lean_fx.plan(Net(extra=True), X, skip=(*skip, "extra*", "mixed*"))
    assert {s.layers for s in again.sites} == {s.layers for s in made.sites}
    assert (again.split_layers, again.weights) == (made.split_layers, made.weights)
    assert [s.value for s in again.sites] == [s.value for s in made.sites]


def test_leanify_and_apply_make_the_same_modules_in_the_same_order():
    torch.manual_seed(0)
    lean = lean_fx.leanify(Net(), X)
    applied = lean_fx.plan_of(lean).apply(Net(), X)
    shapes = [
        [(name, each.shape) for name, each in made.named_parameters()] for made in (lean, applied)
    ]
    assert shapes[0] == shapes[1]


def test_a_plan_applies_in_another_process():
    text = lean_fx.plan(Net(), X, skip=("gru.1",)).to_json()
    code = """
import sys, torch, lean_fx
from lean_fx import Plan
from test_stable_names import Net, X
made = Plan.from_json(sys.stdin.read())
print(made.apply(Net(), X)(X).shape)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], input=text, capture_output=True, text=True, cwd="tests"
    )
    assert run.stdout.strip() == "torch.Size([3, 2])", run.stderr


def test_a_plan_of_an_older_version_is_refused_by_name():
    text = lean_fx.plan(Net(), X).to_json().replace('"version": 4', '"version": 1')
    with pytest.raises(PlanError) as caught:
        lean_fx.Plan.from_json(text)
    assert str(caught.value) == (
        "plan: format 'lean_fx.plan' version 1 is not 'lean_fx.plan' version 4; make the plan anew"
    )


class Twice(nn.Module):
    """A layer that reads the model's input once, and its own result."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        return self.conv(torch.relu(self.conv(x)))


def test_a_layer_of_which_one_call_is_refused_is_left_alone_once():
    made = lean_fx.plan(Twice(), torch.rand(2, 16, 5, 5))
    assert made.sites == ()
    reason = (
        "called 2 times in one forward pass: reads the model's input, no intermediate value; "
        "reduce_inputs=True reduces it too"
    )
    assert [(each.layer, each.reason.text) for each in made.left_alone] == [("conv", reason)]


class Multiplied(nn.Module):
    """A parameter of too few channels, and a layer that reads what it gives."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(32, 8))
        self.layer = nn.Linear(32, 8)

    def forward(self, x):
        return self.layer(F.linear(x, self.weight))


@pytest.mark.parametrize("inputs", [X[:, 0], None])
def test_a_parameter_that_is_not_reduced_does_not_hide_its_reader(inputs):
    lean = lean_fx.leanify(Multiplied(), inputs)
    assert [site.layers for site in lean_fx.plan_of(lean).sites] == [("layer",)]
    assert lean(X[:, 0]).shape == (3, 8)
