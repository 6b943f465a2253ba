"""What forward reads of its modules and others set later: refused there, or read at every call."""

import collections
import contextvars
import copy
import dataclasses
import os
import pickle
import threading
import types

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import lean_fx
from lean_fx.errors import CaptureError

X = torch.rand(2, 32)

pytestmark = pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")


class Scheduled(nn.Module):
    """Reads attributes of all kinds."""

    tau = 1.0

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 4)
        self._s, self.mask, self.weights, self.activation = 1.0, None, (1.0, 2.0), torch.tanh
        self.powers, self.gains = [1, 2], {"a": [1.0]}
        self.space = types.SimpleNamespace(power=1.0)

    @property
    def scale(self):
        return self._s

    @scale.setter
    def scale(self, value):
        self._s = value

    def forward(self, x):
        h = self.activation(self.a(x)) * self.scale * self.weights[0] / self.tau
        h = sum(h**power for power in self.powers) * self.gains["a"][0] ** self.space.power
        return self.b(h if self.mask is None else h * self.mask)


LATER = {
    "tau": 2.0,
    "_s": 2.0,
    "scale": 2.0,
    "mask": torch.zeros(32),
    "weights": (3.0, 1.0),
    "activation": torch.sigmoid,
    "powers": [1, 3],
    "gains": {"a": [2.0]},
    "space": types.SimpleNamespace(power=2.0),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", LATER)
def test_another_value_is_refused(name, nested):
    model = nn.Sequential(nn.Linear(32, 32), Scheduled()) if nested else Scheduled()
    lean = lean_fx.leanify(model, X)
    part = lean.get_submodule("1" if nested else "")
    before = getattr(Scheduled(), name)
    for each in (part, copy.deepcopy(lean).get_submodule("1" if nested else "")):
        if name != "space":
            setattr(each, name, before)  # the same is not a change
        with pytest.raises(CaptureError, match=f"^{name} was "):
            setattr(each, name, LATER[name])


class Asking(nn.Module):
    """Asks for what it may get later, in four ways."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 4)
        self.register_buffer("mask", None)
        self.register_parameter("gain", None)

    def forward(self, x):
        h = self.a(x) * getattr(self, "scale", 1.0)
        h = h if self.mask is None else h * self.mask
        h = h if self.gain is None else h * self.gain
        return self.b(h + self.shift if hasattr(self, "shift") else h)


@pytest.mark.parametrize("nested", [False, True])
def test_what_is_not_there_yet_cannot_be_set_in_silence(nested):
    lean = lean_fx.leanify(nn.Sequential(Asking()) if nested else Asking(), X)
    part = copy.deepcopy(lean).get_submodule("0" if nested else "")
    later = {"scale": 2.0, "shift": 1.0, "mask": torch.ones(32), "gain": nn.Parameter(X[0])}
    for name, value in later.items():
        with pytest.raises(CaptureError, match=f"^{name} was (missing|None) when the model was"):
            setattr(part, name, value)


def test_a_forward_that_reads_the_dict_of_its_module_is_not_traced():
    class Vars(Asking):
        def forward(self, x):
            return self.b(self.a(x) + self.__dict__["scale"] * x)

    model = nn.Sequential(Vars())
    model[0].scale = 1.0
    lean = lean_fx.leanify(model, X)
    before = lean(X)
    lean.get_submodule("0").scale = 2.0
    assert not torch.equal(lean(X), before)


def test_a_class_that_answers_for_attributes_by_its_dict_is_traced():
    class Configured(Asking):
        def __getattr__(self, name):
            if "config" in self.__dict__ and name in self.__dict__["config"]:
                return self.__dict__["config"][name]
            return super().__getattr__(name)

        def forward(self, x):
            return self.b(self.a(x).relu())

    lean = lean_fx.leanify(Configured(), X)
    assert isinstance(lean, torch.fx.GraphModule)
    assert all(site.nonnegative for site in lean_fx.plan_of(lean).sites)


def test_what_a_class_answers_by_its_dict_follows_it():
    class Configured(Asking):
        def __init__(self):
            super().__init__()
            self.config = {"temperature": 1.0}

        def __getattr__(self, name):
            if name in self.__dict__.get("config", {}):
                return self.__dict__["config"][name]
            return super().__getattr__(name)

        def forward(self, x):
            return self.b(self.a(x).relu()) * self.temperature

    with pytest.warns(lean_fx.LeanWarning, match="forward reads temperature, which __getattr__ co"):
        lean = lean_fx.leanify(Configured(), X)
    before = lean(X)
    lean.config = {"temperature": 3.0}
    torch.testing.assert_close(lean(X), 3 * before)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_constants_of_a_graph_keep_their_dtype(cast):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(32, 3)

        def forward(self, x):
            return self.a(x).float() * torch.tensor([3e5, 1.0, 257.0])

    model = Constant()
    lean = copy.deepcopy(lean_fx.leanify(model, X, min_channels=10**9))
    x = cast(nn.ParameterList([X]))[0]
    assert torch.equal(cast(lean)(x), cast(model)(x))


def test_a_schedule_over_modules_finds_what_it_sets():
    lean = lean_fx.leanify(nn.Sequential(Scheduled(), nn.ReLU()), X)
    lean = pickle.loads(pickle.dumps(lean))
    found = [each for each in lean.modules() if hasattr(each, "tau")]
    assert [each.tau for each in found] == [1.0]
    with pytest.raises(CaptureError, match="^tau was 1.0"):
        found[0].tau = 2.0


class Config:
    """Settings: an object, or the class itself."""

    tau = 1.0

    def __init__(self):
        self.power = 2.0


CONFIG = Config()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("holder", [CONFIG, Config])
def test_settings_are_read_at_every_call(holder, nested):
    class Reads(Scheduled):
        def forward(self, x):
            factor = CONFIG.power if holder is CONFIG else Config.tau
            return self.b(self.a(x)) / factor

    model = nn.Sequential(nn.Linear(32, 32), Reads()) if nested else Reads()
    lean = lean_fx.leanify(model, X, min_channels=64)
    CONFIG.power, Config.tau = 3.0, 4.0
    torch.testing.assert_close(lean(X), model(X))
    CONFIG.power, Config.tau = 2.0, 1.0


class Slotted:
    """Settings without a __dict__."""

    __slots__ = ("factor",)


VARIABLE = contextvars.ContextVar("VARIABLE", default=2.0)
OF_THREAD = threading.local()
NAMESPACE = types.SimpleNamespace(factor=2.0)
SLOTTED = Slotted()
FACTORS = {"factor": 2.0}
FLAGS = []
LAST = collections.deque([2.0])
NAME = "LEAN_FX_TEST_FACTOR"

OUTSIDE = {
    "dict": (lambda: FACTORS["factor"], lambda new: FACTORS.update(factor=new)),
    "list": (lambda: FLAGS[0] if FLAGS else 2.0, lambda new: FLAGS.insert(0, new)),
    "deque": (lambda: LAST[-1], lambda new: LAST.append(new)),
    "namespace": (lambda: NAMESPACE.factor, lambda new: setattr(NAMESPACE, "factor", new)),
    "slots": (lambda: SLOTTED.factor, lambda new: setattr(SLOTTED, "factor", new)),
    "context": (lambda: VARIABLE.get(), lambda new: VARIABLE.set(new)),
    "thread": (lambda: OF_THREAD.factor, lambda new: setattr(OF_THREAD, "factor", new)),
    "environ": (lambda: float(os.environ[NAME]), lambda new: os.environ.update({NAME: str(new)})),
    "getenv": (lambda: float(os.getenv(NAME)), lambda new: os.environ.update({NAME: str(new)})),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("place", OUTSIDE)
def test_what_lies_outside_the_model_is_read_at_every_call(place, nested, monkeypatch):
    read, write = OUTSIDE[place]
    monkeypatch.setenv(NAME, "2.0")
    OF_THREAD.factor = SLOTTED.factor = 2.0

    class Reads(Scheduled):
        def forward(self, x):
            return self.b(self.a(x)) / read()

    model = nn.Sequential(nn.Linear(32, 32), Reads()) if nested else Reads()
    lean = lean_fx.leanify(model, X, min_channels=64)
    before = model(X)
    write(3.0)
    assert not torch.allclose(model(X), before)
    torch.testing.assert_close(lean(X), model(X))
    write(2.0)


def test_a_variable_of_a_function_around_is_read_at_every_call():
    factor = [2.0]

    class Reads(Scheduled):
        def forward(self, x):
            return self.b(self.a(x)) / factor[0]

    model = nn.Sequential(nn.Linear(32, 32), Reads())
    lean = lean_fx.leanify(model, X, min_channels=64)
    factor[0] = 3.0
    torch.testing.assert_close(lean(X), model(X))


def test_globals_named_as_attributes_are_not_read():
    """A notebook has a list ``layers`` and a model with an attribute of that name."""
    code = (
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layers, self.config = nn.Linear(32, 32), 2.0\n"
        "    def forward(self, x):\n"
        "        return self.layers(x).tanh() * self.config\n"
        "layers, config, tanh = [64, 128], {'rate': 0.1}, collections.deque()\n"
    )
    home = {"nn": nn, "collections": collections, "__name__": "notebook"}
    exec(code, home)
    lean = lean_fx.leanify(home["Net"](), X)
    assert isinstance(lean, GraphModule)
    home["layers"].append(256)
    lean(X)


def test_numbers_and_tuples_outside_the_model_are_constants():
    sizes, factor = (1, 2), 2.0

    class Reads(Scheduled):
        def forward(self, x):
            return self.b(self.a(x)) / factor + sum(sizes)

    assert isinstance(lean_fx.leanify(Reads(), X, channels=4), GraphModule)


# -- classes of outputs ---------------------------------------------------------------------------


@dataclasses.dataclass
class Output(collections.OrderedDict):
    """As ModelOutput of transformers: fields that are items too, where they are given."""

    logits: Tensor | None = None
    hidden: Tensor | None = None

    def __post_init__(self):
        given = ((each.name, getattr(self, each.name)) for each in dataclasses.fields(self))
        self.update({name: value for name, value in given if value is not None})


class Mine(list):
    """A list of one's own."""


class Bag(collections.OrderedDict):
    """A dictionary of one's own."""


def with_an_attribute(y):
    bag = Bag(y=y)
    bag.loss = y.sum()
    return bag


OUTPUTS = {
    "first field": lambda y: Output(logits=y),
    "second field": lambda y: Output(hidden=y),
    "both": lambda y: Output(y, 2 * y),
    "without tensors": lambda y: (y, Mine([1, 2]), Bag()),
    "attribute": with_an_attribute,
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_classes_of_outputs(output):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x):
            return OUTPUTS[output](self.b(torch.relu(self.a(x))))

    model = Net()
    wanted, found = (each(X) for each in (model, lean_fx.leanify(model, X, min_channels=64)))
    if isinstance(wanted, tuple):
        assert [type(each) for each in found] == [type(each) for each in wanted]
        return
    assert (type(found), list(found)) == (type(wanted), list(wanted))
    torch.testing.assert_close(vars(found), vars(wanted))
    torch.testing.assert_close(list(found.values()), list(wanted.values()))
