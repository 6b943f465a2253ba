"""What a model does that a graph could lose is kept, refused or told."""

import collections
import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lean_fx
from lean_fx.errors import ArgumentError, BranchError, CaptureError, LeanError
from lean_fx.reduction.registry import make_reduction

X = torch.rand(2, 32)
NOTHING = {"min_channels": 10**9}  # to reduce


class Net(nn.Module):
    """Two layers, and what a function makes of the first one's values."""

    def __init__(self, between=lambda self, x: x, **attributes):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(32, 32), nn.Linear(32, 4), between
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.b(torch.relu(self.between(self, self.a(x))))


def told(model, *inputs):
    """A model that may have been captured, with nothing reduced, and what was said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lean = lean_fx.leanify(model, inputs, **NOTHING)
    return lean, [str(each.message) for each in caught]


# -- state of a model's own ---------------------------------------------------------------------

SEEN = {}
LAST = None


class Holder:
    """An object that holds state."""

    value = None


def in_an_attribute(self, x):
    x = x if self.last is None else x + self.last
    self.last = x.detach()
    return x


def in_a_list(self, x):
    x = x + self.items[-1] if self.items else x
    self.items.append(x.detach())
    return x


def in_a_dict(self, x):
    x = x + self.table["last"] if "last" in self.table else x
    self.table["last"] = x.detach()
    return x


def in_an_object(self, x):
    x = x if self.holder.value is None else x + self.holder.value
    self.holder.value = x.detach()
    return x


def in_a_global_dict(self, x):
    x = x + SEEN["last"] if "last" in SEEN else x
    SEEN["last"] = x.detach()
    return x


def in_a_global(self, x):
    global LAST
    x = x if LAST is None else x + LAST
    LAST = x.detach()
    return x


STATEFUL = {
    "attribute": lambda: Net(in_an_attribute, last=None),
    "list": lambda: Net(in_a_list, items=[]),
    "dict": lambda: Net(in_a_dict, table={}),
    "object": lambda: Net(in_an_object, holder=Holder()),
    "global dict": lambda: Net(in_a_global_dict),
    "global": lambda: Net(in_a_global),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", STATEFUL)
def test_state_lives_on(kind, nested):
    global LAST
    model = STATEFUL[kind]()
    if nested:
        model = nn.Sequential(nn.Linear(32, 32), model, nn.Linear(4, 4))
    lean, said = told(model, X)
    assert any("each layer reduces its own input" in each for each in said) or nested
    results = []
    for each in (model, lean):
        SEEN.clear()
        LAST = None
        results.append([each(X) for _ in range(3)])
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)
    assert not torch.equal(*results[0][:2])


# -- terms over parameters ----------------------------------------------------------------------


class Regularised(Net):
    def __init__(self, term):
        super().__init__()
        self.term = term

    def forward(self, x):
        return super().forward(x), self.term(self)


TERMS = {
    "parameters": lambda net: sum(p.pow(2).sum() for p in net.a.parameters()),
    "named": lambda net: sum(p.abs().sum() for n, p in net.named_parameters() if "weight" in n),
    "norm": lambda net: torch.stack([torch.linalg.norm(p) for p in net.parameters()]).sum(),
    "state_dict": lambda net: sum(each.sum() for each in net.state_dict(keep_vars=True).values()),
    "operators": lambda net: (2 * next(net.a.parameters()) @ X[0] - 1).mean(),
}


@pytest.mark.parametrize("term", TERMS)
def test_terms_over_parameters_follow_them(term):
    model = Regularised(TERMS[term])
    lean = copy.deepcopy(told(model, X)[0])
    for _ in range(2):
        lean(X)[1].backward()
    for each in (model, lean):
        each.load_state_dict({key: 2 * value for key, value in each.state_dict().items()})
    torch.testing.assert_close(lean(X)[1], model(X)[1])


# -- numbers that forward reads ------------------------------------------------------------------


def test_a_number_that_forward_reads_is_not_set_in_vain():
    scaled = Net(lambda self, x: x / self.tau, tau=1.0)
    lean = lean_fx.leanify(nn.Sequential(scaled, nn.ReLU()), X)
    text = "tau was 1.0 when the model was captured, and is part of its graph; set it on the model"
    with pytest.raises(CaptureError, match=text):
        lean.get_submodule("0").tau = 0.1
    with pytest.raises(CaptureError, match=text):
        copy.deepcopy(lean_fx.leanify(scaled, X)).tau = 0.1
    lean.get_submodule("0").tau = 1.0  # what it was
    lean.note = "another attribute"


def test_modes_of_parts():
    inner = Net(lambda self, x: torch.nn.functional.dropout(x, 0.5, self.training))
    model = nn.Sequential(inner, nn.ReLU(), nn.Linear(4, 4))
    lean = told(model, X)[0].train()
    assert not torch.equal(lean(X), lean(X))
    lean.get_submodule("0").eval()
    torch.testing.assert_close(lean(X), model.eval()(X))


# -- questions that have no place in a graph -----------------------------------------------------


QUESTIONS = {
    "is_grad_enabled": lambda self, x: x if torch.is_grad_enabled() else -x,
    "is_inference_mode": lambda self, x: -x if torch.is_inference_mode_enabled() else x,
    "is_autocast": lambda self, x: -x if torch.is_autocast_enabled("cpu") else x,
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_a_call_is_asked_for_is_asked_at_each(question):
    lean, said = told(model := Net(QUESTIONS[question]), X)
    assert any("each layer reduces its own input" in each for each in said)
    for context in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")):
        with context():
            torch.testing.assert_close(lean(X), model(X))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_stay(reentrant):
    def part(x):
        part.calls += 1
        return torch.tanh(x)

    def checkpointed(self, x):
        return checkpoint(part, x, use_reentrant=reentrant)

    part.calls = 0
    lean = told(Net(checkpointed), X)[0]
    part.calls = 0
    lean(X.clone().requires_grad_()).sum().backward()
    assert part.calls == 2  # the second in backward


# -- errors that are caught ----------------------------------------------------------------------


def is_exporting():
    try:
        return torch.compiler.is_exporting()
    except AttributeError:  # torch is older
        return False


def viewed(x):
    try:
        return x.view(-1)
    except RuntimeError:
        return x.reshape(-1)


def viewed_of(*given):
    try:
        return given[0].view(-1)
    except RuntimeError:
        return given[0].reshape(-1)


def test_a_function_that_is_given_nothing_may_catch_errors():
    class Asks(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if is_exporting() else super().forward(x) * 2

    model = Asks(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    lean = lean_fx.leanify(model, X, channels=4)
    assert isinstance(lean, torch.fx.GraphModule)
    assert [site.nonnegative for site in lean_fx.plan_of(lean).sites] == [True]


@pytest.mark.filterwarnings("ignore:.*has no layer to reduce:lean_fx.LeanWarning")
@pytest.mark.parametrize("function", [viewed, viewed_of])
def test_one_that_is_given_a_value_keeps_its_module(function):
    class Views(nn.Linear):
        def forward(self, x):
            return function(super().forward(x))

    model = nn.Sequential(nn.Linear(32, 32), Views(32, 4))
    lean = lean_fx.leanify(model, X, min_channels=64)
    for x in (X, X[:, None].expand(-1, 3, -1)):
        torch.testing.assert_close(lean(x), model(x))
    assert type(lean.get_submodule("1")) is Views


# -- classes of containers -----------------------------------------------------------------------


class Output(collections.OrderedDict):
    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class Pair(list):
    pass


class Both(tuple):
    __slots__ = ()


class Named(collections.UserDict):
    pass


Point = collections.namedtuple("Point", "x y")
MAKERS = {
    "OrderedDict": lambda x, y: Output(x=x, y=y),
    "list": lambda x, y: Pair([x, y]),
    "tuple": lambda x, y: Both([x, y]),
    "namedtuple": Point,
    "defaultdict": lambda x, y: collections.defaultdict(list, x=x, y=y),
    "within": lambda x, y: {"pair": Pair([x, Output(y=y)])},
}


class Makes(Net):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.make(self.b(h), h)


@pytest.mark.parametrize("maker", MAKERS)
def test_results_are_of_the_class_that_they_were(maker):
    def classes(value):
        if isinstance(value, dict):
            return type(value), {key: classes(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return type(value), [classes(each) for each in value]
        return type(value)

    model = Makes(MAKERS[maker])
    lean, _ = told(model, X)
    assert classes(lean(X)) == classes(model(X))
    torch.testing.assert_close(lean(X), model(X))
    assert classes(lean_fx.leanify(Makes(MAKERS[maker]), X)(X)) == classes(model(X))


# -- inputs --------------------------------------------------------------------------------------


class Masked(Net):
    def forward(self, x, mask=None):
        return super().forward(x if mask is None else x * mask)


def test_an_optional_input_that_was_given_is_given_again():
    lean, _ = told(Masked(), X, torch.ones(2, 32))
    with pytest.raises(BranchError, match="mask is None, but the model was captured where it is g"):
        lean(X)
    lean, _ = told(Masked(), X)
    with pytest.raises(BranchError, match="mask"):
        lean(X, torch.ones(2, 32))


def test_an_optional_input_that_is_handed_on_may_be_left_out():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.b = nn.GRU(32, 32), nn.Linear(32, 4)

        def forward(self, x, state=None):
            return self.b(self.rnn(x, state)[0])

    model, steps, state = Recurrent(), torch.rand(3, 2, 32), torch.rand(1, 2, 32)
    lean, said = told(model, steps, state)
    assert not said or "nothing" in " ".join(said) or all("reduc" in each for each in said)
    torch.testing.assert_close(lean(steps), model(steps))
    torch.testing.assert_close(lean(steps, state), model(steps, state))


class AnyArgs(Net):
    def forward(self, x, *args, **kwargs):
        return super().forward(x, *args, **kwargs)


def test_args_that_are_empty():
    lean = lean_fx.leanify(AnyArgs(), X)
    assert lean.b.in_features == 4
    with pytest.raises(TypeError):
        lean(X, X)


def test_the_length_of_a_value_is_asked_at_each_call():
    model = Net(lambda self, x: x / len(x))
    lean, _ = told(model, X)
    torch.testing.assert_close(lean(torch.ones(5, 32)), model(torch.ones(5, 32)))


# -- layers and parts ----------------------------------------------------------------------------


def test_a_non_persistent_buffer_stays_one():
    class Positioned(Net):
        def __init__(self):
            super().__init__(lambda self, x: x + self.where)
            self.register_buffer("where", torch.rand(32), persistent=False)

    model = Positioned()
    lean = lean_fx.leanify(nn.Sequential(model, nn.ReLU()), X)
    alone = lean_fx.leanify(model, X)
    for each in (lean, alone):
        for same in (each, copy.deepcopy(each), pickle.loads(pickle.dumps(copy.deepcopy(alone)))):
            assert not any("where" in key for key in same.state_dict())


class CallsSuper(Net):
    def train(self, mode=True):
        return super().train(mode)

    def eval(self):
        return super().eval()


def test_a_train_that_calls_that_of_torch_is_no_reason():
    lean = lean_fx.leanify(CallsSuper(), X)
    assert lean.b.in_features == 4
    assert lean.eval().training is False


def test_a_forward_replaced_on_the_instance_stays():
    model = Net()
    plain = model.b.forward
    model.b.forward = lambda x: plain(x) + 1
    made = lean_fx.plan(model, X)
    (left,) = [each for each in made.left_alone if each.layer == "b"]
    assert (left.reason.code, left.reason.text) == (
        "own_forward",
        "its forward is replaced on the instance, which a rebuilt layer would lose",
    )
    lean = made.apply(model, X)
    assert lean(X).shape == (2, 4)
    assert lean.b.forward is model.b.forward or torch.equal(lean.b(X), model.b(X))


@pytest.mark.parametrize(
    ("wrap", "name"), [(nn.DataParallel, "DataParallel"), (torch.compile, "OptimizedModule")]
)
def test_a_wrapped_part_is_named(wrap, name):
    model = nn.Sequential(nn.Linear(32, 32), wrap(nn.Sequential(nn.Linear(32, 4), nn.ReLU())))
    with pytest.raises(ArgumentError, match=f"its part '1' is a {name}, which wraps a module to"):
        lean_fx.leanify(model, X)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("form", ["graph", "module"])
def test_a_part_of_torchscript_is_named(form):
    model = nn.Sequential(nn.Linear(32, 32), torch.jit.script(nn.Linear(32, 4)))
    with pytest.raises(ArgumentError, match=r"its part '1' is of TorchScript; put the module"):
        lean_fx.leanify(model, X, form=form)


@pytest.mark.filterwarnings("ignore:.*its submodule 'meta':lean_fx.LeanWarning")
@pytest.mark.parametrize("name", ["meta", "lean_fx"])
def test_the_name_of_a_part_is_free(name):
    class Tabular(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(name, nn.Linear(32, 32))
            self.b = nn.Linear(32, 4)

        def forward(self, x):
            return self.b(torch.relu(getattr(self, name)(x)))

    lean = lean_fx.leanify(Tabular(), X)
    assert lean_fx.plan_of(lean).sites
    assert lean_fx.plan(Tabular(), X).apply(Tabular(), X)(X).shape == (2, 4)


def test_asking_for_the_type_of_a_weight_reads_no_number():
    model = Net(lambda self, x: x.to(self.b.weight.dtype).to(self.b.weight.device))
    assert lean_fx.leanify(model, X).b.in_features == 4


def test_plans_and_leanify_give_parameters_in_one_order():
    class Net2(Net):
        def forward(self, x):
            return self.b(torch.relu(self.a(x))) + self.a.bias.sum()

    for model in (Net(), Net2(), nn.Sequential(Net(), nn.ReLU(), nn.GRU(4, 16))):
        inputs = X
        lean = lean_fx.leanify(model, inputs, min_channels=4)
        again = lean_fx.plan(model, inputs, min_channels=4).apply(model, inputs)
        assert [n for n, _ in lean.named_parameters()] == [n for n, _ in again.named_parameters()]


@pytest.mark.parametrize("reduction", lean_fx.reductions())
@pytest.mark.parametrize("given", [True, False])
def test_a_view_works_as_before(reduction, given):
    class Cnn(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.d = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
            self.f = nn.Linear(32 * 16, 10)

        def forward(self, x):
            x = torch.relu(self.d(torch.relu(self.c(x))))
            n, c, h, w = x.shape
            return self.f(x.view(n, c, h * w).view(-1, 32 * 16))

    x = torch.rand(3, 3, 4, 4)
    lean = lean_fx.leanify(Cnn(), x if given else None, channels=4, reduction=reduction)
    assert lean(x).shape == (3, 10)
    for dim, shape in ((1, (2, 32, 3, 3)), (-1, (2, 5, 32)), (2, (2, 3, 32, 2))):
        reduced = make_reduction(reduction, 32, 4, dim=dim)(torch.rand(shape))
        assert reduced.is_contiguous() or reduction == "slice", (dim, reduced.stride())


def test_every_refusal_is_one_of_ours():
    model = Net(lambda self, x: checkpoint(lambda y: y, x, use_reentrant=False))
    with pytest.raises(LeanError, match="Net: torch.fx cannot trace its forward"):
        lean_fx.plan(model)


class Table(dict):
    cleared = 0

    def clear(self):
        Table.cleared += 1
        super().clear()


TABLE = Table(scale=2.0)


def test_what_a_trace_has_not_changed_is_not_written():
    model = Net(lambda self, x: x * TABLE["scale"])
    lean, _ = told(model, X)
    torch.testing.assert_close(lean(X), model(X))
    assert Table.cleared == 0
    assert TABLE == {"scale": 2.0}


class OfItsClass(Net):
    scale = 1.0

    def forward(self, x):
        type(self).scale *= 2
        return type(self).scale * super().forward(x)


class Counts(Net):
    calls = 0

    @property
    def factor(self):
        self.calls = self.calls + 1
        return float(self.calls)

    def forward(self, x):
        return self.factor * super().forward(x)


class Remembers(Net):
    def forward(self, x, memo=[]):  # noqa: B006
        memo.append(1)
        return len(memo) * super().forward(x)


@pytest.mark.parametrize("kind", [OfItsClass, Counts, Remembers])
def test_state_of_a_class_of_a_property_and_of_a_default(kind):
    model = nn.Sequential(nn.Linear(32, 32), kind())
    lean, _ = told(model, X)
    assert OfItsClass.scale == 1.0
    assert Remembers.forward.__defaults__ == ([],)
    results = []
    for each in (model, lean):
        results.append([each(X) for _ in range(3)])
        OfItsClass.scale = 1.0
        Remembers.forward.__defaults__[0].clear()
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)
    assert not torch.equal(*results[0][:2])
    told(model, X)
    OfItsClass.scale = 3.0  # is not hidden by what a trace has set
    assert all(each.scale == 3.0 for each in lean.modules() if isinstance(each, OfItsClass))
    OfItsClass.scale = 1.0


# -- values made strings -------------------------------------------------------------------------


class Texts(Net):
    def __init__(self, text):
        super().__init__()
        self.text = text

    def forward(self, x):
        y = super().forward(x)
        return y * 2 if self.text(x) else y


@pytest.mark.parametrize(
    "text",
    [
        lambda x: str(x.dtype) == "torch.float32",
        lambda x: "cpu" in str(x.device),
        lambda x: str(x.shape[1]) in ("32", "64"),
        lambda x: str(x.size(1)) == "32",
    ],
)
def test_a_value_that_is_made_a_string_is_no_constant(text):
    model = Texts(text)
    with pytest.raises(CaptureError, match="is made a string, which example_inputs would allow"):
        lean_fx.leanify(model)
    lean, _ = told(model, X)
    assert isinstance(lean, torch.fx.GraphModule)
    assert torch.equal(lean(X), model(X))


def test_another_string_is_refused():
    lean, _ = told(Texts(lambda x: str(x.shape[0]) == "2"), X)
    with pytest.raises(BranchError, match=r"gives 3 for these inputs, .* where it gives 2"):
        lean(torch.rand(3, 32))


def test_what_is_printed_or_said_of_a_value_is_no_question(capsys):
    def speak(x):
        print(x.shape)
        torch._assert(x.shape[0] > 0, f"an empty batch: {x.shape}")

    for given in ((), (X,)):
        lean, _ = told(model := Texts(speak), *given)
        assert torch.equal(lean(torch.cat([X, X])), model(torch.cat([X, X])))
    assert capsys.readouterr().out
