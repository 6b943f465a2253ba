"""What forward asks of its inputs: types, keys, items that may be None, the number of axes."""

import collections.abc
import dataclasses
import warnings

import pytest
import torch
from torch import Tensor, nn

import lean_fx
from lean_fx.errors import BranchError, CaptureError, LeanError

X = torch.rand(2, 32)
Y = torch.rand(2, 5, 32)


class Net(nn.Module):
    """Two layers around a function; another makes one value of the inputs."""

    def __init__(self, between=lambda h: h, first=lambda x: x):
        super().__init__()
        self.a, self.b, self.between, self.first = (
            nn.Linear(32, 32),
            nn.Linear(32, 4),
            between,
            first,
        )

    def forward(self, x, scale=1.0):
        return self.b(torch.relu(self.between(self.a(self.first(x))))) * scale


def captured(model, *inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lean_fx.LeanWarning)
        return lean_fx.leanify(model, inputs or None, min_channels=10**9)


def matched(h):
    match h:
        case Tensor():
            return h * 2
    return h


QUESTIONS = {
    "isinstance": lambda h: h * 2 if isinstance(h, Tensor) else h,
    "is_tensor": lambda h: h * 2 if torch.is_tensor(h) else h,
    "type": lambda h: h * 2 if type(h) is Tensor else h,
    "class": lambda h: h * 2 if h.__class__ is Tensor else h,
    "match": matched,
    "iterable": lambda h: h * 2 if isinstance(h, collections.abc.Iterable) else h,
    "tuple": lambda h: h[0] if isinstance(h, tuple | list) else h * 2,
    "hasattr": lambda h: h * 2 if hasattr(h, "shape") and not hasattr(h, "scale") else h,
    "getattr": lambda h: h * getattr(h, "scale", 3.0),
    "size in a table": lambda h: h * {2: 3.0, 5: 7.0}.get(h.shape[0], 11.0),
    "dtype in a set": lambda h: h * 3 if h.dtype in {torch.float32} else h,
    "device": lambda h: h * {torch.device("cpu"): 2.0}[h.device],
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("question", QUESTIONS)
def test_questions(question, given, nested):
    model = Net(QUESTIONS[question])
    model = nn.Sequential(nn.Linear(32, 32), model) if nested else model
    try:
        lean = captured(model, *[X] * given)
    except CaptureError:
        assert not given
        return
    torch.testing.assert_close(lean(X), model(X))


def test_an_option_in_a_set():
    class Modes(Net):
        def forward(self, x, mode="sum"):
            return self.b(self.a(x)) * (2 if mode in {"sum"} else 3)

    model = Modes()
    lean = captured(model, X)
    torch.testing.assert_close(lean(X), model(X))
    with pytest.raises(BranchError, match="gives mean for these inputs"):
        lean(X, "mean")


@torch.jit.script
def scripted(x):
    return x * torch.sigmoid(x)


CPP = {
    "jit": scripted,
    "vmap": torch.vmap(torch.sin),
    "grad": lambda h: torch.func.grad(lambda each: each.sum())(h),
    "dlpack": lambda h: torch.from_dlpack(h.detach()),
    "nested": lambda h: torch.nested.nested_tensor([h, h]).to_padded_tensor(0.0)[0],
}


@pytest.mark.parametrize("function", CPP)
def test_functions_of_cpp_get_no_proxies(function):
    model = Net(lambda h: CPP[function](h) if h.shape[0] < 99 else h)
    lean = captured(model, X)
    torch.testing.assert_close(lean(X), model(X))


# -- inputs in containers -------------------------------------------------------------------------


@dataclasses.dataclass
class Batch:
    """An input of a class of its own."""

    x: Tensor
    mask: Tensor | None = None


class Bare:
    """An input that may lack an attribute."""

    def __init__(self, **fields):
        vars(self).update(fields)


def membership(b):
    return b["x"] * b["mask"] if "mask" in b else b["x"]


def get(b):
    mask = b.get("mask")
    return b["x"] if mask is None else b["x"] * mask


def values(b):
    return sum(b.values())


def items(b):
    return sum(value for key, value in b.items() if key != "mask")


def attribute(b):
    return b.x if b.mask is None else b.x * b.mask


def item(b):
    return b["x"] if b["mask"] is None else b["x"] * b["mask"]


def present(parts):
    return sum(each for each in parts if each is not None)


ONE, BOTH = {"x": X}, {"x": X, "mask": torch.zeros(2, 32)}
FORMS = {
    "in": (membership, ONE, BOTH),
    "get": (get, ONE, BOTH),
    "values": (values, ONE, BOTH),
    "items": (items, ONE, {"x": X, "y": X}),
    "None in a dict": (item, {"x": X, "mask": None}, BOTH),
    "dataclass": (attribute, Batch(X), Batch(X, X * 0)),
    "None in a list": (present, [X, None], [X, X]),
    "tuple": (lambda x: x[0] if isinstance(x, tuple) else x, (X, X), X),
    "hasattr": (
        lambda b: b.x * b.mask if hasattr(b, "mask") else b.x,
        *(Bare(x=X), Bare(x=X, mask=X * 0)),
    ),
    "axes": (lambda x: x.mean(1) if x.ndim == 3 else x, X, Y),
    "axes of an item": (lambda b: b["x"].mean(1) if b["x"].dim() == 3 else b["x"], ONE, {"x": Y}),
    "axes unpacked": (lambda x: x.reshape(-1, *([1] * (len(x.shape) - 2)), 32), X, Y),
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, swapped):
    first, given, later = FORMS[form]
    given, later = (later, given) if swapped else (given, later)
    model = Net(first=first)
    lean = captured(model, given)
    torch.testing.assert_close(lean(given), model(given))
    try:
        torch.testing.assert_close(lean(later), model(later))
    except LeanError as error:
        assert "capture it with" in str(error)  # noqa: PT017 (either is right)


@pytest.mark.parametrize("between", [lambda h: h.mean(1) if h.ndim == 3 else h])
def test_axes_of_a_value_are_those_of_the_inputs(between):
    model = Net(between)
    lean = captured(model, X)
    with pytest.raises(BranchError, match="gives 3 for these inputs"):
        lean(Y)


def test_the_type_of_an_option():
    class Scaled(Net):
        def forward(self, x, scale):
            return self.b(self.a(x)) * (scale if isinstance(scale, float) else scale * 10)

    lean = captured(Scaled(), X, 2.0)
    with pytest.raises(BranchError, match="is of type Tensor for these inputs"):
        lean(X, torch.tensor(2.0))
