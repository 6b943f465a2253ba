"""Layers of a user's own types: planned, rebuilt, counted, exported."""

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lean_fx
from lean_fx.errors import ArgumentError, PlanError
from lean_fx.layers.gains import Gains
from lean_fx.layers.kinds import KINDS, kind_of
from lean_fx.layers.rebuild import rebuild


class Turned(nn.Module):
    """A linear layer whose weight is [in, out], as in GPT-2."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.n_out = n_out
        self.weight = nn.Parameter(torch.randn(n_in, n_out) * 0.02)
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.register_buffer("mask", torch.ones(n_out))

    def forward(self, x):
        sizes = (*x.shape[:-1], self.n_out)
        return (
            torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(sizes) * self.mask
        )


def divided(x):
    return x / (x.std(1, keepdim=True) + 1e-3)


class NormedConv(nn.Conv2d):
    """Divides its input by its standard deviation: lean_fx cannot tell that this is meant."""

    def forward(self, x):
        return super().forward(divided(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.conv = NormedConv(32, 16, 3, stride=2)
        self.up = Turned(16, 64)
        self.down = Turned(64, 8)
        with torch.no_grad():
            self.down.bias.fill_(3.0)
            self.down.mask[0] = 0

    def forward(self, x):
        x = self.conv(self.stem(x).relu()).relu()
        return self.down(self.up(x.flatten(2).transpose(1, 2)).relu())


INPUTS = torch.rand(2, 3, 9, 9)
TURNED = {
    "in_channels": lambda layer: layer.weight.shape[0],
    "rebuild": lambda layer, n: Turned(n, layer.n_out),
    "out_channels": lambda layer: layer.n_out,
}


@pytest.fixture
def registering():
    """register_layer, taken back after the test."""
    before = dict(KINDS)
    yield lean_fx.register_layer
    KINDS.clear()
    KINDS.update(before)


@pytest.fixture
def registered(registering):
    registering(Turned, **TURNED)
    registering(NormedConv, like=nn.Conv2d)


def found(plan):
    return {c.layer: (c.kind, s.dim, s.in_channels) for s in plan.sites for c in s.consumers}


def test_layers_that_are_not_registered():
    plan = lean_fx.plan(Net(), INPUTS)
    assert found(plan) == {"up.weight": ("Linear", -1, 16), "down.weight": ("Linear", -1, 64)}
    reasons = {each.layer: each.reason.text for each in plan.left_alone}
    assert reasons["conv"].endswith("NormedConv is a subclass of Conv2d and may mean more")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("inputs", [None, INPUTS])
def test_plan(inputs):
    plan = lean_fx.plan(Net(), inputs)
    wanted = {"conv": ("NormedConv", 1, 32), "down": ("Turned", -1, 64)}
    assert found(plan) == wanted | ({"up": ("Turned", -1, 16)})
    assert lean_fx.Plan.from_json(plan.to_json()) == plan


@pytest.mark.usefixtures("registered")
def test_numbers_by_hand():
    net = Net()
    lean = lean_fx.leanify(net, INPUTS, channels=8)
    assert type(lean.down) is Turned
    assert type(lean.conv) is NormedConv
    assert lean.conv.weight.shape == (16, 8, 3, 3)
    assert lean.down.weight.shape == (8, 8)
    assert torch.equal(lean.down.bias, net.down.bias)
    assert torch.equal(lean.down.mask, net.down.mask)
    x = lean.reductions.relu(lean.stem(INPUTS).relu())
    x = F.conv2d(divided(x), lean.conv.weight, lean.conv.bias, stride=2).relu()
    x = lean.up(lean.reductions.transpose(x.flatten(2).transpose(1, 2)))
    wanted = lean.reductions.relu_2(x.relu()) @ lean.down.weight + lean.down.bias
    torch.testing.assert_close(lean(INPUTS), wanted * lean.down.mask)


def test_the_scale_of_a_layer_is_kept(registering):
    registering(Turned, **TURNED)
    layer = Turned(64, 512)
    made = rebuild(layer, 16, gains=Gains(3.0))
    x = torch.randn(500, 64)
    torch.testing.assert_close(made(x[:, :16] / 3).std(), layer(x).std(), rtol=0.05, atol=0)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("options", [{"dtype": torch.float64}, {"device": "meta"}])
def test_a_rebuilt_layer_is_where_the_layer_is(options):
    lean = lean_fx.leanify(nn.Sequential(nn.Linear(4, 32), Turned(32, 4)).to(**options))
    held, wanted = lean.get_submodule("1").state_dict(), torch.zeros(0, **options)
    assert [*held] == ["weight", "bias", "mask"]
    assert {(x.dtype, x.device) for x in held.values()} == {(wanted.dtype, wanted.device)}


@pytest.mark.usefixtures("registered")
def test_costs_and_selection():
    lean = lean_fx.leanify(Net(), INPUTS, channels=8)
    for model, width in ((Net(), (32, 64)), (lean, (8, 8))):
        costs = lean_fx.costs_of(model, INPUTS)
        macs = {node.name: node.macs for node in costs.nodes}
        assert macs["conv"] == 2 * 16 * 16 * width[0] * 9
        assert macs["down"] == 2 * 16 * width[1] * 8
        assert costs.without_formula == ()
    sites = lean_fx.plan(Net(), INPUTS, keep="saving").left_alone
    assert any("M MACs" in each.reason.text for each in sites if each.layer == "down")


@pytest.mark.usefixtures("registered")
def test_export(tmp_path):
    lean = lean_fx.leanify(Net(), INPUTS).eval()
    path = tmp_path / "lean.onnx"
    lean_fx.export_onnx(lean, path, INPUTS)
    (out,) = onnxruntime.InferenceSession(path).run(None, {"input": INPUTS.numpy()})
    np.testing.assert_allclose(out, lean(INPUTS).detach().numpy(), rtol=1e-4, atol=1e-5)


class Untraced(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = NormedConv(16, 16, 1)
        self.turned = Turned(16, 4)

    def forward(self, x):
        if x.sum() > -1:
            x = self.conv(x.sin()).relu()
        return self.turned(x.mean((2, 3)))


@pytest.mark.usefixtures("registered")
def test_a_model_that_cannot_be_traced():
    x = torch.rand(2, 16, 5, 5)
    with pytest.warns(lean_fx.LeanWarning, match="each layer reduces its own input"):
        lean = lean_fx.leanify(Untraced(), x)
    assert found(lean_fx.plan_of(lean)) == {
        "conv": ("NormedConv", -3, 16),
        "turned": ("Turned", -1, 16),
    }
    made = lean.conv.reduction(x.sin())
    made = F.conv2d(divided(made), lean.conv.weight, lean.conv.bias).relu()
    made = lean.turned.reduction(made.mean((2, 3))) @ lean.turned.weight + lean.turned.bias
    torch.testing.assert_close(lean(x), made)


class MyGRU(nn.GRU):
    pass


class Lookalike(nn.Module):
    """As nn.Linear, but no subclass."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 16, 5
        self.weight = nn.Parameter(torch.rand(5, 16))

    def forward(self, x):
        return F.linear(x, self.weight)


