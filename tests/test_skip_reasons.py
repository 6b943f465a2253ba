"""A reason has a code that programs may rely on, and every refusal has a reason."""

import json
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import lean_fx
from graphs import Net
from lean_fx.errors import PlanError
from lean_fx.planning.plans import Plan
from lean_fx.skip_reason import LeftAlone, SkipCode, SkipReason

X = torch.rand(2, 32)


def stack(*layers: nn.Module) -> nn.Module:
    """The layers behind a first one, which makes what they read an intermediate value."""
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), *layers)


def net(forward, **parts) -> nn.Module:
    """A module with a first layer, these parts and this forward, which gets the first's output."""
    return Net(lambda self, x: forward(self, self.first(x)), first=nn.Linear(32, 32), **parts)


class Masked(nn.Linear):
    def forward(self, x):
        return super().forward(x) * x.var(1, keepdim=True)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def hooked() -> nn.Module:
    layer = nn.Linear(32, 4)
    layer.register_forward_hook(lambda *_: None)
    return layer


def with_parametrization() -> nn.Module:
    layer = nn.Linear(32, 4)
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


class Tagged(nn.Parameter):
    """A parameter that knows more than its numbers."""


def tagged() -> nn.Module:
    layer = nn.Linear(32, 4)
    layer.weight = Tagged(layer.weight.detach())
    return layer


def frozen() -> nn.Module:
    return nn.Linear(32, 4).requires_grad_(False)


def tied() -> nn.Module:
    layer, other = nn.Linear(32, 32), nn.Linear(32, 32)
    other.weight = layer.weight
    return stack(layer, other)


CASES = {
    "unsupported_layer": lambda: stack(Masked(32, 4)),
    "quantized": lambda: stack(torch.ao.nn.quantized.dynamic.Linear(32, 4)),
    "hooks": lambda: stack(hooked()),
    "parametrized": lambda: stack(with_parametrization()),
    "weight_type": lambda: stack(tagged()),
    "frozen": lambda: stack(frozen()),
    "shared_parameter": tied,
    "nothing_to_reduce": lambda: stack(
        nn.Unflatten(1, (32, 1, 1)), nn.Conv2d(32, 32, 1, groups=32)
    ),
    "already_reduced": lambda: lean_fx.leanify(stack(nn.Linear(32, 4)), X),
    "no_graph_value": lambda: net(
        lambda self, x: x[:, :4] + F.linear(self.seed, self.table),
        table=nn.Parameter(torch.rand(4, 32)),
        seed=nn.Buffer(torch.rand(32)),
    ),
    "repeated_call": lambda: net(
        lambda self, x: self.second(self.second(x).unflatten(1, (8, 4)).flatten(1)),
        second=nn.Linear(32, 32),
    ),
    "model_input": lambda: nn.Sequential(nn.Linear(32, 4)),
    "not_called": lambda: net(lambda self, x: x, second=nn.Linear(32, 4)),
    "weight_read_in_forward": lambda: net(
        lambda self, x: x + self.second.weight.sum(), second=nn.Linear(32, 4)
    ),
    "weight_computed": lambda: net(
        lambda self, x: F.linear(x, 2 * self.table), table=nn.Parameter(torch.rand(4, 32))
    ),
    "unsupported_product": lambda: net(
        lambda self, x: torch.mv(x, self.table), table=nn.Parameter(torch.rand(32))
    ),
}
OPTIONS = {
    "skip": {"skip": "2"},
    "filter_fn": {"filter_fn": lambda module, name: False},
    "channels": {"channels": {"0": 4}},
    "min_channels": {"min_channels": 64},
    "nothing_to_reduce": {"channels": 32},
}


def codes(model: nn.Module, **options) -> set[str]:
    return {each.reason.code for each in lean_fx.plan(model, X, **options).left_alone}


@pytest.mark.parametrize("code", CASES)
def test_the_code_of_a_refusal(code):
    assert code in codes(CASES[code]())


@pytest.mark.parametrize("code", OPTIONS)
def test_the_code_of_what_an_option_rules_out(code):
    options = OPTIONS[code]
    if code == "channels":
        options = {**options, "reduce_inputs": True}
    assert code in codes(stack(nn.Linear(32, 4)), **options)


def test_a_reason_survives_json():
    made = lean_fx.plan(stack(nn.Linear(32, 4)), X)
    again = Plan.from_json(made.to_json())
    assert again.left_alone == made.left_alone
    assert isinstance(again.left_alone[0], LeftAlone)
    assert again.left_alone[0].reason == SkipReason(
        "model_input",
        "reads the model's input, no intermediate value; reduce_inputs=True reduces it too",
    )


@pytest.mark.parametrize("reason", ["in words", {"code": "mood", "text": "?"}, {"code": "keep"}])
def test_json_with_another_kind_of_reason_is_refused(reason):
    content = json.loads(lean_fx.plan(stack(nn.Linear(32, 4)), X).to_json())
    content["left_alone"][0]["reason"] = reason
    with pytest.raises(PlanError, match="a part is missing or wrong"):
        Plan.from_json(json.dumps(content))


def test_codes_are_unique_words():
    assert len(set(get_args(SkipCode))) == len(get_args(SkipCode))
    assert all(code.replace("_", "").isalpha() for code in get_args(SkipCode))
