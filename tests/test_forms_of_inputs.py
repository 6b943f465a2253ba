"""Inputs that are None, lists, tuples, dicts or dataclasses go into every function alike."""

import dataclasses

import pytest
import torch
from torch import nn

import lean_fx

X = torch.rand(2, 32)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 4)

    def reduced(self, x):
        return self.b(torch.relu(self.a(x)))


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    scale: torch.Tensor
    name: str = "train"


class FromSequence(Net):
    def forward(self, values):
        return self.reduced(values[0] + values[1])


class Unpacks(Net):
    def forward(self, values):
        x, y = values
        return self.reduced(x + y)


class FromDict(Net):
    def forward(self, values):
        return self.reduced(values["x"] + values["y"])


class Sums(Net):
    def forward(self, values):
        if not isinstance(values, dict):
            raise TypeError("give a dict")
        return self.reduced(sum(values.values()))


class FromBatch(Net):
    def forward(self, batch):
        return self.reduced(batch.x * batch.scale)


class Masked(Net):
    def forward(self, x, mask=None):
        return self.reduced(x if mask is None else x * mask)


class Any(Net):
    def forward(self, values):
        if isinstance(values, (list, tuple)):
            values = values[0] + values[1]
        elif isinstance(values, dict):
            values = values["x"] + values["y"]
        return self.reduced(values)


TABLE = {"x": X, "y": 2 * X}
CASES = {
    "list": (FromSequence, ([X, 2 * X],)),
    "tuple": (Unpacks, ((X, 2 * X),)),
    "dict": (FromDict, (TABLE,)),
    "values of a dict": (Sums, (TABLE,)),
    "dataclass": (FromBatch, (Batch(X, 2 * X),)),
    "None": (Masked, (X, None)),
    "a list, not a dict": (Any, ([X, 2 * X],)),
    "a dict, not a list": (Any, (TABLE,)),
    "neither": (Any, (X,)),
}


@pytest.mark.parametrize("case", CASES)
def test_any_form(case, tmp_path):
    make, inputs = CASES[case]
    model = make()
    wanted = model(*inputs)
    assert lean_fx.costs_of(model, inputs).macs == 2 * (32 * 32 + 32 * 4)
    (site,) = lean_fx.plan(model, inputs).sites
    assert site.layers == ("b",)
    with pytest.warns(lean_fx.LeanWarning, match="no layer to reduce"):
        same = lean_fx.leanify(model, inputs, skip=["b"])
    torch.testing.assert_close(same(*inputs), wanted)
    lean = lean_fx.leanify(model, inputs)
    assert lean(*inputs).shape == wanted.shape
    lean_fx.export_onnx(lean, tmp_path / "net.onnx", inputs)  # which compares both
    assert lean_fx.plan_of(tmp_path / "net.onnx").sites == lean_fx.plan_of(lean).sites


def test_they_are_compared():
    model, inputs = Sums(), (TABLE,)
    compared = lean_fx.compare(
        {"whole": model, "lean": lean_fx.leanify(model, inputs)}, inputs, rounds=2
    )
    assert [each.name for each in compared.models] == ["whole", "lean"]
    assert compared.models[0].macs == 32 * 32 + 32 * 4


class Timed(Net):
    def forward(self, time, x):
        return self.reduced(x) * time


@pytest.mark.parametrize("batch", ["dynamic", "static"])
def test_an_input_without_axes_is_exported_and_compared(batch, tmp_path):
    inputs = (torch.tensor(3.0), X)
    lean = lean_fx.leanify(Timed(), inputs)
    lean_fx.export_onnx(lean, tmp_path / "net.onnx", inputs, batch=batch)
    (one,) = lean_fx.compare({"lean": lean}, inputs, batches=(4,), rounds=2).models
    assert one.latencies[0].batch == 4


def test_exporting_leaves_the_modes_of_parts(tmp_path):
    model = FromDict().train()
    model.b.eval()
    lean_fx.export_onnx(model, tmp_path / "net.onnx", (TABLE,))
    assert model.training
    assert not model.b.training
