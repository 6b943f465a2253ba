"""leanify and plan as a user calls them."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

import lean_fx
from cases import slow_unless
from graphs import CHANGED, UNCHANGED, Flattened, MyConv, Residual, graph_text
from lean_fx.capture.capturing import capture
from lean_fx.capture.guards import check_branch
from lean_fx.errors import ArgumentError, BranchError, CaptureError
from lean_fx.reduction.controls import SliceReduction
from lean_fx.reduction.registry import reductions


class PaperForm(nn.Module):
    """The paper's net, rebuilt from its counts, in a spelling of its own."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 50, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(50, 100, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(100, 150, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.classifier = nn.Linear(150 * 12 * 12, 10)

    def forward(self, x):
        return self.classifier(torch.flatten(self.features(x), 1))


class Backwards(nn.Module):
    """Layers that run in another order than they are held in, and some that are split."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.rand(32))
        self.last, self.first = nn.Linear(32, 4), nn.Linear(32, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.register_buffer("scale", torch.ones(32))
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, x):
        h = torch.relu(self.first(x - self.mean) * self.scale + self.shift)
        return self.last(self.attention(h, h, h)[0])


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("inputs", [None, torch.rand(2, 3, 96, 96)])
def test_the_papers_net(inputs):
    model = PaperForm()
    lean = lean_fx.leanify(model, inputs, channels=10)
    assert parameters(model) == 397_660
    assert parameters(lean) == 38_590
    assert_expected_inline(
        graph_text(lean),
        """\
x = x()
features_0 = features.0(x)  # Conv2d(3, 50, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
features_1 = features.1(features_0)  # ReLU()
features_2 = features.2(features_1)  # MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
reductions_features_2 = reductions.features_2(features_2)  # LeanReduction(50, 10, dim=1, nonnegative)
features_3 = features.3(reductions_features_2)  # Conv2d(10, 100, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
features_4 = features.4(features_3)  # ReLU()
features_5 = features.5(features_4)  # MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
reductions_features_5 = reductions.features_5(features_5)  # LeanReduction(100, 10, dim=1, nonnegative)
features_6 = features.6(reductions_features_5)  # Conv2d(10, 150, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
features_7 = features.7(features_6)  # ReLU()
features_8 = features.8(features_7)  # MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
reductions_features_8 = reductions.features_8(features_8)  # LeanReduction(150, 10, dim=1, nonnegative)
flatten = flatten(reductions_features_8, 1)
classifier = classifier(flatten)  # Linear(in_features=1440, out_features=10, bias=True)
output = output(classifier)
""",
    )


def test_the_papers_plan():
    assert_expected_inline(
        str(lean_fx.plan(PaperForm(), channels=10)),
        """\
