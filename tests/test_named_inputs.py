"""Example inputs given by name, as models are called with keyword arguments."""

import pickle

import pytest
import torch
from torch import nn

import lean_fx
from lean_fx.capture.example_inputs import as_inputs, call
from lean_fx.errors import ArgumentError

IDS = torch.randint(0, 50, (2, 7))
MASK = torch.ones(2, 7)


class Encoder(nn.Module):
    """Called by name, as those of transformers: everything is optional."""

    def __init__(self):
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, ids=None, mask=None, embedded=None, scale=2.0, return_dict=True):
        h = self.embed(ids) if embedded is None else embedded
        h = torch.relu(self.a(h))
        if mask is not None:
            h = h * mask[:, :, None]
        y = self.b(h) * scale
        return {"logits": y} if return_dict else (y,)


pytestmark = pytest.mark.filterwarnings("ignore:leanify")

FORMS = [
    {"ids": IDS},
    {"ids": IDS, "mask": MASK},
    {"mask": MASK, "ids": IDS},
    {"embedded": torch.rand(2, 7, 32)},
    {"ids": IDS, "return_dict": False},
]


@pytest.mark.parametrize("given", FORMS)
def test_all_that_takes_inputs_takes_them_by_name(given, tmp_path):
    model = Encoder().eval()
    lean = lean_fx.leanify(model, given)
    assert isinstance(lean, torch.fx.GraphModule)
    made = lean_fx.plan(model, given)
    assert {layer for site in made.sites for layer in site.layers} == (
        {"b"} if "embedded" in given else {"a", "b"}
    )
    again = made.apply(model, given)
    wanted = model(**given)
    for each in (lean, again):
        assert type(each(**given)) is type(wanted)
    untouched = lean_fx.leanify(model, given, min_channels=64)
    torch.testing.assert_close(untouched(**given), wanted)
    torch.testing.assert_close(
        lean_fx.costs_of(model, given).macs, lean_fx.costs_of(model, as_inputs(given, model)).macs
    )
    if given.keys() == {"ids", "mask"}:  # the others differ in what forward does, not in the file
        assert lean_fx.export_onnx(lean, tmp_path / "net.onnx", given).path.exists()


MISTAKES = [
    (
        {"idz": IDS},
        "'idz' is not a parameter of the forward of Encoder; it has ids, mask,",
    ),
    ({1: IDS}, "1 is not a parameter of the forward of Encoder; it has ids"),
]


@pytest.mark.parametrize(("given", "text"), MISTAKES)
def test_mistakes(given, text):
    with pytest.raises(ArgumentError, match=f"^example_inputs: {text}"):
        lean_fx.leanify(Encoder(), given)


