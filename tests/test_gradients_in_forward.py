"""A forward that computes gradients of its values: forces, differential equations."""

import pytest
import torch
from torch import nn

import lean_fx
from lean_fx.errors import CaptureError
from lean_fx.graph.running import without_gradients

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
UNTRACED = "forward computes gradients"


class Force(nn.Module):
    """An energy, and the force: its gradient, which is trained too."""

    def __init__(self):
        super().__init__()
        layers = [nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1)]
        self.energy = nn.Sequential(*layers)

    def forward(self, positions):
        positions = positions.detach().requires_grad_()
        energy = self.energy(positions).sum()
        (gradient,) = torch.autograd.grad(energy, positions, create_graph=self.training)
        return energy, -gradient


class Scaled(nn.Module):
    """A net in a graph, with the forces in a part of it."""

    def __init__(self):
        super().__init__()
        self.force, self.wide, self.head = Force(), nn.Linear(3, 32), nn.Linear(32, 2)

    def forward(self, positions):
        energy, force = self.force(positions)
        return self.head(self.wide(force).relu()) + energy


@pytest.mark.filterwarnings(f"ignore:.*{UNTRACED}")
@pytest.mark.parametrize("form", ["graph", "module"])
def test_layers_reduce_their_own_input(form):
    model = Force()
    lean = lean_fx.leanify(model, X, form=form)
    assert [site.layers for site in lean_fx.plan_of(lean).sites] == [("energy.2",), ("energy.4",)]
    energy, force = lean(X)
    (energy + force.square().sum()).backward()
    assert all(each.grad is not None for each in lean.parameters() if each.shape != (1,))
    moved = X.double()
    moved[0, 0] += 1e-4
    energies = [lean.double()(each)[0].item() for each in (X.double(), moved)]
    assert (energies[1] - energies[0]) / -1e-4 == pytest.approx(force[0, 0].item(), rel=1e-2)


def test_only_the_part_that_does_so_keeps_its_class():
    lean = lean_fx.leanify(Scaled(), X)
    assert type(lean.force) is Force
    layers = [site.layers for site in lean_fx.plan_of(lean).sites]
    assert layers == [("head",), ("force.energy.2",), ("force.energy.4",)]
    lean(X).sum().backward()
    assert lean_fx.sensitivity(lean, X) > 0


def test_without_inputs_it_is_refused():
    with pytest.raises(CaptureError, match=UNTRACED):
        lean_fx.leanify(Force())


class Tapped(nn.Module):
    """Asks for the gradient of a value, as those who look inside of nets do."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 32), nn.Linear(32, 2)

    def forward(self, x):
        value = self.a(x)
        value.retain_grad()
        return self.b(value)


@pytest.mark.parametrize("form", ["graph", "module"])
def test_a_gradient_that_is_kept(form):
    lean = lean_fx.leanify(Tapped(), X, form=form)
    assert [site.layers for site in lean_fx.plan_of(lean).sites] == [("b",)]
    lean(X).sum().backward()


def test_a_model_that_fails_otherwise_is_run_once():
    runs = []

    def fail():
        runs.append(1)
        raise RuntimeError("no such layer")

    with pytest.raises(RuntimeError, match="no such layer"):
        without_gradients(fail)
    assert runs == [1]