Plan for PaperForm: 3 reductions (lean) before 3 of 4 layers
their weights: 396,000 -> 36,900, of 397,660 parameters in all
value       sign  MACs  layer       type    channels   weights            note
features_2  >= 0  200   features.3  Conv2d  50 -> 10   45,000 -> 9,000
features_5  >= 0  400   features.6  Conv2d  100 -> 10  135,000 -> 13,500
features_8  >= 0  600   classifier  Linear  150 -> 10  216,000 -> 14,400
left alone
features.0  Conv2d  in_channels=3 is below min_channels=16""",
    )


@pytest.mark.parametrize("model", CHANGED | UNCHANGED)
@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
def test_the_users_model_is_never_touched(model):
    make, shape = (CHANGED | UNCHANGED)[model]
    torch.manual_seed(0)
    user, inputs = make(), torch.rand(shape)
    state, text = copy.deepcopy(user.state_dict()), str(user)
    attributes = {name: set(vars(module)) for name, module in user.named_modules()}
    lean = lean_fx.leanify(user, inputs)
    assert str(user) == text
    assert {name: set(vars(module)) for name, module in user.named_modules()} == attributes
    assert all(type(module.training) is bool for module in user.modules())
    assert all(type(module.training) is bool for module in lean.modules())
    for name, value in user.state_dict().items():
        assert torch.equal(value, state[name])
    storages = {p.data_ptr() for p in user.parameters()}
    assert not storages & {p.data_ptr() for p in lean.parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("model", CHANGED)
def test_an_export_touches_neither_model(model, tmp_path):
    make, shape = CHANGED[model]
    user, inputs = make(), torch.rand(shape)
    both = (user, lean_fx.leanify(user, inputs))
    states = [copy.deepcopy(each.state_dict()) for each in both]
    modes = [[module.training for module in each.modules()] for each in both]
    lean_fx.export_onnx(both[1], tmp_path / "net.onnx", inputs)
    assert [[module.training for module in each.modules()] for each in both] == modes
    for each, state in zip(both, states, strict=True):
        torch.testing.assert_close(each.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("model", CHANGED)
def test_what_is_not_rebuilt_is_as_it_was(model):
    make, shape = CHANGED[model]
    user = make()
    lean = lean_fx.leanify(user, torch.rand(shape))
    plan = lean.meta["lean_fx.plan"]
    rebuilt = {layer for site in plan.sites for layer in site.layers} | {*plan.split_layers}
    checked = 0
    for name, value in user.state_dict().items():
        if not any(f"{name}.".startswith(f"{layer}.") for layer in rebuilt):
            assert torch.equal(lean.state_dict()[name], value)
            checked += 1
    assert checked or plan.split_layers


FEW = ("conv3d", "linear", "stacked")  # of different kinds, with which each reduction trains


@pytest.mark.parametrize(
    ("model", "reduction"),
    slow_unless(
        lambda model, reduction: reduction == "lean" or model in FEW,
        [(model, each) for each in reductions() for model in CHANGED],
    ),
)
def test_every_reduction_trains(model, reduction):
    make, shape = CHANGED[model]
    torch.manual_seed(0)
    lean = lean_fx.leanify(make(), reduction=reduction)
    out = lean(torch.rand(shape))
    out = out[0] if isinstance(out, tuple) else out
    out.square().sum().backward()
    for name, parameter in lean.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_shapes_with_and_without_example_inputs_agree():
    ambiguous = "view with features"  # view(-1, 144) may merge rows: only the shapes tell
    for make, shape in (CHANGED[name] for name in CHANGED if name != ambiguous):
        model = make()
        plan = lean_fx.plan(model, torch.rand(shape))
        sites = tuple(dataclasses.replace(site, rms=1.0) for site in plan.sites)
        assert lean_fx.plan(model) == dataclasses.replace(plan, sites=sites)


def test_copies_and_pickles_keep_the_order_of_parameters():
    """The state of an optimizer goes by the place of a parameter."""
    lean = lean_fx.leanify(Backwards(), torch.rand(2, 5, 32))
    names = [name for name, _ in lean.named_parameters()]
    for copied in (copy.deepcopy(lean), pickle.loads(pickle.dumps(lean))):
        assert [name for name, _ in copied.named_parameters()] == names
        assert [name for name, _ in copied.named_buffers()] == [n for n, _ in lean.named_buffers()]
        assert [*copied.state_dict()] == [*lean.state_dict()]


def test_an_ordinary_module():
    lean = lean_fx.leanify(Residual()).double()
    inputs = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    assert lean(inputs).dtype == torch.float64
    twin = copy.deepcopy(lean)
    torch.testing.assert_close(twin(inputs), lean(inputs))
    assert twin.meta["lean_fx.plan"] == lean.meta["lean_fx.plan"]
    other = lean_fx.leanify(Residual()).double()
    other.load_state_dict(lean.state_dict())
    torch.testing.assert_close(other(inputs), lean(inputs))
    assert not any(module.training for module in lean.eval().modules())
    assert all(module.training for module in lean.train().modules())


def test_dtype_device_and_mode_of_the_model_are_kept():
    lean = lean_fx.leanify(Residual().double().eval())
    assert {parameter.dtype for parameter in lean.parameters()} == {torch.float64}
    assert not any(module.training for module in lean.modules())
    meta = lean_fx.leanify(Residual().to("meta"))
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}


class Writes(nn.Module):
    """It writes to its input."""

    def __init__(self, traced):
        super().__init__()
        self.a, self.b = nn.Linear(4, 32), nn.Linear(32, 4)
        self.traced = traced

    def forward(self, x):
        y = F.relu(self.a(x.sub_(0.5)))
        return self.b(y if self.traced or y.sum() > 0 else -y)


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
def test_what_is_made_in_inference_mode_can_be_trained(traced):
    captured = capture(Writes(True))
    with torch.inference_mode():
        model, x = Writes(traced), torch.rand(2, 4)
        before = x.clone()
        plan = lean_fx.plan(model, x, channels=4)
        models = [lean_fx.leanify(model, x, channels=4), plan.apply(model, x)]
        if traced:
            models.append(plan.apply_to_graph(captured))
        assert torch.equal(x, before)
    assert [site.layers for site in plan.sites] == [("b",)]
    for made in models:
        made(torch.rand(2, 4)).sum().backward()
        assert all(each.grad is not None for each in made.parameters())


@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
def test_layers_that_run_within_vmap_are_seen():
    class Mapped(nn.Sequential):
        def forward(self, x):
            return self[2](torch.func.vmap(lambda row: F.relu(self[1](self[0](row))))(x))

    model = Mapped(nn.Linear(4, 32), nn.Linear(32, 32), nn.Linear(32, 4))
    x = torch.rand(2, 4)
    torch.testing.assert_close(lean_fx.leanify(model, x, min_channels=64)(x), model(x))
    lean = lean_fx.leanify(model, x, channels=4)
    assert [site.layers for site in lean_fx.plan_of(lean).sites] == [("1",), ("2",)]
    rows = torch.stack([F.relu(lean[1](lean[0](row))) for row in x])
    torch.testing.assert_close(lean(x), lean[2](rows))


def test_the_same_seed_gives_the_same_model():
    model = Residual()
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(lean_fx.leanify(model).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_nothing_to_reduce_warns_and_returns_an_equal_model():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).eval()
    with pytest.warns(lean_fx.LeanWarning) as caught:
        lean = lean_fx.leanify(model)
    assert str(caught[0].message) == (
        "leanify: Sequential has no layer to reduce (0: in_channels=3 is below min_channels=16; "
        "1: in_channels=8 is below min_channels=16); lean_fx.plan_of(result) tells why for each"
    )
    inputs = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(lean(inputs), model(inputs), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
def test_leanifying_twice_changes_nothing():
    once = lean_fx.leanify(Residual())
    twice = lean_fx.leanify(once)
    assert graph_text(once) == graph_text(twice)
    reasons = {each.layer: each.reason.text for each in lean_fx.plan(once).left_alone}
    assert reasons["left"] == reasons["head"] == "it reads a reduction already"


class Wide(nn.Module):
    """Two branches of different width, and layers that forward never calls."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 1)
        self.a = nn.Conv2d(64, 17, 1)
        self.b = nn.Conv2d(64, 20, 1)
        self.a2 = nn.Conv2d(17, 4, 1)
        self.b2 = nn.Conv2d(20, 4, 1)
        self.unused = nn.Linear(64, 4)
        self.mine = MyConv(4, 4, 1)
        self.gru = nn.GRU(4, 4, batch_first=True)

    def forward(self, x):
        x = self.stem(x)
        y = self.mine(self.a2(self.a(x)) + self.b2(self.b(x)))
        return self.gru(y.flatten(2).transpose(1, 2))[0]


