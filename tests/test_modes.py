"""Graphs that differ between training and evaluation follow the mode."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lean_fx
from graphs import Net
from lean_fx.capture.capturing import capture
from lean_fx.layers.modes import ByMode, InMode


def X(*shape):  # noqa: N802
    return torch.rand(shape)


class Aux(nn.Module):
    """Auxiliary outputs in training only, dropout, a counter, and noise by the mode."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 32, 3)
        self.norm = nn.BatchNorm2d(32)
        self.aux = nn.Sequential(nn.Conv2d(32, 4, 5), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(32, 5, 1)
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x):
        x = F.relu(self.norm(self.body(x)))
        if self.training:
            self.steps.add_(1)
            extra = self.aux(x)
        x = F.batch_norm(
            x, self.norm.running_mean, self.norm.running_var, training=self.training, momentum=0.3
        )
        y = self.head(F.dropout(x, 0.5, self.training))
        if self.training:
            return y, {"aux": extra}
        return y


def run(model, mode, x):
    model = copy.deepcopy(model).train(mode)
    torch.manual_seed(0)
    return model(x), dict(model.state_dict())


@pytest.mark.parametrize("start", [True, False])
def test_a_graph_that_differs_between_modes_follows_the_mode(start):
    model, x = Aux().train(start), X(4, 3, 9, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error", lean_fx.LeanWarning)
        captured = capture(model, (x,))
    others = (copy.deepcopy(captured), pickle.loads(pickle.dumps(captured)))
    again = capture(captured, (x,))
    for module in (captured, *others, again):
        for mode in (True, False, True):
            torch.testing.assert_close(run(module, mode, x), run(model, mode, x), rtol=0, atol=0)
    small = X(4, 3, 4, 4)
    torch.testing.assert_close(run(captured, False, small), run(model, False, small))
    with pytest.raises(RuntimeError, match="Kernel size"):
        run(captured, True, small)


@pytest.mark.parametrize("start", [True, False])
def test_a_reduced_model_follows_the_mode(start, tmp_path):
    model, x = Aux().train(start), X(4, 3, 9, 9)
    before = copy.deepcopy(model.state_dict())
    lean = lean_fx.leanify(model, x)
    plan = lean.meta["lean_fx.plan"]
    assert [site.layers for site in plan.sites] == [("head",)]
    reasons = {each.layer: each.reason.text for each in plan.left_alone}
    assert reasons["aux.0"] == "called in training only, or in evaluation only"
    torch.testing.assert_close(model.state_dict(), before)
    aux = {name: value for name, value in lean.state_dict().items() if name.startswith("aux.")}
    torch.testing.assert_close(aux, {n: v for n, v in before.items() if n.startswith("aux.")})
    y, extra = lean.train()(x)
    assert (y.shape, extra["aux"].shape) == ((4, 5, 7, 7), (4, 4, 3, 3))
    (y.sum() + extra["aux"].sum()).backward()
    assert all(parameter.grad is not None for parameter in lean.parameters())
    assert lean.eval()(x).shape == (4, 5, 7, 7)
    assert lean_fx.export_onnx(lean, tmp_path / "net.onnx", x).path.exists()


def test_parts_of_a_mode_and_values_by_mode_are_seen():
    captured = capture(Aux())
    modules = [type(module) for module in captured.calls.children()]
    assert set(modules) == {ByMode, InMode, nn.Dropout}


def test_frozen_parts_keep_their_mode():
    block = Net(lambda self, x: F.rrelu(x - 0.5, training=self.training))
    model = nn.Sequential(nn.Linear(4, 32), block).train()
    block.eval()
    captured = capture(model)
    assert captured(X(3, 4)).shape == (3, 32)
    x = X(3, 4)
    torch.testing.assert_close(captured(x), model(x), rtol=0, atol=0)


def test_modes_that_cannot_be_one_are_told():
    def swapped(self, x):
        return self.a(self.b(x)) if self.training else self.b(self.a(x))

    model = Net(swapped, a=nn.Linear(32, 32), b=nn.Linear(32, 32)).eval()
    with pytest.warns(lean_fx.LeanWarning, match="^Net: its graph acts as in eval mode"):
        captured = capture(model)
    with pytest.warns(lean_fx.LeanWarning) as told:
        lean_fx.plan(model)
    assert [each.filename for each in told] == [__file__]  # the user's own line
    x = X(2, 32)
    torch.testing.assert_close(captured.train()(x), model(x), rtol=0, atol=0)


class Doubles(nn.Module):
    """Does more in training."""

    def __init__(self, out=32):
        super().__init__()
        self.l = nn.Linear(32, out)

    def forward(self, x):
        h = self.l(x)
        return h * 2 if self.training else h


class Shifts(Doubles):
    def forward(self, x):
        return self.l(x + 1 if self.training else x)


class Told(Doubles):
    """Is told the mode."""

    def forward(self, x, training=False):
        return F.dropout(self.l(x), 0.5, training)


class Tells(nn.Module):
    """Tells a part its own mode, or leaves it out in evaluation."""

    def __init__(self, tell):
        super().__init__()
        self.a, self.part, self.tell = nn.Linear(32, 32), Told(), tell

    def forward(self, x):
        h = self.a(x)
        if self.tell:
            return self.part(h, self.training)
        return self.part(h) if self.training else h


class Outside(nn.Module):
    """Normalises and drops by the modes of others, or the other way round."""

    def __init__(self, way):
        super().__init__()
        self.a, self.bn, self.way = nn.Linear(32, 32), nn.BatchNorm1d(32), way

    def forward(self, x):
        h, bn = self.a(x), self.bn
        if self.way == "bn":
            return F.batch_norm(h, bn.running_mean, bn.running_var, training=self.bn.training)
        return F.dropout(h, 0.5, not self.training)


PARTS = {
    "neighbours": lambda: nn.Sequential(Doubles(), Shifts()),
    "apart": lambda: nn.Sequential(Doubles(), nn.ReLU(), Shifts(), nn.ReLU(), Doubles()),
    "tells": lambda: Tells(True),
    "leaves out": lambda: Tells(False),
    "nested": lambda: nn.Sequential(Tells(True), nn.ReLU(), Tells(False)),
    "of a layer": lambda: Outside("bn"),
    "inverted": lambda: Outside("dropout"),
}


@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("parts", PARTS)
def test_parts_have_modes_of_their_own(parts, start):
    model, x = PARTS[parts]().train(start), X(4, 32)
    lean = lean_fx.leanify(model, x, min_channels=10**9)
    names = [name for name, each in model.named_modules() if name and not list(each.children())]
    homes = {name.rpartition(".")[0] for name in names} | {"", *names}
    for root in (True, False):
        for name in sorted(homes):
            for each in (model, lean):
                each.train(root)
                each.get_submodule(name).train(not root)
            results = []
            for each in (model, lean):
                torch.manual_seed(0)
                results.append(each(x))
            torch.testing.assert_close(*results)
