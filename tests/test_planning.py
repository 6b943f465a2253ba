import dataclasses
import functools
import json

import pytest
import torch
from torch import nn

import lean_fx
from graphs import CHANGED, UNCHANGED, Flattened, Residual, graph_text
from lean_fx.errors import PlanError
from lean_fx.reduction.controls import SliceReduction


@pytest.mark.parametrize("model", CHANGED | UNCHANGED)
def test_json_round_trip(model):
    make, shape = (CHANGED | UNCHANGED)[model]
    plan = lean_fx.plan(make(), torch.rand(shape))
    again = lean_fx.Plan.from_json(plan.to_json())
    assert again == plan
    assert str(again) == str(plan)


def test_a_plan_and_a_state_are_enough_to_rebuild_a_model():
    lean = lean_fx.leanify(Residual(), channels=8)
    text, state = lean.meta["lean_fx.plan"].to_json(), lean.state_dict()
    again = lean_fx.Plan.from_json(text).apply(Residual())
    again.load_state_dict(state)
    inputs = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(again(inputs), lean(inputs), rtol=0, atol=0)
    assert graph_text(again) == graph_text(lean)


def test_apply_leaves_the_model_and_the_plan_as_they_were():
    model = Residual()
    plan = lean_fx.plan(model)
    text, graph = plan.to_json(), str(model)
    plan.apply(model)
    assert (plan.to_json(), str(model)) == (text, graph)


def test_a_reduction_without_a_name_has_no_json():
    class Own(nn.Identity):
        pass

    plan = lean_fx.plan(Flattened(), reduction=Own)
    with pytest.raises(PlanError) as caught:
        plan.to_json()
    assert str(caught.value) == (
        "plan: the reduction Own has no registered name; give it one with "
        "lean_fx.register_reduction('my_name', factory)"
    )


def edited(change):
    content = json.loads(lean_fx.plan(Residual()).to_json())
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize("form", ["graph", "module"])
def test_the_plan_in_a_result_has_the_signs_of_the_result(form):
    def net(activation):
        return nn.Sequential(nn.Linear(8, 32), activation(), nn.Linear(32, 4))

    x = torch.rand(2, 8)
    plan = lean_fx.plan(net(nn.ReLU), x, form=form)
    lean = plan.apply(net(nn.Tanh), x)
    (site,) = lean_fx.plan_of(lean).sites
    (module,) = (each for each in lean.modules() if isinstance(each, lean_fx.LeanReduction))
    assert (site.nonnegative, site.macs) == (False, module.macs_per_position)
    assert lean_fx.plan_of(plan.apply(net(nn.ReLU), x)) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "plan: the text is not a plan in JSON ("),
        ("[1]", "plan: the text is not a plan in JSON ("),
        ("{}", "plan: the text is not a plan in JSON ('format'); give Plan.to_json()"),
        (edited(lambda c: c.update(version=99)), "plan: format 'lean_fx.plan' version 99 is not"),
        (edited(lambda c: c.pop("sites")), "plan: a part is missing or wrong ('sites')"),
        (edited(lambda c: c.update(more=1)), "plan: a part is missing or wrong ("),
        (edited(lambda c: c["sites"][0].pop("dim")), "plan: a part is missing or wrong ("),
        (edited(lambda c: c.update(parameters="abc")), "plan: a part is missing or wrong (param"),
        (edited(lambda c: c.update(model=5)), "plan: a part is missing or wrong (model=5"),
        (
            edited(lambda c: c["sites"][0].update(note=5)),
            "plan: a part is missing or wrong (note",
        ),
        (
            edited(lambda c: c["sites"][0].update(consumers=[])),
            "plan: a part is missing or wrong (",
        ),
        (edited(lambda c: c["sites"][0].update(out_channels=None)), "plan: a part is missing or "),
        (
            edited(lambda c: c["sites"][0].update(dim=10**9)),
            "plan: a part is missing or wrong (site 'relu' has dim=1000000000, which no tensor",
        ),
        (
            edited(lambda c: c["sites"][0].update(rms=10**400)),
            "plan: a part is missing or wrong (site 'relu' has rms=1000",
        ),
        (
            edited(lambda c: c["sites"][0].update(rms=float("inf"))),
            "plan: a part is missing or wrong (site 'relu' has rms=inf, which no value has)",
        ),
        (
            edited(lambda c: c.update(sites=c["sites"] * 2)),
            "plan: layer 'left' is at two sites; leave one out",
        ),
    ],
)
def test_texts_that_are_no_plan(text, message):
    with pytest.raises(PlanError) as caught:
        lean_fx.Plan.from_json(text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_plan_with_an_unknown_reduction():
    for name in ("other", 3):
        with pytest.raises(PlanError) as caught:
            lean_fx.Plan.from_json(edited(lambda c, name=name: c.update(reduction=name)))
        assert str(caught.value) == (
            f"plan: the reduction {name!r} is not registered; call "
            f"lean_fx.register_reduction({name!r}, factory) first"
        )


def test_a_plan_of_a_partial_factory():
    factory = functools.partial(lean_fx.LeanReduction, scale="mean")
    plan = lean_fx.plan(Residual(), channels=8, reduction=factory)
    assert " (LeanReduction) before " in str(plan)
    with pytest.raises(PlanError, match="^plan: the reduction LeanReduction has no registered nam"):
        plan.to_json()


def test_the_name_of_another_reduction_is_not_written():
    def lean(in_channels, out_channels, dim=1):
        return SliceReduction(in_channels, out_channels, dim)

    plan = lean_fx.plan(Residual(), channels=8, reduction=lean)
    with pytest.raises(PlanError, match="^plan: the reduction lean has no registered name; give"):
        plan.to_json()


def test_a_plan_whose_linear_layer_reads_packed_sequences():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    made = lean_fx.plan(model)
    hostile = dataclasses.replace(made, sites=(dataclasses.replace(made.sites[0], packed=True),))
    with pytest.raises(PlanError, match="^plan: layer '2' cannot read packed sequences; make the"):
        hostile.apply(model)
