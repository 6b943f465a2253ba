"""Models that are no plain models: handled, or refused by name; and never touched."""

import contextlib
import copy
import warnings

import pytest
import torch
import torch.ao.quantization as quantization
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import lean_fx
from graphs import reasons
from lean_fx.copying import copied_whole, memory_of
from lean_fx.errors import ArgumentError, CaptureError, ExportError

pytestmark = pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning", "ignore::FutureWarning")

X = torch.rand(2, 4)
PICTURES = torch.rand(2, 3, 8, 8)


def mlp():
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 8))


def layers(model, inputs=None):
    return [name for site in lean_fx.plan(model, inputs).sites for name in site.layers]


def form(model):
    """All that a user can see of a model, but the values."""
    seen = []
    for name, module in model.named_modules(remove_duplicate=False):
        seen.append((name, id(module), type(module), module.training, sorted(vars(module))))
        seen += [(key, [*value]) for key, value in vars(module).items() if key.endswith("hooks")]
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            lazy = nn.parameter.is_lazy(tensor)
            if tensor is None or lazy:
                seen.append((key, id(tensor)))
                continue
            grad = None if tensor.grad is None else id(tensor.grad)
            memory = memory_of(tensor)
            seen.append((key, id(tensor), tensor._version, tensor.requires_grad, grad, memory))
    return seen


def values(model):
    tensors = (*model.parameters(), *model.buffers())
    known = [x for x in tensors if not (nn.parameter.is_lazy(x) or x.is_meta)]
    return [x.detach().clone() for x in known]


def try_all(model, inputs, folder):
    """Call everything on a model; whatever becomes of it, the model stays as it is."""
    before, held = form(model), values(model)
    for call in (
        lambda: lean_fx.plan(model),
        lambda: lean_fx.plan(model, inputs).apply(model, inputs),
        lambda: lean_fx.leanify(model, inputs),
        lambda: lean_fx.costs_of(model, inputs),
        lambda: lean_fx.export_onnx(model, folder / "a.onnx", inputs, tolerance=None),
    ):
        with contextlib.suppress(lean_fx.LeanError):
            call()
        assert form(model) == before
    for now, then in zip(values(model), held, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


# Lazy layers.

LAZY = {
    "layer '2' (LazyLinear)": lambda: (
        nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.LazyLinear(8)),
        X,
    ),
    "layer '1.1' (LazyConv2d)": lambda: (
        nn.Sequential(nn.Conv2d(3, 32, 3), nn.Sequential(nn.ReLU(), nn.LazyConv2d(8, 3))),
        PICTURES,
    ),
    "layer '1' (LazyBatchNorm2d)": lambda: (
        nn.Sequential(nn.Conv2d(3, 32, 3), nn.LazyBatchNorm2d(affine=False)),
        PICTURES,
    ),
    "LazyLinear": lambda: (nn.LazyLinear(8), X),
}


@pytest.mark.parametrize("name", LAZY)
def test_lazy_layers_are_refused_by_name(name, tmp_path):
    model, inputs = LAZY[name]()
    before = form(model)
    text = f"{name} has no shape yet; call the model once on a batch first"
    calls = {
        "model": lambda: lean_fx.plan(model, inputs),
        "export_onnx": lambda: lean_fx.export_onnx(model, tmp_path / "a.onnx", inputs),
        "compare: 'a'": lambda: lean_fx.compare({"a": model}, inputs),
    }
    for subject, call in calls.items():
        with pytest.raises(ArgumentError) as caught:
            call()
        assert str(caught.value) == f"{subject}: {text}"
    with pytest.raises(ArgumentError, match="has no shape yet"):
        lean_fx.costs_of(model, inputs)
    assert form(model) == before
    assert list(tmp_path.iterdir()) == []


def test_lazy_layers_that_know_their_shape_are_reduced():
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.LazyBatchNorm2d(), nn.LazyConv2d(8, 3))
    model(PICTURES)
    assert layers(model, PICTURES) == ["2"]


# Quantised layers.


