"""What a module does besides its forward is kept: the module is called whole."""

import types

import pytest
import torch
from torch import nn

import lean_fx

X = torch.rand(2, 32)
NOTHING = {"min_channels": 10**9}  # to reduce

pytestmark = pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")


class Net(nn.Module):
    """Two layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class Calls(Net):
    def __call__(self, x):
        return super().__call__(x / 255)


class CallingLinear(nn.Linear):
    def __call__(self, x):
        return super().__call__(x / 255)


def patched():
    net = Net()
    net.forward = types.MethodType(lambda self, x: 3 * Net.forward(self, x), net)
    return net


def around(part):
    return nn.Sequential(nn.Linear(32, 32), part, nn.ReLU())


@pytest.mark.parametrize(
    "make",
    [
        *(Calls, patched, lambda: around(Calls()), lambda: around(patched())),
        lambda: around(CallingLinear(32, 4)),
    ],
)
def test_what_runs_in_place_of_forward(make):
    model = make()
    lean = lean_fx.leanify(model, X, **NOTHING)
    torch.testing.assert_close(lean(X), model(X))


class FrozenByFlag(Net):
    """As torchvision's and mmdetection's backbones: a flag that may be set later."""

    def __init__(self):
        super().__init__()
        self.bn, self.freeze_bn = nn.BatchNorm1d(32), False

    def forward(self, x):
        return self.b(self.bn(self.a(x)))

    def train(self, mode=True):
        super().train(mode)
        if self.freeze_bn:
            self.bn.eval()
        return self


@pytest.mark.parametrize("wrap", [lambda part: part, around])
def test_a_train_that_asks_a_flag(wrap):
    part = FrozenByFlag()
    model = wrap(part)
    lean = lean_fx.leanify(model, X, **NOTHING)
    for each in (model, lean):
        next(m for m in each.modules() if hasattr(m, "freeze_bn")).freeze_bn = True
        each.train()
        assert not next(m for m in each.modules() if isinstance(m, nn.BatchNorm1d)).training


class Folded(Net):
    """Evaluates with a weight that eval() computes, as RepVGG."""

    def __init__(self):
        super().__init__()
        self.register_buffer("folded", 2 * self.a.weight.detach())

    def train(self, mode=True):
        super().train(mode)
        if not mode:
            self.folded.copy_(2 * self.a.weight.detach())
        return self

    def forward(self, x):
        weight = 2 * self.a.weight if self.training else self.folded
        return self.b(nn.functional.linear(x, weight))


def test_an_eval_that_computes_a_buffer():
    model = Folded()
    lean = lean_fx.leanify(model, X, **NOTHING)
    for each in (model, lean):
        each.train()
        each.get_parameter("a.weight").data.mul_(3)
        each.eval()
    torch.testing.assert_close(lean(X), model(X))


def test_a_train_set_on_the_object():
    model = nn.Sequential(nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32)), nn.Linear(32, 4))
    model.eval()
    model[0].train = lambda mode=True: model[0]  # latent diffusion's disabled_train
    lean = lean_fx.leanify(model, X, **NOTHING)
    assert not lean.train().get_submodule("0.1").training


class Versioned(Net):
    """Loads checkpoints of an older version, and stores the epoch."""

    def get_extra_state(self):
        return {"epoch": 3}

    def set_extra_state(self, state):
        self.epoch = state["epoch"]

    def _load_from_state_dict(self, state, prefix, *args):
        if f"{prefix}old.weight" in state:
            state[f"{prefix}a.weight"] = state.pop(f"{prefix}old.weight")
        super()._load_from_state_dict(state, prefix, *args)


@pytest.mark.parametrize("wrap", [lambda part: part, around])
def test_its_own_state_dict(wrap):
    model = wrap(Versioned())
    lean = lean_fx.leanify(model, X, **NOTHING)
    assert lean.state_dict().keys() == model.state_dict().keys()
    old = {
        name.replace("a.weight", "old.weight"): value for name, value in lean.state_dict().items()
    }
    lean.load_state_dict(old)
    assert next(m for m in lean.modules() if hasattr(m, "epoch")).epoch == 3


class Never(Net):
    def train(self, mode=True):
        return self


class AlwaysFrozen(Net):
    def train(self, mode=True):
        return super().train(False)


class Documented(Net):
    def train(self, mode=True):
        """As torch's."""
        return super().train(mode)

    def eval(self):
        """As torch's."""
        return self.train(False)


