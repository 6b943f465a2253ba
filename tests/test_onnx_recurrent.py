"""Recurrent layers in ONNX, at any batch and length."""

import itertools
import operator

import onnx
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import lean_fx
from cases import slow_unless
from lean_fx.errors import ArgumentError, ExportError
from lean_fx.export import recurrent as onnx_recurrent
from lean_fx.export.recurrent import _weights, recurrence

KINDS = [(nn.RNN, {}), (nn.RNN, {"nonlinearity": "relu"}), (nn.LSTM, {}), (nn.GRU, {})]


class Net(nn.Module):
    """A recurrent layer, given states or none."""

    def __init__(self, kind, **options):
        super().__init__()
        self.layer = kind(6, 5, **options)

    def forward(self, x, h=None, c=None):
        if h is None:
            return self.layer(x)
        return self.layer(x, h if c is None else (h, c))


class First(nn.Module):
    """The values of a recurrent layer, without its states."""

    def forward(self, pair):
        return pair[0]


def states_of(layer, *batch):
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = (layer.proj_size or layer.hidden_size, layer.hidden_size)
    return [torch.randn(rows, *batch, width) for width in widths[: 1 + (layer.mode == "LSTM")]]


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize(("kind", "own"), KINDS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_the_equations_of_onnx_give_what_torch_gives(kind, own, bidirectional, bias, given):
    layer = kind(6, 5, bidirectional=bidirectional, bias=bias, **own).double()
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    states = [state.double() for state in states_of(layer, 3)] if given else []
    made = _weights(layer, 0)
    options = {"hidden_size": 5, "activations": ["Relu"] if own else []}
    weights = [made.get(name) for name in "WRB"]
    y, *ends = recurrence(kind.__name__, [x, *weights, None, *states], options)
    pair = tuple(states) if kind is nn.LSTM else states[0] if states else None
    out, last = layer(x, pair if given else None)
    torch.testing.assert_close(y.transpose(1, 2).flatten(2), out)
    torch.testing.assert_close(tuple(ends), last if kind is nn.LSTM else (last,))


FORMS = [(True, True, False), (False, False, True), (True, False, True), (False, True, True)]


@pytest.mark.parametrize(
    ("kind", "own", "batch_first", "bidirectional", "given"),
    slow_unless(
        lambda kind, own, *form: (FORMS.index(form) - KINDS.index((kind, own))) % 4 in (0, 1),
        [(*kind, *form) for kind in KINDS for form in FORMS],
    ),
)
def test_any_batch_and_length(kind, own, batch_first, bidirectional, given, tmp_path):
    """The export compares outputs and states with the model at three batches and lengths."""
    options = {"batch_first": batch_first, "bidirectional": bidirectional, "num_layers": 2}
    net = Net(kind, **options, **own)
    x = torch.randn(2, 4, 6) if batch_first else torch.randn(4, 2, 6)
    states = states_of(net.layer, 2) if given else []
    axes = {0: "batch", 1: "length"} if batch_first else {0: "length", 1: "batch"}
    shapes = (axes, *({1: "batch"} for _ in states))
    path = tmp_path / "net.onnx"
    lean_fx.export_onnx(net, path, (x, *states), dynamic_shapes=shapes, tolerance=1e-5)
    assert operators(path).count(kind.__name__) == 2
    free = [d.dim_param for d in onnx.load(path).graph.input[0].type.tensor_type.shape.dim][:2]
    assert free == [axes[0], axes[1]]


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_without_a_batch(kind, tmp_path):
    net = Net(kind)
    states = states_of(net.layer)
    shapes = ({0: "length"}, *({} for _ in states))
    inputs = (torch.randn(4, 6), *states)
    lean_fx.export_onnx(net, tmp_path / "net.onnx", inputs, dynamic_shapes=shapes)


@pytest.mark.parametrize(
    ("bidirectional", "given"),
    slow_unless(operator.ne, itertools.product((False, True), repeat=2)),
)
def test_projections(bidirectional, given, tmp_path):
    net = Net(nn.LSTM, proj_size=3, num_layers=2, bidirectional=bidirectional, batch_first=True)
    states = states_of(net.layer, 2) if given else []
    shapes = ({0: "batch", 1: "length"}, *({1: "batch"} for _ in states))
    inputs, path = (torch.randn(2, 4, 6), *states), tmp_path / "net.onnx"
    lean_fx.export_onnx(net, path, inputs, dynamic_shapes=shapes, tolerance=1e-5)
    assert operators(path).count("LSTM") == 2


def test_the_model_stays_as_it_is(tmp_path):
    layer = nn.GRU(6, 5)
    before = list(layer.state_dict())
    lean_fx.export_onnx(layer, tmp_path / "net.onnx", torch.randn(4, 2, 6), batch="static")
    assert list(layer.state_dict()) == before
    net = nn.ModuleDict({"inner": layer})
    assert onnx_recurrent.with_onnx_operators(net) is not net
    assert net["inner"] is layer


class Reads(nn.Module):
    """It reads more of its layer than what the call gives, and the layer has a hook."""

    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(6, 5, 2)
        self.layer.register_forward_hook(lambda module, given, out: (out[0] * 2, out[1]))

    def forward(self, x):
        self.layer.flatten_parameters()
        h = x.new_zeros(self.layer.num_layers, x.shape[1], self.layer.hidden_size)
        return self.layer(x, h)[0] + self.layer.bias_ih_l0.sum()


def test_a_layer_keeps_its_hooks_and_attributes(tmp_path):
    shapes = ({0: "length", 1: "batch"},)
    path = tmp_path / "net.onnx"
    lean_fx.export_onnx(Reads(), path, torch.randn(4, 2, 6), dynamic_shapes=shapes, tolerance=1e-5)
    names = {value.name for value in onnx.load(path).graph.initializer}
    assert not any("weight" in name for name in names)  # none is there twice


NORMS = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "pruning": lambda layer, name: prune.l1_unstructured(layer, name, 0.5),
}