class Scaled(nn.Module):
    """Takes inputs by name only."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 32), nn.Linear(32, 2)

    def forward(self, *, x, scale=None, shift=1.0):
        h = torch.relu(self.a(x))
        return self.b(h if scale is None else h * scale) + shift


@pytest.mark.parametrize("form", ["graph", "module"])
@pytest.mark.parametrize("given", [("x",), ("scale", "x"), ("x", "scale", "shift")])
def test_inputs_that_are_taken_by_name_only(given, form, tmp_path):
    values = {"x": torch.rand(3, 4), "scale": torch.rand(3, 32), "shift": 2.0}
    model, inputs = Scaled(), {name: values[name] for name in given}
    plan = lean_fx.plan(model, inputs, form=form)
    assert plan.traced
    assert [site.layers for site in plan.sites] == [("b",)]
    same = lean_fx.leanify(model, inputs, form=form, min_channels=64)
    assert torch.equal(same(**inputs), model(**inputs))
    lean = plan.apply(model, inputs)
    lean(**inputs).sum().backward()
    assert lean_fx.sensitivity(lean, inputs) > 0
    lean_fx.export_onnx(lean, tmp_path / "net.onnx", inputs)
    lean_fx.compare({"model": model, "lean": lean}, inputs, batches=(1,), rounds=2)


@pytest.mark.filterwarnings("ignore:.*takes \\*rest, a graph a fixed number of inputs")
def test_what_is_behind_any_number_of_inputs_is_given_by_name():
    class Rest(nn.Linear):
        def forward(self, x, *rest, scale):
            return super().forward(x) * scale

    given = {"x": torch.rand(2, 32), "scale": 2.0}
    model = Rest(32, 4)
    made = lean_fx.plan(model, given, reduce_inputs=True)
    torch.testing.assert_close(call(model, as_inputs(given, model)), model(**given))
    assert made.model == "Rest"
    with pytest.raises(ArgumentError, match="'scale' has no default in the forward of Rest"):
        lean_fx.plan(model, {"x": given["x"]})


def test_what_is_given_by_name_behind_args_is_no_input_before_them():
    class Rest(nn.Linear):
        def forward(self, x, y=None, *rest, scale=1.0):
            return super().forward(x if y is None else x + y) * scale

    given = {"x": torch.rand(2, 32), "scale": 2.0}
    with pytest.warns(lean_fx.LeanWarning, match=r"forward takes \*rest, a graph a fixed number"):
        lean_fx.plan(Rest(32, 4), given)


def test_an_input_without_a_default_must_be_given():
    class Two(nn.Linear):
        def forward(self, x, y):
            return super().forward(x) + y

    with pytest.raises(
        ArgumentError, match="^example_inputs: 'y' has no default in the forward of"
    ):
        lean_fx.leanify(nn.ModuleList([Two(32, 4)])[0], {"x": torch.rand(2, 32)})


def test_a_mapping_that_is_an_input():
    class OfBatches(Encoder):
        def forward(self, batch):
            return super().forward(batch["ids"])

    with pytest.raises(ArgumentError, match=r"a mapping that is itself an input is given as \("):
        lean_fx.leanify(OfBatches(), {"ids": IDS})
    lean = lean_fx.leanify(OfBatches(), ({"ids": IDS},))
    assert lean({"ids": IDS})["logits"].shape == (2, 7, 4)


@pytest.mark.parametrize("given", FORMS)
def test_a_pickle_takes_the_same_inputs(given):
    lean = lean_fx.leanify(Encoder().eval(), given)
    again = pickle.loads(pickle.dumps(lean))
    wanted, found = lean(**given), again(**given)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert len(again.graph.nodes) == len(lean.graph.nodes)


def test_a_pickle_of_a_model_that_branches_and_takes_more_than_is_needed():
    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)

        def forward(self, x, time=None):
            if x.shape[-1] != 8:
                raise ValueError
            return self.b(torch.relu(self.a(x)) * time.to(x.device)[:, None])

    inputs = torch.randn(2, 8), torch.rand(2)
    lean = lean_fx.leanify(Timed(), inputs)
    again = pickle.loads(pickle.dumps(lean))
    torch.testing.assert_close(again(*inputs), lean(*inputs), rtol=0, atol=0)


class AnyNames(nn.Module):
    """Takes whatever it is called with, as wrappers of other models do."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)

    def compute(self, x, scale=1.0):
        return self.b(torch.relu(self.a(x))) * scale


class Batch(AnyNames):
    def forward(self, **batch):
        return self.compute(**batch)


class More(AnyNames):
    def forward(self, x, **more):
        return self.compute(x, **more)


class Wrapped(AnyNames):
    def forward(self, *args, **kwargs):
        return self.compute(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:.*a graph a fixed number of inputs")
@pytest.mark.parametrize("form", ["graph", "module"])
@pytest.mark.parametrize("kind", [Batch, More, Wrapped])
def test_names_that_forward_takes_by_its_kwargs(kind, form, tmp_path):
    model, given = kind(), {"x": torch.rand(3, 8), "scale": torch.rand(3, 1)}
    lean = lean_fx.leanify(model, given, form=form)
    assert {layer for site in lean_fx.plan_of(lean).sites for layer in site.layers} == {"b"}
    assert lean(**given).shape == (3, 4)
    untouched = lean_fx.leanify(model, given, form="module", min_channels=64)
    torch.testing.assert_close(untouched(**given), model(**given))
    assert lean_fx.plan_of(lean_fx.plan(model, given, form=form).apply(model, given)).sites
    lean_fx.export_onnx(lean, tmp_path / "lean.onnx", given)
    assert lean_fx.sensitivity(model, given) > 0