def dynamic():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.quantize_dynamic(mlp())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(32, 64)
        self.lstm = nn.LSTM(64, 16, 2, batch_first=True)
        self.b = nn.Linear(16, 8)

    def forward(self, x):
        return self.b(self.lstm(F.relu(self.a(x)))[0])


def prepared(train):
    parts = nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3)
    model = nn.Sequential(quantization.QuantStub(), *parts, quantization.DeQuantStub())
    model.train(train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if train:
            model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
            return quantization.prepare_qat(model)
        model.qconfig = quantization.get_default_qconfig("fbgemm")
        quantization.prepare(model, inplace=True)
        model(PICTURES)
    return model


def static():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.convert(prepared(False))


QUANTISED = "its weights are quantised; reduce the float model, then quantise that"


@pytest.mark.parametrize("given", [True, False])
def test_quantised_layers_are_left_alone_with_a_reason(given):
    assert reasons(dynamic(), X if given else None) == {"0": QUANTISED, "2": QUANTISED}
    assert reasons(static(), PICTURES if given else None) == {"1": QUANTISED, "3": QUANTISED}
    model = quantization.quantize_dynamic(Recurrent(), {nn.LSTM})
    x = torch.rand(2, 5, 32)
    assert reasons(model, x if given else None)["lstm"] == QUANTISED
    lean = lean_fx.leanify(model, x if given else None)
    assert lean.b.in_features == 4
    assert lean(x).shape == (2, 5, 8)


def test_layers_in_training_for_quantisation_are_left_alone():
    found = reasons(prepared(True), PICTURES)
    assert set(found.values()) == {"it has hooks, which a rebuilt layer would lose"}


@pytest.mark.parametrize(
    ("make", "inputs", "layer"),
    [
        (dynamic, X, "layer '0' (torch.ao.nn.quantized.dynamic.modules.linear.Linear)"),
        (static, PICTURES, "layer '0' (torch.ao.nn.quantized.modules.Quantize)"),
        (lambda: prepared(False), PICTURES, "layer '0.activation_post_process' ("),
        (lambda: prepared(True), PICTURES, "layer '0.activation_post_process' ("),
    ],
)
def test_quantised_layers_are_not_exported(make, inputs, layer, tmp_path, capfd):
    with pytest.raises(ExportError) as caught:
        lean_fx.export_onnx(make(), tmp_path / "a.onnx", inputs)
    assert str(caught.value).startswith(f"export_onnx: {layer}")
    assert str(caught.value).endswith(
        " is of torch.ao.quantization, which has no ONNX form; export the float model, with "
        "quantize='dynamic' or 'static' for an INT8 file"
    )
    assert capfd.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_quantised_layers_have_no_formula():
    model = quantization.quantize_dynamic(Recurrent(), {nn.LSTM, nn.Linear})
    assert lean_fx.costs_of(model, torch.rand(2, 5, 32)).without_formula == ("a", "lstm", "b")


def with_weight(weight, *, parameter=True):
    model = mlp()
    del model[2].weight
    if parameter:
        kept = isinstance(weight, nn.Parameter)
        floats = weight.is_floating_point()
        model[2].weight = weight if kept else nn.Parameter(weight, requires_grad=floats)
    else:
        model[2].register_buffer("weight", weight)
    return model


class Scaled(nn.Parameter):
    """A parameter of a subclass."""


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (with_weight(torch.ones(8, 32, dtype=torch.int8)), "its weight is torch.int8, which is "),
        (with_weight(torch.ones(8, 32), parameter=False), "its weight is no parameter"),
        (with_weight(Scaled(torch.ones(8, 32))), "its weight is a Scaled, which a "),
        (mlp().to(torch.complex64), "its weight is torch.complex64, which is not floating-point"),
    ],
)
def test_weights_that_cannot_be_made_anew(model, reason):
    assert reasons(model)["2"].startswith(reason)
    assert len(list(lean_fx.leanify(model).parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types(dtype):
    lean = lean_fx.leanify(mlp().to(dtype), X.to(dtype))
    assert lean(X.to(dtype)).dtype is dtype
    assert lean.get_submodule("2").in_features == 4


# Models on the meta device.


def on_meta(make):
    with torch.device("meta"):
        return make()


@pytest.mark.parametrize("inputs", [None, X, X.to("meta")], ids=["none", "cpu", "meta"])
def test_models_on_the_meta_device_are_planned_and_reduced(inputs):
    model = on_meta(mlp)
    assert lean_fx.plan(model, inputs).sites[0].consumers == lean_fx.plan(mlp()).sites[0].consumers
    lean = lean_fx.leanify(model, inputs)
    assert all(parameter.is_meta for parameter in lean.parameters())
    lean.to_empty(device="cpu").load_state_dict(lean_fx.leanify(mlp(), X).state_dict())
    assert lean(X).isfinite().all()


def test_branches_are_followed_on_the_meta_device():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 32), nn.Linear(32, 8)

        def forward(self, x):
            x = self.a(x)
            return self.b(x) if x.shape[0] > 1 else x

    model = on_meta(Branching)
    assert layers(model, X) == layers(model, X.to("meta")) == ["b"]


def test_a_part_on_the_meta_device():
    model = mlp()
    model[2].to("meta")
    for inputs in (None, X, X.to("meta")):
        lean = lean_fx.leanify(model, inputs)
        assert [name for name, each in lean.named_parameters() if each.is_meta] == [
            *("2.weight", "2.bias", "reductions._1.seed")
        ]


META = "'0.weight' is on the meta device and has no values; give it some first, with to_empty() "


def test_what_needs_values_refuses_the_meta_device(tmp_path):
    model = on_meta(mlp)
    lean = lean_fx.leanify(model)
    for each in (model, lean):
        for inputs in (X, X.to("meta")):
            with pytest.raises(
                ArgumentError, match=rf"^export_onnx: {META}".replace("()", r"\(\)")
            ):
                lean_fx.export_onnx(each, tmp_path / "a.onnx", inputs)
            with pytest.raises(ArgumentError, match=f"^compare: 'a': {META[:60]}"):
                lean_fx.compare({"a": each}, inputs)
    with pytest.raises(ArgumentError, match="^compare: example_inputs are on the meta device"):
        lean_fx.compare({"a": mlp()}, X.to("meta"))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_traced_must_have_values():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 32), nn.Linear(32, 8)

        def forward(self, x):
            x = self.a(x)
            return self.b(x if x.sum() > 0 else -x)

    with pytest.raises(ArgumentError, match="^model: 'a.weight' is on the meta device and has no "):
        lean_fx.plan(on_meta(Untraceable), X)