def test_every_layer_left_alone_has_its_reason():
    plan = lean_fx.plan(Wide(), channels=10, skip=["b"])
    assert_expected_inline(
        str(plan),
        """\
Plan for Wide: 2 reductions (lean) before 2 of 8 layers
their weights: 1,168 -> 176, of 3,217 parameters in all
value  sign  MACs  layer  type    channels  weights       note
stem   any   640   a      Conv2d  64 -> 8   1,088 -> 136  10 wanted, 8 is the nearest divisor
b      any   240   b2     Conv2d  20 -> 10  80 -> 40
left alone
stem    Conv2d  in_channels=3 is below min_channels=16
b       Conv2d  skip='b'
mine    MyConv  graphs.MyConv is a subclass of Conv2d and may mean more
gru     GRU     in_channels=4 is below min_channels=16
unused  Linear  not called in forward
a2      Conv2d  in_channels=17 is prime: only 1 and itself divide it""",
    )


def decided(model, **options):
    plan = lean_fx.plan(model, **options)
    return {layer: site.out_channels for site in plan.sites for layer in site.layers}


def test_channels():
    assert decided(Wide()) == {"a": 8, "b": 8, "b2": 4}
    assert decided(Wide(), channels="tenth") == {"a": 8, "b": 8, "b2": 2}
    assert decided(Wide(), channels=0.5) == {"a": 32, "b": 32, "b2": 10}
    assert decided(Wide(), channels=lambda site: site.in_channels // 4) == {
        "a": 16,
        "b": 16,
        "b2": 5,
    }
    assert decided(Wide(), channels={"a": 4, "b*": 0.25}) == {"a": 4, "b": 16, "b2": 5}
    assert decided(Wide(), channels={"a": 4}) == {"a": 4}
    assert decided(Wide(), channels=10, round_to=8) == {"a": 8, "b": 8, "b2": 10}


