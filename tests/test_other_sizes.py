"""Sizes that a model takes and its graph refuses: found at leanify, in a part or in the model."""

import builtins

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lean_fx
from lean_fx.capture.capturing import capture
from lean_fx.capture.questions import answering, converting_sizes
from lean_fx.capture.tracing import LeanTracer
from lean_fx.errors import BranchError, LeanWarning
from lean_fx.graph.patching import patching


class Frames(nn.Module):
    """Pads up to whole frames."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(1, 32, 16, stride=8), nn.Conv1d(32, 32, 3, padding=1)

    def forward(self, x):
        rest = (x.shape[-1] - 16) % 8
        if rest:
            x = F.pad(x, (0, 8 - rest))
        return self.b(F.relu(self.a(x)))


class OfBatches(nn.Module):
    """Branches on the size of the batch."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x):
        x = F.relu(self.a(x))
        if len(x) > 4:
            x = x * 2
        return self.b(x)


class Times(nn.Module):
    """Takes a batch of rows, and one number for each."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x, time):
        if time.shape[0] % 2:
            time = torch.cat([time, time])[: len(time)]
        return self.b(F.relu(self.a(x)) * time[:, None])


class AsksForNumbers(OfBatches):
    """Cannot run on tensors without numbers."""

    def __init__(self):
        super().__init__()
        self.inner = Numbers()

    def forward(self, x):
        return self.inner(super().forward(x))


class Numbers(nn.Module):
    def forward(self, x):
        return x if x.sum().item() > 0 else -x


class Several(nn.Module):
    """Takes a single sample another way."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x):
        x = F.relu(self.a(x))
        if len(x) > 1:
            x = x - x.mean(0)
        return self.b(x)


CASES = {
    "single": (Several, (torch.randn(4, 8),), (torch.randn(1, 8),), "if len(x) > 1:"),
    "frames": (Frames, (torch.randn(2, 1, 800),), (torch.randn(2, 1, 1203),), "if rest:"),
    "batches": (OfBatches, (torch.randn(4, 8),), (torch.randn(6, 8),), "if len(x) > 4:"),
    "times": (
        Times,
        (torch.randn(2, 8), torch.rand(2)),
        (torch.randn(3, 8), torch.rand(3)),
        "if time.shape[0] % 2:",
    ),
    "numbers": (AsksForNumbers, (torch.rand(4, 8),), (torch.rand(6, 8),), "if len(x) > 4:"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_model_whose_graph_refuses_them_is_told_of(name):
    make, inputs, others, code = CASES[name]
    model = make()
    with pytest.warns(LeanWarning, match="form='module' takes what the model takes") as caught:
        lean = lean_fx.leanify(model, inputs)
    assert code in str(caught[0].message)
    assert caught[0].filename == __file__
    with pytest.raises(BranchError):
        lean(*others)
    with pytest.warns(LeanWarning, match="form='module' takes"):
        lean_fx.plan(model, inputs)
    module = lean_fx.leanify(model, inputs, form="module")
    assert module(*others).shape == model(*others).shape
    assert module(*inputs).shape == model(*inputs).shape
    assert lean_fx.plan_of(module).sites


@pytest.mark.parametrize("name", CASES)
def test_a_part_that_would_refuse_them_stays_whole(name):
    make, inputs, others, _ = CASES[name]

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.part = nn.Identity(), make()
            self.head = nn.LazyLinear(32)
            self.last = nn.Linear(32, 2)

        def forward(self, *given):
            return self.last(F.relu(self.head(self.part(*map(self.stem, given)))))

    class OuterOfTwo(Outer):
        def forward(self, x, time):
            return super().forward(x, time)

    class OuterOfOne(Outer):
        def forward(self, x):
            return super().forward(x)

    model = (OuterOfOne if len(inputs) == 1 else OuterOfTwo)()
    model(*inputs)
    lean = lean_fx.leanify(model, inputs)
    if name == "frames":
        inputs, others = inputs[:1], (torch.randn(3, 1, 800),)  # the head fits one length
    assert lean(*others).shape == (len(others[0]), *model(*others).shape[1:])


def test_models_that_take_nothing_else_are_not_told_of():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)

        def forward(self, x):
            if len(x) != 4:
                raise ValueError("a batch of 4")
            return self.b(F.relu(self.a(x)))

    assert lean_fx.leanify(Fixed(), torch.rand(4, 8))(torch.rand(4, 8)).shape == (4, 4)


def test_asking_leaves_globals_and_random_numbers():
    class Counts(OfBatches):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.5, True))

    model, x = Counts(), torch.rand(4, 8)
    before = torch.get_rng_state()
    with pytest.warns(LeanWarning, match="form='module' takes"):
        lean_fx.plan(model, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert capture(model, (x,))(x).shape == (4, 4)


def test_code_that_several_parts_share_refuses_for_one():
    def checked(x):
        return x * 2 if len(x) > 4 else x

    class Part(nn.Module):
        """Refuses."""

        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 32)

        def forward(self, x):
            return F.relu(self.a(checked(x)))

    class Other(nn.Module):
        """Asks the same of what has always one size, and holds the layers."""

        def __init__(self):
            super().__init__()
            self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x):
            return self.c(F.relu(checked(self.b(x).T).T))

    lean = lean_fx.leanify(nn.Sequential(Part(), Other()), torch.rand(4, 8))
    assert lean(torch.rand(6, 8)).shape == (6, 4)
    assert isinstance(lean, torch.fx.GraphModule)
    assert {site.layers for site in lean_fx.plan_of(lean).sites} == {("1.b",), ("1.c",)}