def test_recurrent_subclass_and_lookalike(registering):
    registering(MyGRU, like=nn.GRU)
    stack = nn.Sequential(nn.Linear(4, 16), MyGRU(16, 8, 2))
    assert found(lean_fx.plan(stack)) == {"1": ("MyGRU", -1, 16)}
    registering(Lookalike, like=nn.Linear)
    layer, x = MyGRU(16, 8, bidirectional=True, batch_first=True), torch.rand(2, 5, 16)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    before = layer(x)[0]
    made = rebuild(layer, 4)
    plain = nn.GRU(4, 8, bidirectional=True, batch_first=True)
    plain.load_state_dict(made.state_dict())
    assert torch.equal(made(x[..., :4])[0], plain(x[..., :4])[0])
    assert torch.equal(layer(x)[0], before)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    assert torch.equal(made.weight_hh_l0, layer.weight_hh_l0)
    lean = lean_fx.leanify(nn.Sequential(nn.Linear(4, 16), Lookalike()))
    assert lean.get_submodule("1").weight.shape == (5, 4)


class Around(nn.Module):
    """A layer with a layer inside."""

    def __init__(self, n_in):
        super().__init__()
        self.inner = nn.Linear(n_in, 8)

    def forward(self, x):
        return self.inner(x) if x.sum() < 1e9 else x


class Numbers(nn.Sequential):
    """Cannot be traced: its branch asks the values."""

    def forward(self, x):
        return super().forward(x if x.sum() < 1e9 else -x)


@pytest.mark.filterwarnings("ignore:.*each layer reduces its own input")
@pytest.mark.parametrize("net", [nn.Sequential, Numbers])
def test_a_layer_with_a_layer_inside(registering, net):
    registering(
        Around,
        in_channels=lambda layer: layer.inner.in_features,
        rebuild=lambda layer, n: Around(n),
        weights=["inner.weight"],
    )
    plan = lean_fx.plan(net(nn.Linear(4, 32), Around(32)), torch.rand(2, 4))
    assert found(plan) == {"1": ("Around", -1, 32)}
    assert plan.form == ("graph" if net is nn.Sequential else "module")


