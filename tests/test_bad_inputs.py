"""Example inputs that do not fit a model: refused in one line, by everything that takes them."""

import re
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import lean_fx
from lean_fx.errors import ArgumentError, CaptureError, ExportError

X = torch.rand(2, 4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


def refused(call, text):
    with pytest.raises((ArgumentError, CaptureError, ExportError)) as caught:
        call()
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("inputs", ["x", {X}, X.numpy(), 3, (each for each in [X])])
def test_what_is_neither_a_tensor_nor_a_tuple(inputs, tmp_path):
    text = f"example_inputs={type(inputs).__name__} object is neither a tensor nor a tuple; give "
    refused(lambda: lean_fx.plan(Net(), inputs), text)
    refused(lambda: lean_fx.plan(Net()).apply(Net(), inputs), text)
    refused(lambda: lean_fx.costs_of(Net(), inputs), text)
    refused(lambda: lean_fx.export_onnx(Net(), tmp_path / "a.onnx", inputs), text)
    refused(lambda: lean_fx.compare({"a": Net()}, inputs), text)


DTYPE = "mat1 and mat2 must have the same dtype, but got "


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (
            X.long(),
            f"a([2, 4]) failed on what comes from 'x' ({DTYPE}Long and Float); give inputs of the shape and dtype",
        ),
        (X.double(), f"a([2, 4]) failed on what comes from 'x' ({DTYPE}Double and Float); "),
        (X > 0, f"a([2, 4]) failed on what comes from 'x' ({DTYPE}Bool and Float); "),
        (
            torch.rand(2, 5),
            "a([2, 5]) failed on what comes from 'x' (a and b must have same reduction dim",
        ),
        (
            torch.tensor(1.0),
            "a([]) failed on what comes from 'x' (both arguments to linear need to be at least 1D",
        ),
        ((None,), "a(None) failed ("),
        (["x"], "a(x) failed on what comes from 'x' ("),
        ((X, X), "example_inputs: 2 given, but the model takes 1 (x); give one tensor, or a tuple"),
    ],
)
def test_inputs_that_do_not_fit(inputs, text, tmp_path, capfd):
    refused(lambda: lean_fx.plan(Net(), inputs), text)
    refused(lambda: lean_fx.leanify(Net(), inputs), text)
    refused(lambda: lean_fx.costs_of(Net(), inputs), "")
    refused(lambda: lean_fx.export_onnx(Net(), tmp_path / "a.onnx", inputs), "")
    refused(lambda: lean_fx.compare({"a": Net()}, inputs), "")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_model_whose_parts_do_not_fit_each_other():
    model = Net()
    model.b.half()
    refused(
        lambda: lean_fx.plan(model, X),
        f"b([2, 32]) failed on what comes from 'x' ({DTYPE}Float and Half); ",
    )


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_inputs():
    inputs = torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)
    refused(
        lambda: lean_fx.plan(Net(), inputs), "input 0 is a tensor of quint8 whose shapes cannot"
    )


@pytest.mark.parametrize(
    "inputs",
    [
        *(torch.full((2, 4), float("nan")), torch.full((2, 4), float("inf")), X.to_sparse()),
        *(X.clone().requires_grad_(), torch.rand(0, 4), torch.rand(4), torch.rand(2, 3, 4)),
    ],
    ids=["NaN", "infinite", "sparse", "with a gradient", "no rows", "no batch", "more axes"],
)
def test_inputs_whose_values_do_not_matter(inputs):
    plan = lean_fx.plan(Net(), inputs)
    assert [site.layers for site in plan.sites] == [("b",)]
    lean = plan.apply(Net())
    assert all(parameter.isfinite().all() for parameter in lean.parameters())


def test_inputs_are_not_written_to():
    class Writes(Net):
        def forward(self, x, index):
            index.add_(1)
            return super().forward(x.clamp_(max=0)) / (index.sum() - index.sum())

    x, index = X.clone(), torch.zeros(2, dtype=torch.int64)
    for call in (lean_fx.plan, lean_fx.leanify, lean_fx.costs_of):
        call(Writes(), (x, index))
        assert x.equal(X)
        assert not index.any()


def test_apply_takes_no_inputs_as_leanify_does():
    assert lean_fx.plan(Net(), None).apply(Net(), None).b.in_features == 4


class Any(Net):
    def forward(self, *xs):
        return super().forward(sum(xs))


class Named(Net):
    def forward(self, **named):
        return super().forward(named["x"])