@pytest.mark.parametrize("make", [mlp, Recurrent])
def test_costs_on_the_meta_device_are_those_on_the_cpu(make):
    x = X if make is mlp else torch.rand(2, 5, 32)
    costs = lean_fx.costs_of(make(), x)
    for model, inputs in (
        (on_meta(make), x),
        (on_meta(make), x.to("meta")),
        (make(), x.to("meta")),
    ):
        assert lean_fx.costs_of(model, inputs) == costs


# Hooks.


def nested():
    block = nn.Sequential(nn.ReLU(), nn.Linear(32, 32))
    return nn.Sequential(nn.Linear(4, 32), block, nn.ReLU(), nn.Linear(32, 8))


HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda module, args, out: out * 2),
    "pre": lambda m: m.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "backward": lambda m: m.register_full_backward_hook(lambda module, inner, outer: None),
    "backward pre": lambda m: m.register_full_backward_pre_hook(lambda module, outer: None),
    "state": lambda m: m.register_state_dict_pre_hook(lambda module, prefix, keep: None),
    "state post": lambda m: m.register_state_dict_post_hook(lambda *args: None),
    "load": lambda m: m.register_load_state_dict_pre_hook(lambda *args: None),
    "load post": lambda m: m.register_load_state_dict_post_hook(lambda module, keys: None),
}