class Middle(nn.Module):
    """Reads the channels on the axis before the last."""

    def __init__(self, n_in):
        super().__init__()
        self.kernel = nn.Parameter(torch.rand(8, n_in))

    def forward(self, x):
        return self.kernel @ x


def test_another_axis_and_another_name(registering):
    registering(
        Middle,
        in_channels=lambda layer: layer.kernel.shape[1],
        rebuild=lambda layer, n: Middle(n),
        weights=["kernel"],
        channel_dim=-2,
        macs=lambda layer, read, written: 7,
    )
    model, x = nn.Sequential(nn.Conv1d(3, 32, 1), Middle(32)), torch.rand(2, 3, 6)
    assert found(lean_fx.plan(model, x)) == {"1": ("Middle", 1, 32)}
    assert found(lean_fx.plan(model)) == {"1": ("Middle", -2, 32)}
    lean = lean_fx.leanify(model, x)
    wanted = lean.get_submodule("1").kernel @ lean.reductions._0(lean.get_submodule("0")(x))
    torch.testing.assert_close(lean(x), wanted)
    assert lean_fx.costs_of(model, x).nodes[-1].macs == 7


@pytest.mark.parametrize("layer_type", [Turned, NormedConv])
def test_a_plan_whose_layers_are_not_registered_here(registering, layer_type):
    options = {Turned: TURNED, NormedConv: {"like": nn.Conv2d}}
    registering(layer_type, **options[layer_type])
    text = lean_fx.plan(Net(), INPUTS).to_json()
    lean_fx.unregister_layer(layer_type)
    layer = {Turned: "up", NormedConv: "conv"}[layer_type]
    name = layer_type.__name__
    with pytest.raises(
        PlanError,
        match=rf"^plan: layer '{layer}' is a {name}, which is not registered here; do so first with lean_fx.register_layer\({name}, ...\)$",
    ):
        lean_fx.Plan.from_json(text).apply(Net(), INPUTS)


@pytest.mark.parametrize(
    ("rebuild", "message"),
    [
        (lambda layer, n: nn.Linear(n, 8), "gives a Linear; it must give a new Turned$"),
        (lambda layer, n: Turned(64, 8), "gives 64 input channels for 8; correct it$"),
        (lambda layer: 0, r"fails for 8 channels \(TypeError: .*\)$"),
        (lambda layer, n: nn.init.zeros_(Turned(n, 8).weight), "gives a Parameter; it must"),
    ],
)
def test_a_wrong_rebuild_is_told_by_the_name_of_the_layer(registering, rebuild, message):
    registering(Turned, **TURNED | {"rebuild": rebuild})
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), Turned(64, 8))
    with pytest.raises(
        PlanError, match=f"^plan: layer '2': the rebuild= registered for Turned {message}"
    ):
        lean_fx.leanify(model)


class Bare(nn.Module):
    def __init__(self, weight, **buffers):
        super().__init__()
        self.weight = nn.Parameter(weight)
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x):
        return x @ self.weight


@pytest.mark.parametrize(
    ("rebuild", "message"),
    [
        (
            lambda layer, n: Bare(torch.rand(n, 8)),
            "gives no 'mask', which the layer holds; add it$",
        ),
        (
            lambda layer, n: Bare(torch.zeros(n, 8), mask=layer.mask),
            "gives a weight of zeros; draw it$",
        ),
    ],
)
def test_a_rebuild_that_forgets(registering, rebuild, message):
    registering(Bare, in_channels=lambda layer: layer.weight.shape[0], rebuild=rebuild)
    model = nn.Sequential(nn.Linear(4, 64), Bare(torch.rand(64, 8), mask=torch.ones(8)))
    with pytest.raises(
        PlanError, match=f"^plan: layer '1': the rebuild= registered for Bare {message}"
    ):
        lean_fx.leanify(model)