@pytest.mark.parametrize(
    ("called", "normed"),
    slow_unless(
        lambda called, normed: called == normed.startswith("0"),
        itertools.product((True, False), ("0.weight_hh_l0", "2.weight")),
    ),
)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_hooks_compute(norm, normed, called, tmp_path):
    net = nn.Sequential(nn.GRU(6, 5), First(), nn.Linear(5, 3))
    owner, _, name = normed.partition(".")
    NORMS[norm](net.get_submodule(owner), name)
    x, path = torch.randn(4, 2, 6), tmp_path / "net.onnx"
    if called:
        net(x)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.01)  # as after a step
    shapes = ({0: "length", 1: "batch"},)
    lean_fx.export_onnx(net, path, x, dynamic_shapes=shapes, tolerance=1e-5)
    assert operators(path).count("Slice") == 0  # which torch's slower graph has
    assert operators(path).count("GRU") == 1


def test_a_reduced_stack(tmp_path):
    net = nn.Sequential(nn.Linear(6, 32), nn.LSTM(32, 16, 3, bidirectional=True))
    lean = lean_fx.leanify(net, torch.randn(4, 2, 6))
    path = tmp_path / "net.onnx"
    shapes = ({0: "length", 1: "batch"},)
    lean_fx.export_onnx(lean, path, torch.randn(4, 2, 6), dynamic_shapes=shapes, tolerance=1e-5)
    assert operators(path).count("LEAN") == operators(path).count("LSTM") == 3


def test_what_differs_behind_a_recurrent_layer_is_named(tmp_path):
    class Drifts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.GRU(6, 5)

        def forward(self, x):
            return torch.cumsum(self.layer(x)[0].relu() ** 60, 0).log()

    net = Drifts()
    with pytest.raises(ExportError, match=r"the first node that differs is (?!\S*GRU)"):
        lean_fx.export_onnx(net, tmp_path / "net.onnx", torch.randn(2, 4, 6), tolerance=1e-30)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({0: "batch"}, "export_onnx: dynamic_shapes is not a sequence of a mapping for each of 1"),
        (({}, {}), "export_onnx: dynamic_shapes is not a sequence of a mapping for each of 1"),
        (
            (5,),
            "export_onnx: dynamic_shapes: 5 is not a mapping for input 0; give such as {0: 'batch'",
        ),
        (
            ("ab",),
            "export_onnx: dynamic_shapes: 'ab' is not a mapping for input 0; give such as {0: ",
        ),
        (
            ({3: "a"},),
            "export_onnx: dynamic_shapes: 3 is not an axis of input 0, which has 3; give",
        ),
        (({0: "a b"},), "export_onnx: dynamic_shapes: 'a b' is not a name of a size; give a word"),
        (({0: "n", 1: "n"},), "export_onnx: dynamic_shapes: 'n' is 4 and 2 in the example inputs"),
    ],
)
def test_wrong_shapes(shapes, message, tmp_path):
    x = torch.randn(4, 2, 6)
    with pytest.raises(ArgumentError) as caught:
        lean_fx.export_onnx(nn.GRU(6, 5), tmp_path / "a", x, dynamic_shapes=shapes)
    assert str(caught.value).startswith(message)


def test_states_have_their_batch_on_another_axis(tmp_path):
    net = Net(nn.GRU, batch_first=True)
    with pytest.raises(ArgumentError, match="batches of 2, 1 differ; give one batch size, or dyn"):
        lean_fx.export_onnx(net, tmp_path / "a", (torch.randn(2, 4, 6), torch.randn(1, 2, 5)))


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_float64_has_no_kernel(kind, tmp_path):
    net, x = kind(6, 5, batch_first=True).double(), torch.rand(2, 4, 6).double()
    with pytest.raises(
        ExportError, match=r"cannot run the file \(.*\); convert the model to float32"
    ):
        lean_fx.export_onnx(net, tmp_path / "net.onnx", x)
    lean_fx.export_onnx(net.float(), tmp_path / "net.onnx", x.float())


class Packs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(6, 5, batch_first=True)

    def forward(self, x, lengths):
        return self.layer(pack_padded_sequence(x, lengths, batch_first=True))[0].data


def test_packed_sequences(tmp_path):
    path = tmp_path / "net.onnx"
    with pytest.raises(ExportError) as caught:
        lean_fx.export_onnx(Packs(), path, (torch.rand(2, 4, 6), torch.tensor([4, 2])))
    assert str(caught.value).startswith("export_onnx: Packs: ONNX has no packed sequences; give")
    packed = pack_sequence([torch.rand(4, 6), torch.rand(2, 6)])
    for shapes in (None, ({},)):
        with pytest.raises(ArgumentError, match="^example_inputs: ONNX has no packed sequences; "):
            lean_fx.export_onnx(nn.LSTM(6, 5), path, packed, dynamic_shapes=shapes)


class Long(nn.Module):
    def forward(self, x):
        if x.shape[1] < 3:
            raise ValueError("too short")
        return x * 2


def test_a_size_that_the_model_cannot_take(tmp_path):
    with pytest.raises(
        ExportError,
        match=r"Long cannot run at n 2 \(too short\); export it with batch='static' and no dynamic_shapes, or with",
    ):
        shapes = ({1: "n"},)
        lean_fx.export_onnx(Long(), tmp_path / "a", torch.rand(2, 5), dynamic_shapes=shapes)