def hooks_of(module):
    return {key: len(held) for key, held in vars(module).items() if key.endswith("hooks") and held}


@pytest.mark.parametrize("where", ["", "0", "1", "2"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_stay(kind, where):
    model = nested()
    HOOKS[kind](model.get_submodule(where))
    for inputs in (X, None):
        lean = lean_fx.leanify(model, inputs)
        assert lean.get_submodule("3").in_features == 4
        for each in (lean, copy.deepcopy(lean) if where in ("0", "2") else lean):
            assert hooks_of(each.get_submodule(where)) == hooks_of(model.get_submodule(where))


@pytest.mark.parametrize("kind", HOOKS)
def test_layers_with_hooks_are_left_alone(kind):
    model = nested()
    HOOKS[kind](model[3])
    assert reasons(model, X)["3"] == "it has hooks, which a rebuilt layer would lose"
    assert hooks_of(lean_fx.leanify(model).get_submodule("3")) == hooks_of(model[3])


def test_hooks_of_containers_see_values_and_gradients():
    seen = []
    gradients = []
    model = nested()
    model[1].register_forward_hook(lambda module, args, out: seen.append(type(out)))
    model[1].register_full_backward_hook(lambda module, inner, outer: gradients.append(outer[0]))
    assert reasons(model)["1.1"] == "inside 1, which has hooks"
    lean = lean_fx.leanify(model, X)
    assert lean.get_submodule("1.1").in_features == 4
    seen.clear()
    lean(X).sum().backward()
    assert seen == [Tensor]
    assert gradients[0].shape == (2, 32)


def test_hooks_of_containers_change_values():
    model = nested()
    model[1].register_forward_hook(lambda module, args, out: out * 0)
    lean = lean_fx.leanify(model, X)
    assert not lean.get_submodule("1")(torch.rand(2, 32)).any()


def test_load_hooks_know_their_module():
    loaded = []
    model = nested()
    for module in (model, model[1]):
        module.register_load_state_dict_pre_hook(lambda module, *rest: loaded.append(module))
    lean = lean_fx.leanify(model)
    lean.load_state_dict(lean.state_dict())
    assert loaded == [lean, lean.get_submodule("1")]


def test_hooks_of_parameters_stay():
    model = mlp()
    model[0].weight.register_hook(lambda gradient: gradient * 0)
    lean = lean_fx.leanify(model, X)
    lean(X).sum().backward()
    assert not lean.get_parameter("0.weight").grad.any()
    assert lean.get_parameter("0.bias").grad.any()
    model[2].weight.register_hook(lambda gradient: gradient * 0)
    assert reasons(model)["2"] == "its parameter has hooks, which a rebuilt layer would lose"


OLD_NORMS = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("norm", OLD_NORMS)
def test_weights_that_hooks_compute(norm, called, tmp_path):
    model = nn.Sequential(OLD_NORMS[norm](nn.Linear(4, 32)), nn.ReLU(), nn.Linear(32, 8))
    if called:
        model(X)
    lean = lean_fx.leanify(model, X).eval()
    assert lean.get_submodule("2").in_features == 4
    torch.testing.assert_close(lean.get_submodule("0")(X), model.eval()[0](X))
    lean.train()(X).sum().backward()
    learned = [name for name, each in lean.named_parameters() if each.grad is not None]
    assert len(learned) == len(list(lean.parameters()))
    lean_fx.export_onnx(lean, tmp_path / "a.onnx", X)


def test_pruned_layers_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), OLD_NORMS["pruning"](nn.Linear(32, 8)))
    assert reasons(model)["2"] == "it has hooks, which a rebuilt layer would lose"


# What shares memory.


class Net(nn.Module):
    def __init__(self, change=lambda self: None):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.norm, self.last = nn.BatchNorm1d(32), nn.BatchNorm1d(32)
        change(self)

    def forward(self, x):
        x = F.relu(self.norm(self.b(F.relu(self.a(x)))))
        extras = [each.extra for each in (self, self.a) if hasattr(each, "extra")]
        return self.last(self.c(x)) + sum(each.sum() for each in extras)