@pytest.mark.parametrize(
    ("layer_type", "options", "message"),
    [
        ("Turned", TURNED, "'Turned' is not a module class; give the class of the layers$"),
        (Turned(2, 2), TURNED, r"Turned\(\) is not a module class; give the class of the layers$"),
        (
            nn.Linear,
            {"like": nn.Linear},
            r"Linear is registered already; call unregister_layer\(Linear\) first$",
        ),
        (
            Turned,
            {},
            "Turned: in_channels=None cannot be called; give a function of the layer, or like= a type of torch.nn$",
        ),
        (Turned, {"in_channels": len}, "Turned: rebuild=None cannot be called; give a function"),
        (
            Turned,
            TURNED | {"macs": 3},
            "Turned: macs=3 cannot be called; give a function of the layer",
        ),
        (
            Turned,
            TURNED | {"weights": "weight"},
            "Turned: weights='weight' is not a sequence of names$",
        ),
        (Turned, TURNED | {"channel_dim": 1.5}, "Turned: channel_dim=1.5 is not an int$"),
        (
            Turned,
            {"like": nn.Bilinear},
            "Turned: like=<class '.*Bilinear'> is not torch.nn's Conv1d, .* or GRUCell$",
        ),
        (
            NormedConv,
            {"like": nn.Conv2d, "macs": len},
            "NormedConv: like=Conv2d says the rest; leave that out$",
        ),
    ],
)
def test_bad_arguments(registering, layer_type, options, message):
    before = dict(KINDS)
    with pytest.raises(ArgumentError, match=f"^register_layer: {message}"):
        registering(layer_type, **options)
    assert before == KINDS


def test_functions_that_fail(registering, monkeypatch):
    model = nn.Sequential(nn.Linear(4, 64), Turned(64, 8))
    registering(Turned, like=nn.Linear)
    with pytest.raises(
        ArgumentError,
        match="^register_layer: Turned: out_channels fails .AttributeError: 'Turned' object has no attribute 'out_features'.; correct it$",
    ):
        lean_fx.plan(model)
    monkeypatch.setattr(Turned, "in_features", 64, raising=False)
    monkeypatch.setattr(Turned, "out_features", 8, raising=False)
    with pytest.raises(
        PlanError, match="^plan: layer '1': the weight of Turned is not that of its base$"
    ):
        lean_fx.leanify(model)
    lean_fx.unregister_layer(Turned)
    registering(Turned, **TURNED | {"in_channels": lambda layer: 6.5})
    with pytest.raises(
        ArgumentError, match="^register_layer: Turned: in_channels=6.5 is not an int of 1 or more$"
    ):
        lean_fx.plan(model)


def test_registered_twice_and_taken_back(registering):
    registering(Turned, **TURNED)
    with pytest.raises(ArgumentError, match="^register_layer: Turned is registered already"):
        registering(Turned, like=nn.Linear)
    lean_fx.unregister_layer(Turned)
    lean_fx.unregister_layer(Turned)
    lean_fx.unregister_layer(nn.Linear)
    assert kind_of(Turned(2, 2)) is None
    assert kind_of(nn.Linear(2, 2)).layer_type is nn.Linear


def test_layers_of_other_libraries_are_known_by_name():
    class Conv1D(nn.Module):
        """As that of transformers."""

        def __init__(self, nf, nx):
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight = nn.Parameter(torch.empty(nx, nf))
            self.bias = nn.Parameter(torch.zeros(nf))
            nn.init.normal_(self.weight, std=0.02)

        def forward(self, x):
            size_out = (*x.size()[:-1], self.nf)
            return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)

    class Linear(nn.Module):
        """As that of torch_geometric, in which ``weight`` is torch's own way round."""

        def __init__(self, n_in, n_out, bias=True, weight_initializer=None, bias_initializer=None):
            super().__init__()
            self.in_channels, self.out_channels = n_in, n_out
            self.weight_initializer, self.bias_initializer = weight_initializer, bias_initializer
            self.weight = nn.Parameter(torch.rand(n_out, n_in))
            self.bias = nn.Parameter(torch.rand(n_out)) if bias else None

        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

    Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"
    Linear.__module__, Linear.__qualname__ = "torch_geometric.nn.dense.linear", "Linear"
    model = nn.Sequential(nn.Linear(4, 32), Conv1D(64, 32), nn.ReLU(), Linear(64, 3, bias=False))
    x = torch.rand(2, 5, 4)
    try:
        for form in ("graph", "module"):
            lean = lean_fx.leanify(model, x, channels=8, form=form)
            assert lean(x).shape == (2, 5, 3)
            one, other = lean.get_submodule("1"), lean.get_submodule("3")
            assert (type(one), one.weight.shape) == (Conv1D, (8, 64))
            assert (type(other), other.weight.shape, other.bias) == (Linear, (3, 8), None)
            assert len(lean_fx.plan_of(lean).sites) == 2
    finally:
        lean_fx.layers.kinds.unregister_layer(Conv1D)
        lean_fx.layers.kinds.unregister_layer(Linear)
