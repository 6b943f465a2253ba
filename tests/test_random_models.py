"""What leanify promises, on random models (``random_models.py``).

The reduced model is compared with an oracle. With ``reduction="slice"`` a layer reads the first C'
of its C_in channels. The original model does the same if its weights are those of the reduced one,
with zeros for the channels that the slice drops. So one model checks the other, whatever was
rewritten on the way.
"""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

import lean_fx
from lean_fx.errors import LeanWarning
from lean_fx.planning.plans import Plan
from random_models import Branching, random_model

FEW, MANY = range(16), range(16, 2016)


def channels_of(site):
    """Half of the channels, so that most layers can be reduced."""
    return 0.5


def reduced(seed, reduction="slice"):
    """A random model, its inputs, and the reduced model."""
    model, inputs = random_model(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeanWarning)  # a part is not traced, or nothing is reduced
        lean = lean_fx.leanify(
            model, inputs(2), channels=channels_of, reduction=reduction, min_channels=4
        )
    return model, inputs, lean, lean.meta["lean_fx.plan"]


def embedded(model: nn.Module, lean: nn.Module, plan: Plan) -> nn.Module:
    """The original model with the weights of the one that a slice has reduced."""
    made = copy.deepcopy(model)
    groups = {layer: site.groups for site in plan.sites for layer in site.layers}
    with torch.no_grad():
        for name, tensor in made.state_dict(keep_vars=True).items():
            layer = made.get_submodule(name.rpartition(".")[0])
            for whole, kept in _pairs(name, tensor, layer, lean):
                if isinstance(layer, nn.ConvTranspose2d):  # the groups lie one behind the other
                    whole, kept = (
                        each.unflatten(0, (groups.get(name.rpartition(".")[0], 1), -1))
                        for each in (whole, kept)
                    )
                whole.zero_()
                whole[tuple(map(slice, kept.shape))] = kept
    return made


def _pairs(name, tensor, layer, lean):
    """A parameter or buffer, and what has become of it; or its parts, and what of them."""
    owner, _, leaf = name.rpartition(".")
    parts, new = dict(lean.named_modules()), lean.state_dict()
    if isinstance(parts.get(name), nn.Linear):  # x @ parameter
        return [(tensor.T, new[f"{name}.weight"])]
    if isinstance(parts.get(name), nn.Conv2d):  # F.conv2d(x, parameter)
        return [(tensor, new[f"{name}.weight"])]
    if isinstance(layer, nn.RNNBase) and f"{owner}.1" in parts:  # a stack
        stem, _, rest = leaf.rpartition("_l")
        index, *reverse = rest.split("_")
        return [(tensor, new["_".join([f"{owner}.{index}.{stem}_l0", *reverse])])]
    if name in new:
        return [(tensor, new[name])]
    kind = leaf.rpartition("_")[2]  # the weight or bias of attention
    if f"{owner}.in_proj.{kind}" in new:
        return [(tensor, new[f"{owner}.in_proj.{kind}"])]
    names = (f"{owner}.{part}_proj.{kind}" for part in "qkv")
    return [(rows, new[part]) for rows, part in zip(tensor.chunk(3), names, strict=True)]


def outputs(model, x):
    found = model(x)
    return found if isinstance(found, tuple) else (found,)


def check(seed):
    model, inputs, lean, plan = reduced(seed)
    state = copy.deepcopy(model.state_dict())
    mode = [each.training for each in model.modules()]

    # The reduced model computes what the original one computes from the same channels.
    twin = embedded(model, lean, plan).eval()
    lean.eval()
    for batch in (2, 5):
        x = inputs(batch)
        with torch.no_grad():
            for wanted, got in zip(outputs(twin, x), outputs(lean, x), strict=True):
                torch.testing.assert_close(got, wanted)

    # A plan applied later gives the same modules, in the same order.
    again = Plan.from_json(plan.to_json()).apply(model, inputs(2))
    shapes = [(name, each.shape) for name, each in lean.named_parameters()]
    assert [(name, each.shape) for name, each in again.named_parameters()] == shapes
    again.load_state_dict(lean.state_dict())
    with torch.no_grad():
        for wanted, got in zip(outputs(lean, x), outputs(again.eval(), x), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)

    # Every parameter that had a gradient before has one now.
    without = _without_gradient(model, inputs(3))
    assert _without_gradient(lean, inputs(3)) <= without | _renamed(without, lean)

    # The user's model is as it was.
    assert [each.training for each in model.modules()] == mode
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    return plan


def _without_gradient(model: nn.Module, x) -> set[str]:
    model = copy.deepcopy(model).train()
    total = sum(each.square().mean() for each in outputs(model, x))
    if total.requires_grad:  # a random model may return its input
        total.backward()
    return {name for name, each in model.named_parameters() if each.grad is None}


def _renamed(names: set[str], lean: nn.Module) -> set[str]:
    """What rewriting may have made of parameters that have no gradient."""
    owners = {name.rpartition(".")[0] for name in names} | names
    found = [name for name, _ in lean.named_parameters()]
    return {
        name
        for owner, name in itertools.product(owners, found)
        if owner and (name.startswith(f"{owner}.") or name.startswith("reductions."))
    }


def check_signs(seed):
    """A reduction that is promised values of 0 or more gets no others."""
    _, inputs, lean, _ = reduced(seed, "lean")
    with lean_fx.checking_signs(), torch.no_grad():
        lean.train()(inputs(4))
        lean.eval()(inputs(4))


def check_export(seed, folder):
    """The file gives what the model gives, for another batch too; export_onnx compares them."""
    model, inputs, lean, _ = reduced(seed, "lean_damped")
    if any(isinstance(each, Branching) for each in model.modules()):
        return  # torch.export takes no branch on values
    lean_fx.export_onnx(lean.float().eval(), folder / f"{seed}.onnx", inputs(2).float())


@pytest.mark.parametrize("seed", FEW)
def test_a_random_model(seed):
    check(seed)


@pytest.mark.parametrize("seed", FEW)
def test_the_signs_of_a_random_model(seed):
    check_signs(seed)


@pytest.mark.parametrize("seed", FEW[:5])
def test_the_export_of_a_random_model(seed, tmp_path):
    check_export(seed, tmp_path)


def test_the_random_models_are_reduced():
    """The laws say something: in most models some layers are reduced, of all kinds."""
    plans = [reduced(seed)[3] for seed in FEW]
    kinds = {each.kind for plan in plans for site in plan.sites for each in site.consumers}
    assert sum(bool(plan.sites) for plan in plans) > len(plans) / 2
    assert kinds >= {"Conv2d", "Linear", "GRU", "LSTM"}


@pytest.mark.slow
def test_two_thousand_random_models(tmp_path):
    failed = {}
    for seed in MANY:
        try:
            check(seed)
            check_signs(seed)
            if seed % 20 == 0:
                check_export(seed, tmp_path)
        except Exception as error:
            failed[seed] = f"{type(error).__name__}: {error}".partition("\n")[0]
    assert not failed
