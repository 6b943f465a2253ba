"""Example inputs given by name, as models are called with keyword arguments."""

import pickle

import pytest
import torch
from torch import nn

import lean_fx
from lean_fx.capture.example_inputs import as_inputs
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
        "'idz' is not a positional parameter of the forward of Encoder; it has ids, mask,",
    ),
    ({1: IDS}, "1 is not a positional parameter of the forward of Encoder; it has ids"),
]


@pytest.mark.parametrize(("given", "text"), MISTAKES)
def test_mistakes(given, text):
    with pytest.raises(ArgumentError, match=f"^example_inputs: {text}"):
        lean_fx.leanify(Encoder(), given)


def test_what_is_only_taken_by_its_name_is_told():
    class Scaled(nn.Linear):
        def forward(self, x, *, scale=1.0):
            return super().forward(x) * scale

    lean_fx.plan(nn.Sequential(nn.Linear(4, 4), Scaled(4, 2)), {"input": torch.rand(2, 4)})
    with pytest.raises(ArgumentError, match="^example_inputs: 'scale' can only be given by its na"):
        lean_fx.plan(nn.Sequential(Scaled(4, 2))[0], {"x": torch.rand(2, 4), "scale": 2.0})


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