def test_an_align_that_cannot_be_kept_is_told():
    def notes(**options):
        return {site.layers[0]: site.note for site in lean_fx.plan(Wide(), **options).sites}

    missed = "no divisor below 64 is a multiple of round_to=7"
    assert notes(channels=8, round_to=7)["a"] == missed
    assert notes(channels=10, round_to=7)["a"] == f"10 wanted, 8 is the nearest divisor; {missed}"
    assert notes(channels=8, round_to=64)["a"] == "no divisor below 64 is a multiple of round_to=64"
    assert notes(channels=8, round_to=8)["a"] == ""
    assert notes(channels=8, round_to=1)["a"] == ""


def test_a_single_channel_is_no_prime():
    net = nn.Sequential(nn.Conv2d(3, 1, 3), nn.ReLU(), nn.Conv2d(1, 4, 3))
    plan = lean_fx.plan(net, channels="tenth", min_channels=1)
    (left,) = [each for each in plan.left_alone if each.layer == "2"]
    assert left.reason.text == "in_channels=1: nothing to reduce"
    assert decided(Wide(), min_channels=21) == {"a": 8, "b": 8}
    assert decided(
        Wide(), filter_fn=lambda module, name: getattr(module, "out_channels", 0) == 4
    ) == {"b2": 4}
    assert decided(Wide(), skip=[nn.Conv2d]) == {}


def test_skip_a_type_of_module_that_holds_layers():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Wide())
    assert decided(model, skip=[Wide]) == {}
    assert decided(model, skip=[nn.Sequential]) == {"1.a": 8, "1.b": 8, "1.b2": 4}  # the model
    (left,) = (each for each in lean_fx.plan(model, skip=Wide).left_alone if each.layer == "1.a")
    assert left.reason.text == "skip=Wide"


def test_layers_of_one_value_with_different_channels_have_a_reduction_each():
    plan = lean_fx.plan(Wide(), channels={"a": 4, "b": 8})
    assert [(site.name, site.layers) for site in plan.sites] == [
        ("stem", ("a",)),
        ("stem_1", ("b",)),
    ]
    assert plan.apply(Wide())(torch.rand(2, 3, 2, 2)).shape == (2, 4, 4)


