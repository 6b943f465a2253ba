"""What stands in a graph for the modules that it has looked into."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lean_fx
from lean_fx.capture.capturing import capture
from lean_fx.errors import CaptureError, LeanWarning

X = torch.rand(2, 3, 9, 9)


class Block(nn.Module):
    scale = 0.5

    def __init__(self):
        super().__init__()
        self.rate, self.conv = 3, nn.Conv2d(32, 32, 1)

    def forward(self, x):
        return self.conv(x) * 2

    def reset(self):
        raise NotImplementedError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.features = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
        self.heads = nn.ModuleDict({"b": nn.Linear(32, 2), "a": nn.Linear(32, 3)})
        self.classes, self.names, self.table = 7, ("a", "b"), {"a": 1}

    def forward(self, x):
        x = self.pooled(self.features(x))
        return self.heads["a"](x), self.heads["b"](x)

    def pooled(self, x):
        for block in reversed(self.blocks):
            x = block(x)
        return x.mean((2, 3))


class Predicts(Net):
    def predict(self, x):
        return self(x)[0].argmax(1)

    def train(self, mode=True):
        return super().train(mode)


@pytest.fixture(params=["leanified", "copied", "pickled"])
def lean(request):
    made = lean_fx.leanify(Net(), X)
    copies = {"copied": copy.deepcopy, "pickled": lambda it: pickle.loads(pickle.dumps(it))}
    return copies.get(request.param, lambda it: it)(made)


def test_containers_keep_class_order_and_length(lean):
    assert isinstance(lean.features, nn.Sequential)
    assert isinstance(lean.blocks, nn.ModuleList)
    assert isinstance(lean.heads, nn.ModuleDict)
    assert (len(lean.features), len(lean.blocks), len(lean.heads)) == (3, 2, 2)
    assert lean.features[-1] is lean.get_submodule("features.2")
    assert lean.blocks[0].conv is lean.get_submodule("blocks.0.conv")
    assert [*lean.heads] == ["b", "a"]
    assert [each is lean.blocks[index] for index, each in enumerate(lean.blocks)] == [True, True]


def test_their_numbers_can_be_read(lean):
    assert (lean.classes, lean.names) == (7, ("a", "b"))
    assert [block.rate for block in lean.blocks] == [3, 3]


def test_what_is_missing_is_named():
    lean = capture(Predicts())
    remedy = r"is not in the graph, which holds what forward calls; leanify\(model, inputs, form="
    for part, name, text in (
        (lean, "predict", "Predicts.predict"),
        (lean, "table", "Predicts.table"),
        (lean.blocks[1], "reset", "Block.reset"),
        (lean.blocks[1], "scale", "Block.scale"),
    ):
        with pytest.raises(AttributeError, match=rf"{text} {remedy}'module'\) keeps the class"):
            getattr(part, name)
    with pytest.raises(AttributeError, match="no attribute 'nowhere'"):
        lean.nowhere  # noqa: B018
    assert not hasattr(lean, "predict")


def test_a_part_cannot_be_called(lean):
    with pytest.raises(CaptureError, match="Sequential: is part of a graph, which calls its"):
        lean.features(X)
    with pytest.raises(CaptureError, match="Block: is part of a graph"):
        lean.blocks[0](X)


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_a_hook_that_never_runs_is_told(register, lean):
    with pytest.warns(LeanWarning, match="Block: a hook on it never runs") as caught:
        getattr(lean.blocks[0], register)(lambda *_: None)
    assert caught[0].filename == __file__
    getattr(lean.blocks[0].conv, register)(lambda *_: None)  # that one runs


def test_methods_that_a_graph_is_without_are_told():
    with pytest.warns(
        LeanWarning,
        match=r"the graph of Predicts is without its methods \(predict\); form='module' keeps",
    ) as caught:
        lean_fx.leanify(Predicts(), X)
    assert caught[0].filename == __file__
    lean_fx.leanify(Predicts(), X, form="module").predict(X)
    lean_fx.leanify(Net(), X)  # forward itself uses pooled


def test_a_graph_shows_what_it_was():
    text = str(lean_fx.leanify(Net(), X))
    assert "(blocks): ModuleList(" in text
    assert "): 2 x Block(" in text


def test_a_module_that_forward_does_not_call_is_missing_by_name():
    """A schedule of ``model.drop.p`` finds out; the Dropout that the graph calls follows it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.drop, self.b = nn.Linear(8, 32), nn.Dropout(0.5), nn.Linear(32, 2)

        def forward(self, x):
            return self.b(nn.functional.dropout(self.a(x), self.drop.p, self.training))

    made = lean_fx.leanify(Net(), torch.rand(4, 8))
    with pytest.raises(AttributeError, match="^Net.drop is not in the graph, .* keeps the class"):
        made.drop.p = 0.0
    (dropout,) = (each for each in made.modules() if isinstance(each, nn.Dropout))
    x, dropout.p = torch.rand(64, 8), 0.0
    assert torch.equal(made.train()(x), made(x))
