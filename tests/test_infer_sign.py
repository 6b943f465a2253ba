"""Proofs of the sign, against what values turn out to be."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import symbolic_trace

import lean_fx
from graphs import CHANGED, UNCHANGED, Residual
from lean_fx.passes import InferSign, TrackWrites, facts
from lean_fx.reduction.functional import checking_signs


def proofs(model):
    """What is proved of each node, by name, and the graph module."""
    graph_module = symbolic_trace(model)
    assert not TrackWrites()(graph_module).modified
    assert not InferSign()(graph_module).modified
    return {n.name: facts(n).nonnegative for n in graph_module.graph.nodes}, graph_module


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@torch.fx.wrap
def subtracts(y):
    """A function that torch.fx does not look into."""
    y.sub_(5)


NONNEGATIVE = [
    F.relu,
    torch.sigmoid,
    lambda x: x.softmax(1),
    lambda x: x * x,
    lambda x: x**2,
    lambda x: x.exp(),
    lambda x: x.clamp(0, 6),
    lambda x: torch.clamp(x, min=0.5),
    lambda x: F.relu(x).abs().sqrt(),
    lambda x: F.relu(x) + torch.sigmoid(x),
    lambda x: F.relu(x) + 3,
    lambda x: 0.5 * F.relu(x) / 2,
    lambda x: torch.cat([F.relu(x), x.abs()], 1),
    lambda x: torch.maximum(x, F.relu(x)),
    lambda x: F.max_pool2d(F.dropout(F.relu(x), 0.5), 2).flatten(1),
    lambda x: F.adaptive_avg_pool2d(F.hardsigmoid(x), 1),
    lambda x: F.relu(x).permute(0, 2, 3, 1).mean((1, 2)),
    lambda x: F.relu(x).chunk(2, 1)[0],
    lambda x: F.interpolate(F.relu(x), scale_factor=2, mode="bilinear"),
    lambda x: F.relu(x).mul_(2),
    lambda x: F.relu(x, inplace=True),
    F.softplus,
    lambda x: torch.pow(exponent=2, input=x),
    lambda x: torch.flatten(start_dim=2, input=F.relu(x)),
    lambda x: F.avg_pool2d(F.relu(x), 2, divisor_override=3),
    lambda x: F.relu(x) ** 1.5,
]
ANY = [
    lambda x: x,
    lambda x: -F.relu(x),
    lambda x: F.relu(x) - 1,
    lambda x: F.relu(x) - F.relu(-x),
    lambda x: F.relu(x) * -1,
    lambda x: F.relu(x) * (x - 5),
    lambda x: torch.add(F.relu(x), F.relu(-x), alpha=-1),
    F.gelu,
    F.silu,
    F.hardswish,
    torch.tanh,
    lambda x: F.leaky_relu(x),
    lambda x: x**3,
    lambda x: x.clamp(-1, 1),
    lambda x: x.clamp(max=1),
    lambda x: torch.cat([F.relu(x), x], 1),
    lambda x: F.alpha_dropout(F.relu(x), 0.5, training=True),
    lambda x: F.interpolate(F.relu(x), scale_factor=2, mode="bicubic"),
    lambda x: F.layer_norm(F.relu(x), (4, 4)),
    lambda x: F.relu(x).sub_(1),
    lambda x: torch.max(x, 1)[0],
    lambda x: F.interpolate(F.relu(x), scale_factor=2.0, mode="lanczos", antialias=True),
    lambda x: torch.clamp(x, F.relu(x), x - 1),
    lambda x: x.clamp(0, -1),
    lambda x: torch.clamp(x, min=F.relu(x), max=x * 0 - 1),
    lambda x: torch.pow(exponent=3, input=x),
    lambda x: torch.flatten(start_dim=2, input=x),
    lambda x: F.softplus(x, 1, -100),
    lambda x: F.avg_pool2d(F.relu(x), 2, divisor_override=-4),
    lambda x: F.max_pool2d(F.relu(x)[:, :, :2, :2], 2, 1, 1, 3),
    lambda x: 1 / torch.sqrt(x * 0 * -1),
    lambda x: F.relu(x * 0 * -1) ** -1,
]


@pytest.mark.parametrize("function", NONNEGATIVE)
def test_proved(function):
    proved, graph_module = proofs(Function(function))
    last = next(n for n in reversed(graph_module.graph.nodes) if n.op == "output").args[0]
    assert proved[last.name]
    assert graph_module(10 * torch.randn(2, 4, 4, 4)).min() >= 0


@pytest.mark.parametrize("function", ANY)
def test_not_proved(function):
    proved, graph_module = proofs(Function(function))
    last = next(n for n in reversed(graph_module.graph.nodes) if n.op == "output").args[0]
    assert not proved[last.name]
    torch.manual_seed(0)
    assert graph_module(10 * torch.randn(2, 4, 4, 4)).min() < 0


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.sub_(5),
        lambda y: y.view(-1).sub_(5),
        lambda y: y.flatten(1)[0].neg_(),
        lambda y: F.leaky_relu(y.sub_(3), inplace=True),
        lambda y: torch.sub(y, 5, out=y),
        *(
            lambda y, view=view: view(y).sub_(5)
            for view in (
                torch.ravel,
                torch.positive,
                lambda y: +y,
                lambda y: y.type_as(y),
                lambda y: y.cpu(),
                lambda y: y.resolve_conj(),
                lambda y: y.adjoint(),
                lambda y: y.hsplit(2)[0],
                lambda y: torch.tensor_split(y, 2)[0],
                lambda y: torch.moveaxis(y, 1, 2),
                lambda y: torch.as_strided(y, (2, 4), (1, 1)),
                lambda y: torch.broadcast_tensors(y, y)[0],
                lambda y: torch.einsum("abcd->dcba", y),
                lambda y: F.alpha_dropout(y, 0.5),
                lambda y: y.data,
            )
        ),
        lambda y: torch.neg(y + 1, out=y),
        lambda y: torch._foreach_sub_([y + 1, y], 5),
        lambda y: F.leaky_relu(y.sub(0), -1.0, True) + F.hardtanh(y, -5, -1, True),
        subtracts,
    ],
)
def test_a_value_that_is_written_to_later_is_not_proved(change):
    def function(x):
        y = F.relu(x)
        change(y)
        return y + 0

    proved, graph_module = proofs(Function(function))
    assert not proved["relu"]
    assert not proved["add"]
    assert graph_module(torch.randn(2, 4, 4, 4)).min() < 0


@pytest.mark.parametrize("model", CHANGED | UNCHANGED)
@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
def test_every_proof_holds_when_the_model_runs(model):
    make, shape = (CHANGED | UNCHANGED)[model]
    lean = lean_fx.leanify(make())
    for seed in range(3):
        torch.manual_seed(seed)
        with checking_signs():
            lean(10 * torch.randn(shape))


def test_the_plan_shows_it_and_the_reduction_has_it():
    lean = lean_fx.leanify(Residual())
    plan = lean.meta["lean_fx.plan"]
    assert [(site.value, site.nonnegative) for site in plan.sites] == [
        ("relu", True),
        ("mean", False),
    ]
    assert lean.reductions.relu.nonnegative
    assert not lean.reductions.mean.nonnegative
    assert "relu   >= 0  128   left" in str(plan)


def test_a_wrong_proof_would_be_found():
    lean = lean_fx.leanify(Residual())
    lean.reductions.mean.nonnegative = True
    message = "nonnegative=True, but the least value is -"
    with pytest.raises(lean_fx.LeanError, match=message), checking_signs():
        lean(torch.randn(2, 3, 8, 8))


class Hooked(nn.Module):
    """A change of what a module does that its type does not show."""

    def __init__(self, change):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
        change(self.net[1])

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda relu: relu.register_forward_hook(lambda module, inputs, output: output - 1),
        lambda relu: relu.register_forward_pre_hook(lambda module, inputs: inputs[0] + 1),
        lambda relu: setattr(relu, "forward", lambda x: x - 1),
    ],
    ids=["hook", "pre-hook", "forward"],
)
def test_of_an_altered_module_nothing_is_known(change):
    lean = lean_fx.leanify(Hooked(change), channels=4)
    (site,) = lean.meta["lean_fx.plan"].sites
    assert not site.nonnegative
    with checking_signs():
        lean(torch.randn(4, 8))


@pytest.mark.parametrize(
    "module",
    [nn.Softplus(-1), nn.AvgPool2d(2, divisor_override=-1), nn.MaxPool2d(2, 1, 1, dilation=3)],
)
def test_arguments_of_modules_count(module):
    proved, graph_module = proofs(nn.Sequential(nn.ReLU(), module))
    assert not proved["_1"]
    assert graph_module(torch.randn(1, 4, 2, 2)).min() < 0


def test_a_plan_from_elsewhere_proves_nothing():
    def net(act):
        return nn.Sequential(nn.Linear(8, 32), act, nn.Linear(32, 3))

    plan = lean_fx.plan(net(nn.ReLU()), channels=4)
    assert plan.sites[0].nonnegative
    assert plan.apply(net(nn.ReLU())).reductions.get_submodule("_1").nonnegative
    lean = lean_fx.Plan.from_json(plan.to_json()).apply(net(nn.GELU()))
    assert not lean.reductions.get_submodule("_1").nonnegative


def test_views_by_other_names_part_the_readers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 3), nn.Linear(32, 3)

        def forward(self, x):
            h = self.a(x).sigmoid()
            y = self.b(h)
            h.ravel().neg_()
            return y + self.c(h)

    assert len(lean_fx.plan(Net(), channels=4).sites) == 2


def test_what_is_no_call_proves_nothing_by_its_name():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.square = nn.Parameter(torch.randn(8))

        def forward(self, exp):
            return self.square * exp

    proved, _ = proofs(Net())
    assert proved == {"exp": False, "square": False, "mul": False, "output": False}


def test_a_promise_of_the_user_is_kept():
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 4))
    promised = partial(lean_fx.LeanReduction, nonnegative=True)
    (module,) = lean_fx.leanify(model, reduction=promised).reductions.children()
    assert module.nonnegative
    (module,) = lean_fx.leanify(model).reductions.children()
    assert not module.nonnegative
