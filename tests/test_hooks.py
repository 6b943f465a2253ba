"""Hooks of modules and parameters stay where they are."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import lean_fx
from graphs import reasons
from odd_models import X, mlp, nested

pytestmark = pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning", "ignore::FutureWarning")


HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda module, args, out: out * 2),
    "pre": lambda m: m.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "backward": lambda m: m.register_full_backward_hook(lambda module, inner, outer: None),
    "backward pre": lambda m: m.register_full_backward_pre_hook(lambda module, outer: None),
    "state": lambda m: m.register_state_dict_pre_hook(lambda module, prefix, keep: None),
    "state post": lambda m: m.register_state_dict_post_hook(lambda *args: None),
    "load": lambda m: m.register_load_state_dict_pre_hook(lambda *args: None),
    "load post": lambda m: m.register_load_state_dict_post_hook(lambda module, keys: None),
}


def hooks_of(module):
    return {key: len(held) for key, held in vars(module).items() if key.endswith("hooks") and held}


@pytest.mark.parametrize("where", ["", "0", "1", "2"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_stay(kind, where):
    model = nested()
    HOOKS[kind](model.get_submodule(where))
    for inputs in (X, None):
        lean = lean_fx.leanify(model, inputs)
        assert lean.get_submodule("3").in_features == 4
        for each in (lean, copy.deepcopy(lean) if where in ("0", "2") else lean):
            assert hooks_of(each.get_submodule(where)) == hooks_of(model.get_submodule(where))


@pytest.mark.parametrize("kind", HOOKS)
def test_layers_with_hooks_are_left_alone(kind):
    model = nested()
    HOOKS[kind](model[3])
    assert reasons(model, X)["3"] == "it has hooks, which a rebuilt layer would lose"
    assert hooks_of(lean_fx.leanify(model).get_submodule("3")) == hooks_of(model[3])


def test_hooks_of_containers_see_values_and_gradients():
    seen = []
    gradients = []
    model = nested()
    model[1].register_forward_hook(lambda module, args, out: seen.append(type(out)))
    model[1].register_full_backward_hook(lambda module, inner, outer: gradients.append(outer[0]))
    assert reasons(model)["1.1"] == "inside 1, which has hooks"
    lean = lean_fx.leanify(model, X)
    assert lean.get_submodule("1.1").in_features == 4
    seen.clear()
    lean(X).sum().backward()
    assert seen == [Tensor]
    assert gradients[0].shape == (2, 32)


def test_hooks_of_containers_change_values():
    model = nested()
    model[1].register_forward_hook(lambda module, args, out: out * 0)
    lean = lean_fx.leanify(model, X)
    assert not lean.get_submodule("1")(torch.rand(2, 32)).any()


def test_load_hooks_know_their_module():
    loaded = []
    model = nested()
    for module in (model, model[1]):
        module.register_load_state_dict_pre_hook(lambda module, *rest: loaded.append(module))
    lean = lean_fx.leanify(model)
    lean.load_state_dict(lean.state_dict())
    assert loaded == [lean, lean.get_submodule("1")]


def test_hooks_of_parameters_stay():
    model = mlp()
    model[0].weight.register_hook(lambda gradient: gradient * 0)
    lean = lean_fx.leanify(model, X)
    lean(X).sum().backward()
    assert not lean.get_parameter("0.weight").grad.any()
    assert lean.get_parameter("0.bias").grad.any()
    model[2].weight.register_hook(lambda gradient: gradient * 0)
    assert reasons(model)["2"] == "its parameter has hooks, which a rebuilt layer would lose"


OLD_NORMS = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("norm", OLD_NORMS)
def test_weights_that_hooks_compute(norm, called, tmp_path):
    model = nn.Sequential(OLD_NORMS[norm](nn.Linear(4, 32)), nn.ReLU(), nn.Linear(32, 8))
    if called:
        model(X)
    lean = lean_fx.leanify(model, X).eval()
    assert lean.get_submodule("2").in_features == 4
    torch.testing.assert_close(lean.get_submodule("0")(X), model.eval()[0](X))
    lean.train()(X).sum().backward()
    learned = [name for name, each in lean.named_parameters() if each.grad is not None]
    assert len(learned) == len(list(lean.parameters()))
    lean_fx.export_onnx(lean, tmp_path / "a.onnx", X)


def test_pruned_layers_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), OLD_NORMS["pruning"](nn.Linear(32, 8)))
    assert reasons(model)["2"] == "it has hooks, which a rebuilt layer would lose"
