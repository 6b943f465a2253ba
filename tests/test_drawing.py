"""Pictures of models: their boxes, and the files."""

import pytest
import torch
from torch import nn

import lean_fx
from lean_fx import drawing
from lean_fx.boxes import Box, boxes_of
from lean_fx.errors import ArgumentError, WriteError

X = torch.rand(1, 3, 8, 8)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.Sequential(Block(32), Block(32))
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        n = x.shape[0]
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)).reshape(n, -1))


def boxes(model, most):
    return boxes_of(model, X, most)


def test_every_call_is_a_box_where_there_is_room():
    found = boxes(Net(), 99)
    assert [box.name for box in found] == [
        *("stem", "relu", "blocks.0.a", "relu_1", "blocks.0.b", "add"),
        *("blocks.1.a", "relu_2", "blocks.1.b", "add_1", "mean", "reshape", "head"),
    ]
    assert found[0] == Box("stem", "Conv2d", (1, 32, 8, 8), 896, 27 * 32 * 64, 1, 0, ())
    assert found[5].sources == (1, 4)  # the skip connection
    assert sum(box.parameters for box in found) == sum(p.numel() for p in Net().parameters())


def test_modules_are_folded_until_the_boxes_are_few_enough():
    found = boxes(Net(), 8)
    assert [(box.name, box.kind, box.parts) for box in found] == [
        *(("stem", "Conv2d", 1), ("relu", "relu", 1)),
        *(("blocks.0", "Block", 4), ("blocks.1", "Block", 4)),
        *(("mean", "mean", 1), ("reshape", "reshape", 1), ("head", "Linear", 1)),
    ]
    assert [box.name for box in boxes(Net(), 6)] == [
        *("stem", "relu", "blocks", "mean", "reshape", "head"),
    ]


def test_reductions_are_folded_with_what_reads_them():
    lean = lean_fx.leanify(Net(), X)
    assert sum(box.reductions for box in boxes(lean, 99)) == 5
    assert all(box.parts == 1 for box in boxes(lean, 99))
    folded = {box.name: box.reductions for box in boxes(lean, 8)}
    assert folded == {
        **{"stem": 0, "relu": 0, "blocks.0": 2, "blocks.1": 2},
        **{"mean": 0, "reshape": 0, "head": 1},
    }


@pytest.mark.parametrize(
    ("suffix", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")]
)
def test_files(tmp_path, suffix, start):
    model = Net()
    path = tmp_path / f"net.{suffix}"
    lean_fx.draw({"before": model, "after": lean_fx.leanify(model, X)}, path, X)
    assert path.read_bytes().startswith(start)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    lean_fx.draw(model, path, X)


def test_a_plan_is_drawn_as_what_it_makes_of_the_first_model(tmp_path):
    model = Net()
    made = lean_fx.plan(model, X)
    after = drawing._with_plans_applied({"before": model, "after": made}, X)["after"]
    assert boxes(after, 99) == boxes(lean_fx.leanify(model, X), 99)
    lean_fx.draw({"before": model, "after": made}, tmp_path / "net.svg", X)
    message = "^draw: a plan does not hold its model; give both: {'before': model, 'after': plan}$"
    for alone in (made, {"after": made}):
        with pytest.raises(ArgumentError, match=message):
            lean_fx.draw(alone, tmp_path / "plan.svg", X)


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_dollar_signs_are_no_formulas(suffix, tmp_path):
    model = nn.Sequential()
    model.add_module("$r_{$", nn.Linear(8, 4))
    lean_fx.draw({"cost $\\frac$": model}, tmp_path / f"net.{suffix}", torch.rand(2, 8))


def test_what_is_refused(tmp_path):
    with pytest.raises(
        ArgumentError, match=r"^draw: path='net.gif' does not end in .svg, .png, .pdf$"
    ):
        lean_fx.draw(Net(), "net.gif", X)
    with pytest.raises(
        ArgumentError, match="^draw: models is empty; give a model, or models by ti"
    ):
        lean_fx.draw({}, "net.svg", X)
    with pytest.raises(ArgumentError, match="^draw: max_boxes=0 is not an int of 1 or more"):
        lean_fx.draw(Net(), "net.svg", X, max_boxes=0)
    with pytest.raises(WriteError, match="nowhere"):
        lean_fx.draw(Net(), tmp_path / "nowhere" / "net.svg", X)


def test_reductions_inside_of_whole_modules_count():
    class Whole(Net):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) > 0 else x

    lean = lean_fx.leanify(nn.Sequential(Whole(), nn.Linear(4, 4)), X)
    assert [(box.name, box.reductions) for box in boxes(lean, 99)] == [("0", 5), ("1", 0)]