def shared(model):
    """The names of parameters and buffers that share memory."""
    places = {}
    tensors = [*model.named_parameters(remove_duplicate=False)]
    for name, tensor in (*tensors, *model.named_buffers(remove_duplicate=False)):
        places.setdefault(memory_of(tensor)[0], set()).add(name)
    return [names for names in places.values() if len(names) > 1]


def flat(self):
    held = [
        (m, key, p) for m in self.modules() for key, p in m._parameters.items() if p is not None
    ]
    whole, start = torch.cat([p.detach().flatten() for *_, p in held]), 0
    for module, key, parameter in held:
        part = whole[start : start + parameter.numel()]
        module._parameters[key] = nn.Parameter(part.view_as(parameter))
        start += parameter.numel()


CHANGES = {
    "a view of a weight": (
        lambda self: self.a.register_buffer("extra", self.a.weight.detach()[:2]),
        [{"a.weight", "a.extra"}],
        ["b", "c"],
    ),
    "a view of a weight to reduce": (
        lambda self: self.register_buffer("extra", self.b.weight.detach()[:2]),
        [{"b.weight", "extra"}],
        ["c"],
    ),
    "a view of a statistic": (
        lambda self: self.register_buffer("extra", self.norm.running_mean.view(4, 8)),
        [{"norm.running_mean", "extra"}],
        ["b", "c"],
    ),
    "one buffer of two modules": (
        lambda self: setattr(self.last, "running_mean", self.norm.running_mean),
        [{"norm.running_mean", "last.running_mean"}],
        ["b", "c"],
    ),
    "an expanded buffer": (
        lambda self: self.register_buffer("extra", torch.ones(1).expand(8)),
        [],
        ["b", "c"],
    ),
    "tied weights": (
        lambda self: setattr(self.c, "weight", self.b.weight),
        [{"b.weight", "c.weight"}],
        [],
    ),
    "transposed weights": (
        lambda self: setattr(self.c, "weight", nn.Parameter(self.b.weight.detach().t())),
        [{"b.weight", "c.weight"}],
        [],
    ),
    "all in one tensor": (
        flat,
        [{f"{n}.{k}" for n in ("a", "norm", "last") for k in ("weight", "bias")}],
        ["b", "c"],
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_memory_is_shared_as_in_the_model(name, tmp_path):
    change, groups, reduced = CHANGES[name]
    model = Net(change)
    for inputs in (X, None):
        plan = lean_fx.plan(model, inputs)
        assert [layer for site in plan.sites for layer in site.layers] == reduced
        for lean in (plan.apply(model, inputs), lean_fx.leanify(model, inputs)):
            assert shared(lean) == groups
            lean(X).sum().backward()
    for stale, new in zip(values(model), values(copied_whole(model)), strict=True):
        torch.testing.assert_close(stale, new, rtol=0, atol=0)


def test_who_shares_memory_is_named():
    model = Net(CHANGES["a view of a weight to reduce"][0])
    assert reasons(model)["b"] == "its parameter is used elsewhere: b.weight, extra"


def test_two_names_of_a_buffer_stay_one_tensor():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 32), nn.Linear(32, 8)
            self.register_buffer("count", torch.zeros(1))
            self.register_buffer("again", self.count)

        def forward(self, x):
            self.count.add_(1)
            return self.b(F.relu(self.a(x))) * 0 + self.again

    lean = lean_fx.leanify(Counting())
    assert lean(X).eq(1).all()
    assert lean(X).eq(2).all()


WRAPPED = {
    "RecursiveScriptModule object is of TorchScript; give the model that it was made from": (
        torch.jit.script
    ),
    "OptimizedModule object is compiled; give the model itself, its _orig_mod": (
        lambda model: torch.compile(model, backend="eager")
    ),
    "DataParallel object is a wrapper; give the model itself, its module": nn.DataParallel,
}


@pytest.mark.parametrize("text", WRAPPED)
@pytest.mark.parametrize("inputs", [X, None], ids=["inputs", "none"])
def test_what_wraps_a_model_is_refused_by_name(text, inputs):
    with pytest.raises(ArgumentError, match=f"^model={text}$"):
        lean_fx.leanify(WRAPPED[text](mlp()), inputs)


@pytest.mark.parametrize("inputs", [X, None], ids=["inputs", "none"])
def test_buffers_that_are_not_saved_stay_so(inputs):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.rand(4), persistent=False)
            self.register_buffer("shift", torch.rand(4))

        def forward(self, x):
            return x + self.table + self.shift if self.training else x - self.table

    class Outer(Positions):
        def __init__(self):
            super().__init__()
            self.inner, self.a, self.b = Positions(), nn.Linear(4, 32), nn.Linear(32, 4)

        def forward(self, x):
            return self.b(self.a(self.inner(x) * self.table + self.shift))

    for training in (True, False):
        model = Outer().train(training)
        lean = lean_fx.leanify(model, inputs, min_channels=64)
        assert lean.state_dict().keys() == model.state_dict().keys()
        copied = copy.deepcopy(lean).get_submodule("inner")
        assert copied.state_dict().keys() == model.inner.state_dict().keys()


