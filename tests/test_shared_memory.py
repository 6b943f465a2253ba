"""Tensors that share memory in a model share it in its copy and in the reduced model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lean_fx
from graphs import reasons
from lean_fx.cloning import clone, memory_of
from odd_models import CHANGES, Net, X, values

pytestmark = pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning", "ignore::FutureWarning")


def shared(model):
    """The names of parameters and buffers that share memory."""
    places = {}
    tensors = [*model.named_parameters(remove_duplicate=False)]
    for name, tensor in (*tensors, *model.named_buffers(remove_duplicate=False)):
        places.setdefault(memory_of(tensor)[0], set()).add(name)
    return [names for names in places.values() if len(names) > 1]


@pytest.mark.parametrize("name", CHANGES)
def test_memory_is_shared_as_in_the_model(name, tmp_path):
    change, groups, reduced = CHANGES[name]
    model = Net(change)
    for inputs in (X, None):
        plan = lean_fx.plan(model, inputs)
        assert [layer for site in plan.sites for layer in site.layers] == reduced
        for lean in (plan.apply(model, inputs), lean_fx.leanify(model, inputs)):
            assert shared(lean) == groups
            lean(X).sum().backward()
    for stale, new in zip(values(model), values(clone(model)), strict=True):
        torch.testing.assert_close(stale, new, rtol=0, atol=0)


def test_who_shares_memory_is_named():
    model = Net(CHANGES["a view of a weight to reduce"][0])
    assert reasons(model)["b"] == "its parameter is used elsewhere: b.weight, extra"


def test_two_names_of_a_buffer_stay_one_tensor():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 32), nn.Linear(32, 8)
            self.register_buffer("count", torch.zeros(1))
            self.register_buffer("again", self.count)

        def forward(self, x):
            self.count.add_(1)
            return self.b(F.relu(self.a(x))) * 0 + self.again

    lean = lean_fx.leanify(Counting())
    assert lean(X).eq(1).all()
    assert lean(X).eq(2).all()