def as_an_int(x):
    return x.reshape(int(x.size(0)), -1)


def half_as_an_int(x):
    return x.reshape(2 * int(x.size(0) / 2), -1)


def by_a_float(x):
    return x.flatten(1) / float(x.shape[0])


@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
@pytest.mark.parametrize("inputs", ["inputs", "none"])
@pytest.mark.parametrize("view", [as_an_int, half_as_an_int, by_a_float])
def test_a_size_as_a_number_of_python_follows_the_size(view, inputs, tmp_path):
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 32, 3), nn.Linear(32 * 16, 4)

        def forward(self, x):
            return self.b(view(F.relu(self.a(x))))

    model, x = Sized(), torch.rand(4, 3, 6, 6)
    same = lean_fx.leanify(model, x if inputs == "inputs" else None, min_channels=10**9)
    for count in (4, 2, 6):
        other = torch.rand(count, 3, 6, 6)
        torch.testing.assert_close(same(other), model(other))
    if view is not half_as_an_int:  # which cannot take a single row
        lean_fx.export_onnx(same, tmp_path / "net.onnx", x)  # it is checked at other batches too


@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
def test_the_builtin_stays_where_it_is_more_than_called():
    class Asking(nn.Linear):
        def forward(self, x):
            kinds = {int: 1.0, float: 2.0}
            return super().forward(x) * kinds[int] * kinds[int] / int(2.5)

    model, x = nn.Sequential(nn.Linear(8, 32), Asking(32, 4)), torch.rand(2, 8)
    assert torch.equal(lean_fx.leanify(model, x, min_channels=10**9)(x), model(x))


class Sized(nn.Linear):
    def forward(self, x):
        return x.reshape(int(x.size(0)), -1)


def is_int(value):
    return isinstance(value, int)


def test_another_thread_may_run_code_of_the_same_file_meanwhile():
    patches = converting_sizes([Sized(2, 2)]), answering(LeanTracer(), [globals()])
    with patching(patches[0]), patching(patches[1]):
        assert int is not builtins.int
        assert is_int(int("3"))
        assert not is_int(3.0)
    assert int is builtins.int