@pytest.mark.parametrize("add", ["register_buffer", "register_parameter", "register_module"])
def test_what_a_layer_holds_besides_is_not_lost(add):
    held = {"register_module": nn.Linear(8, 8)}.get(add, nn.Parameter(torch.ones(8)))
    model = mlp()
    getattr(model[2], add)("mask", held)
    assert reasons(model, X)["2"] == "it holds mask, which a rebuilt layer would lose"


def test_a_computed_attribute_is_refused_by_name(tmp_path):
    model = mlp()
    whole = nn.Parameter(torch.rand(8 * 32))
    model.register_parameter("whole", whole)
    del model[2].weight
    model[2].weight = whole.view(8, 32)
    text = (
        "Sequential: cannot be copied: '2.weight' is computed from other tensors; make it a "
        "parameter or a buffer, or compute it in forward"
    )
    for inputs in (None, X):
        with warnings.catch_warnings(record=True) as warned, pytest.raises(CaptureError) as caught:
            lean_fx.plan(model, inputs)
        assert str(caught.value) == text
        assert warned == []
    with pytest.raises(ArgumentError, match="^compare: 'a': Sequential: cannot be copied: '2"):
        lean_fx.compare({"a": model}, X)


# The user's model.


def trained(model, inputs=X):
    model(inputs).sum().backward()
    return model


MODELS = {
    "a trained model": lambda: (trained(Net()), X),
    "in eval mode": lambda: (Net().eval(), X),
    "half in eval mode": lambda: (nn.Sequential(mlp().eval(), nn.Linear(8, 2)), X),
    "frozen": lambda: (mlp().requires_grad_(False), X),
    "lazy": lambda: (nn.Sequential(nn.Linear(4, 32), nn.LazyLinear(8)), X),
    "lazy buffers": lambda: (nn.Sequential(nn.Linear(4, 32), nn.LazyBatchNorm1d(affine=False)), X),
    "meta": lambda: (on_meta(mlp), X),
    "quantised": lambda: (dynamic(), X),
    "for quantisation": lambda: (prepared(True), PICTURES),
    "weight norm": lambda: (nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 32))), X),
    "a new norm": lambda: (nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 32))), X),
    "hooks": lambda: (trained(nested()), X),
    "recurrent": lambda: (Recurrent(), torch.rand(2, 5, 32)),
    "NaN": lambda: (with_weight(torch.full((8, 32), float("nan"))), X),
    **{name: (lambda change=change: (Net(change), X)) for name, (change, *_) in CHANGES.items()},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_never_touched(name, tmp_path):
    model, inputs = MODELS[name]()
    given = inputs.clone()
    try_all(model, inputs, tmp_path)
    torch.testing.assert_close(inputs, given, rtol=0, atol=0)