def test_any_number_of_inputs():
    kept = "takes *xs, a graph a fixed number of inputs); each layer reduces its own input"
    with pytest.warns(lean_fx.LeanWarning, match=re.escape(kept)):
        reduced = lean_fx.leanify(Any(), (X, X))
    assert reduced.b.in_features == 4
    assert reduced(X, X, X).shape == Net()(X).shape
    refused(lambda: lean_fx.leanify(Any()), "Any: torch.fx cannot trace its forward")
    refused(lambda: lean_fx.costs_of(Any(), (X, X)), "takes *xs, a graph a fixed number of inputs")
    refused(lambda: lean_fx.plan(Named(), (X, X)), "Named cannot run on them")


class Told(nn.Module):
    """Reads names and numbers."""

    def __init__(self):
        super().__init__()
        self.words, self.a, self.b = nn.Embedding(9, 32), nn.Linear(4, 32), nn.Linear(32, 8)

    def forward(self, names, numbers):
        return self.b(F.relu(self.words(names) + self.a(numbers)))


class Looping(Told):
    """No graph: it asks for a value."""

    def forward(self, names, numbers):
        while numbers.sum() > 9:
            numbers = numbers / 2
        return super().forward(names, numbers)


@pytest.mark.parametrize("form", ["graph", "module"])
@pytest.mark.parametrize("wrong", ["names", "numbers"])
def test_an_input_of_another_dtype_is_told_by_its_name(wrong, form):
    given = {"names": torch.zeros(2, dtype=torch.int64), "numbers": X}
    given[wrong] = given[wrong].double()
    text = f"failed on what comes from '{wrong}' ("
    refused(lambda: lean_fx.leanify(Told(), given, form=form), text)
    kinds = [f"{name} {str(each.dtype)[6:]}{list(each.shape)}" for name, each in given.items()]
    text = f"example_inputs: Looping cannot run on them, {', '.join(kinds)} ("
    refused(lambda: lean_fx.leanify(Looping(), given, form=form), text)


@dataclass
class Result:
    y: Tensor


class Structured(Net):
    def forward(self, x):
        return Result(super().forward(x))


class Dictionary(Net):
    def forward(self, x):
        return {"y": super().forward(x)}


def test_outputs_of_other_forms(tmp_path):
    assert lean_fx.leanify(Dictionary(), X)(X)["y"].shape == (2, 8)
    assert lean_fx.leanify(Structured(), X)(X).y.shape == (2, 8)
    lean_fx.export_onnx(Dictionary(), tmp_path / "a.onnx", X)
    refused(
        lambda: lean_fx.compare({"a": Structured()}, X),
        "compare: 'a' returns a Result, in which no tensors can be found; return tensors, or ",
    )


class Packed(nn.Module):
    """A stack that takes packed sequences."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.GRU(32, 32), nn.GRU(32, 16)

    def forward(self, packed):
        return self.second(self.first(packed)[0])[1]


class Packs(nn.Module):
    """A net that packs its sequences itself."""

    def __init__(self):
        super().__init__()
        self.a, self.gru = nn.Linear(4, 32), nn.GRU(32, 16, batch_first=True)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(
            F.relu(self.a(x)), lengths, batch_first=True, enforce_sorted=False
        )
        return self.gru(packed)[1]


def sequences(*shapes, **options):
    return pack_sequence([torch.ones(shape, **options) for shape in shapes])


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (
            sequences((3, 30), (2, 30)),
            "first(packed) failed on what comes from 'packed' (input.size(-1) must be equal to input",
        ),
        (
            sequences((3, 32, 2), (2, 32, 2)),
            "first(packed) failed on what comes from 'packed' (input must have 2 dimensions",
        ),
        (
            sequences((3, 32), dtype=torch.int64),
            "first(packed) failed on what comes from 'packed' (RNN input dtype (torch.int",
        ),
        (
            PackedSequence(torch.rand(0, 32), torch.zeros(0, dtype=torch.int64)),
            "example_inputs: packed sequences without a step; give one or more",
        ),
    ],
)
def test_packed_sequences_that_do_not_fit(inputs, text):
    for call in (lean_fx.plan, lean_fx.leanify):
        refused(lambda call=call: call(Packed(), inputs), text)


@pytest.mark.parametrize(
    ("lengths", "text"),
    [
        (
            [5, 0],
            "failed on what comes from 'x' and 'lengths' (Length of all samples has to be greater than 0",
        ),
        ([9, 3], "gru(pack_padded_sequence) failed on what comes from 'x' and 'lengths' ("),
        ([5, 3, 2], "pack_padded_sequence([2, 5, 32], [3]) failed on what comes from 'x' and "),
    ],
)
def test_lengths_that_do_not_fit(lengths, text):
    inputs = torch.rand(2, 5, 4), torch.tensor(lengths)
    refused(lambda: lean_fx.plan(Packs(), inputs), text)