class DropsItsCache(Net):
    """As LeViT of timm."""

    def __init__(self):
        super().__init__()
        self.cache = {}

    @torch.no_grad()
    def train(self, mode=True):
        super().train(mode)
        if mode and self.cache:
            self.cache = {}
        return self

    def _apply(self, fn, *args, **kwargs):
        self.cache = {}
        return super()._apply(fn, *args, **kwargs)


@pytest.mark.parametrize("kind", [Never, AlwaysFrozen, Documented, DropsItsCache])
def test_train_and_eval(kind):
    model = kind()
    lean = lean_fx.leanify(model, X, **NOTHING)
    assert isinstance(lean, torch.fx.GraphModule) == (kind in (Documented, DropsItsCache))
    for change in (nn.Module.eval, nn.Module.train, kind.eval, kind.train):
        change(model)
        getattr(lean, change.__name__)()
        if change in (kind.eval, kind.train):
            assert [each.training for each in (lean, lean.a)] == [model.training, model.a.training]


class MovesItsTable(Net):
    """Its table is not a buffer: to() and half() reach it here alone."""

    def __init__(self):
        super().__init__()
        self.table = [torch.ones(32)]

    def _apply(self, fn, *args, **kwargs):
        self.table = [fn(each) for each in self.table]
        return super()._apply(fn, *args, **kwargs)

    def forward(self, x):
        return super().forward(x * self.table[0])


def test_an_apply_that_moves_more_than_torch_does():
    lean = lean_fx.leanify(around(MovesItsTable()), X, **NOTHING).double()
    assert isinstance(lean.get_submodule("1"), MovesItsTable)
    assert lean.get_submodule("1").table[0].dtype == torch.float64


class TriesAnother(Net):
    def forward(self, x):
        try:
            h = self.a(x)
        except RuntimeError:
            h = self.a(x.T)
        return self.b(h)


@pytest.mark.parametrize("given", [X, torch.rand(32, 5)])
def test_another_way_where_a_call_fails(given):
    model = TriesAnother()
    lean = lean_fx.leanify(model, given, **NOTHING)
    for x in (X, torch.rand(32, 5)):
        torch.testing.assert_close(lean(x), model(x))


class Migrating(Net):
    """As torchvision's MNASNet: reads checkpoints of an older version."""

    def _load_from_state_dict(self, state, prefix, *args):
        super()._load_from_state_dict(state, prefix, *args)


def test_a_model_that_reads_older_checkpoints_keeps_its_graph_and_is_told():
    with pytest.warns(lean_fx.LeanWarning, match="^Migrating: its graph is without its _load_from"):
        lean = lean_fx.leanify(Migrating(), X, **NOTHING)
    assert isinstance(lean, torch.fx.GraphModule)
    assert isinstance(
        lean_fx.leanify(around(Migrating()), X, **NOTHING).get_submodule("1"), Migrating
    )


def test_the_costs_of_a_part_that_converts_old_state_dicts_are_those_of_its_layers():
    class Converting(nn.Sequential):
        def _load_from_state_dict(self, state_dict, *args):
            state_dict.pop("version", None)
            super()._load_from_state_dict(state_dict, *args)

    part = Converting(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    costs = lean_fx.costs_of(nn.Sequential(part), torch.rand(1, 8))
    assert [each.macs for each in costs.nodes] == [8 * 32, 0, 32 * 4]