def test_reduce_inputs():
    model = nn.Sequential(nn.Linear(64, 4))
    assert decided(model) == {}
    assert decided(model, reduce_inputs=True) == {"0": 8}


def test_a_users_own_reduction():
    class Mine(SliceReduction):
        pass

    class Own(nn.Module):
        def __init__(self, in_channels, out_channels, dim):
            super().__init__()
            self.keep, self.dim = out_channels, dim

        def forward(self, x):
            return x.narrow(self.dim, 0, self.keep) * 2

    for kind in (Mine, Own):
        lean = lean_fx.leanify(Flattened(), reduction=kind, channels=4)
        assert lean(torch.rand(2, 1, 6, 6)).shape == (2, 5)
        assert type(lean.reductions.pool) is kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels=0 is not an int of 1 or more"),
        (
            {"channels": 33},
            "channels of left: 33 is above its 32 input channels; give at most 32, ",
        ),
        ({"round_to": 0}, "round_to=0 is not an int of 1 or more"),
        ({"min_channels": 2.5}, "min_channels=2.5 is not an int of 1 or more"),
        ({"filter_fn": 3}, "filter_fn=3 cannot be called; give filter_fn(module, name)"),
        ({"skip": ["lft"]}, "skip: no layer is named 'lft'; near it: left"),
        ({"channels": {"lft": 3}}, "channels: no layer is named 'lft'; near it: left"),
        ({"reduction": "leen"}, "reduction='leen' is not known; use lean, lean_row, lean_mean"),
        ({"example_inputs": "x"}, "example_inputs=str object is neither a tensor nor a tuple; "),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ArgumentError) as caught:
        lean_fx.leanify(Residual(), **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_models_that_cannot_be_captured():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(
        CaptureError, match="^Branches: torch.fx cannot trace its forward"
    ) as caught:
        lean_fx.leanify(Branches())
    assert "\n" not in str(caught.value)
    with pytest.raises(ArgumentError, match="^model=type object is not a torch.nn.Module"):
        lean_fx.leanify(Branches)

    class Stuck(nn.Module):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

    with pytest.raises(CaptureError, match=r"^Stuck: cannot be copied \(RuntimeError: no copies\)"):
        lean_fx.leanify(Stuck())


class Unusual(nn.Module):
    """Holds a container that holds itself, and refuses attributes."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.held = nn.Linear(16, 32), nn.Linear(32, 4), {"scale": 2.0}
        self.held["root"] = self.held

    def __setattr__(self, name, value):
        if name == "meta":
            raise TypeError("frozen")
        super().__setattr__(name, value)

    def forward(self, x):
        return torch.stack([self.last(v) for v in self.first(x).relu()]) * 2


@pytest.mark.parametrize("form", ["graph", "module"])
@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
def test_an_unusual_model(form):
    lean = lean_fx.leanify(Unusual(), torch.rand(3, 16), form=form)
    assert lean(torch.rand(3, 16)).shape == (3, 4)
    assert lean_fx.plan_of(lean).form == form


def test_a_warning_has_the_whole_of_the_code_that_it_quotes():
    told = (
        "Net (net.py:6: h = f(x); return h): gives 6 for these inputs, but the model was captured "
        "where it gives 4"
    )
    with pytest.raises(BranchError) as caught:
        check_branch(6, 4, "Net (net.py:6: h = f(x); return h)")
    assert caught.value.reason == told
    assert str(caught.value) == f"{told}; capture it with inputs of these sizes"


def test_an_error_keeps_its_reason_and_its_remedy_in_another_process():
    for kind in (CaptureError, BranchError):
        error = pickle.loads(pickle.dumps(kind("Net: it fails; badly", "mend it")))
        assert (error.reason, error.remedy) == ("Net: it fails; badly", "mend it")
        assert str(error) == "Net: it fails; badly; mend it"
    assert str(CaptureError("Net: a graph would not do")) == "Net: a graph would not do"
