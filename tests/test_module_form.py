"""form="module": the model keeps its class, and its layers reduce their own input."""

import copy
import dataclasses
import functools
import itertools
import pickle
import threading

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lean_fx
from graphs import CHANGED, UNCHANGED, both_forms
from lean_fx.capture.capturing import capture
from lean_fx.errors import ArgumentError, PlanError
from lean_fx.layers.shared_inputs import ReduceOnce
from test_module_splits import Mixed

X = torch.rand(2, 6, 5)
MODELS = {**CHANGED, **UNCHANGED}


class Attends(nn.Module):
    """Attention written out: three layers read one value."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return x + (q @ k.transpose(1, 2)).softmax(-1) @ v


class Net(nn.Module):
    """A stem, blocks in a list, a head, and methods of its own."""

    classes = 7

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(5, 32)
        self.blocks = nn.ModuleList([Attends(), Attends()])
        self.conv = nn.Conv1d(32, 32, 3)
        self.head = nn.Linear(32 * 4, self.classes)

    def features(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.conv(x.transpose(1, 2).relu())

    def forward(self, x):
        return self.head(self.features(x).flatten(1))

    def predict(self, x):
        return self(x).argmax(1)


def calls_of(reduction):
    calls = []
    reduction.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("name", MODELS)
def test_both_forms_give_equal_numbers(name):
    make, shape = MODELS[name]
    model, inputs = make().double(), torch.rand(shape).double()
    plan = lean_fx.plan(model, inputs, form="module")
    one, other = both_forms(plan, model, inputs)
    assert type(one) is type(model)
    assert one.meta["lean_fx.plan"] == plan
    torch.testing.assert_close(one(inputs), other(inputs), rtol=1e-12, atol=1e-14)
    counts = [sum(each.numel() for each in made.parameters()) for made in (one, other)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", MODELS)
def test_it_reduces_what_a_graph_does_but_for_parameters_of_no_layer(name):
    make, shape = MODELS[name]
    model, inputs = make(), torch.rand(shape)
    graph, module = (lean_fx.plan(model, inputs, form=form) for form in ("graph", "module"))
    layers = [{layer for site in plan.sites for layer in site.layers} for plan in (graph, module)]
    assert layers[0] - layers[1] == {*graph.weights}
    assert layers[1] <= layers[0]
    assert module.split_layers == graph.split_layers


def test_the_class_its_methods_and_containers_stay():
    model = Net()
    lean = lean_fx.leanify(model, X, form="module")
    assert type(lean) is Net
    assert lean.predict(X).shape == (2,)
    assert len(lean.blocks) == 2
    assert type(lean.blocks[-1]) is Attends
    ran = []
    lean.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    lean.predict(X)
    assert ran == [1]
    assert lean.features(X).shape == (2, 32, 4)
    assert model.head.in_features == 128
    assert lean.head.in_features == 16


def test_signs_are_those_of_the_graph():
    lean = lean_fx.leanify(Net(), X, form="module")
    assert lean.conv.reduction.nonnegative
    assert not lean.head.reduction.nonnegative
    plan = lean_fx.plan(Net(), X, form="module")

    class Other(Net):
        def features(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return self.conv(x.transpose(1, 2).tanh())

    sites = tuple(
        dataclasses.replace(site, value="tanh") if site.value == "relu" else site
        for site in plan.sites
    )
    assert not dataclasses.replace(plan, sites=sites).apply(Other(), X).conv.reduction.nonnegative


def test_layers_that_read_one_tensor_share_its_reduction():
    lean = lean_fx.leanify(Net(), X, form="module")
    block = lean.blocks[0]
    assert block.q.reduction is block.k.reduction is block.v.reduction
    calls = calls_of(block.q.reduction)
    for count in (1, 2):
        lean(X)
        assert len(calls) == count
    with torch.inference_mode():
        lean(X)
    assert len(calls) == 3
    torch.func.functional_call(lean, dict(lean.named_parameters()), (X,))
    assert len(calls) == 4


def test_a_copy_shares_among_its_own_layers():
    lean = lean_fx.leanify(Net(), X, form="module")
    lean(X)
    for copied in (copy.deepcopy(lean), pickle.loads(pickle.dumps(lean))):
        block = copied.blocks[0]
        assert block.q.reduction is block.k.reduction is not lean.blocks[0].q.reduction
        calls = calls_of(block.q.reduction)
        torch.testing.assert_close(copied(X), lean(X), rtol=0, atol=0)
        assert len(calls) == 1


def shared():
    layers = [nn.Linear(4, 3), nn.Linear(4, 2)]
    reduction, hook = lean_fx.LeanReduction(8, 4, dim=-1), ReduceOnce(2)
    for layer in layers:
        layer.reduction = reduction
        layer.register_forward_pre_hook(hook, with_kwargs=True)
    return layers, reduction, torch.rand(3, 8)


def test_a_value_that_was_written_to_is_reduced_anew():
    (one, other), reduction, x = shared()
    one(x)
    x.mul_(0.5).add_(torch.rand(3, 8))
    with torch.no_grad():
        wanted = F.linear(reduction(x), other.weight, other.bias)
    torch.testing.assert_close(other(x), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("change", ["weights", "gradients", "mode", "autocast", "again", "thread"])
def test_a_result_that_is_out_of_date_is_computed_anew(change):
    (one, other), reduction, x = shared()
    calls = calls_of(reduction)
    with torch.set_grad_enabled(change != "gradients"):
        one(x)
    if change == "weights":
        with torch.no_grad():
            reduction.seed.mul_(2).add_(torch.rand_like(reduction.seed))
    if change == "mode":
        reduction.eval()
    if change == "again":
        one(x)
        assert len(calls) == 2
        other(x)  # of the same pass
        assert len(calls) == 2
        return
    if change == "thread":
        thread = threading.Thread(target=other, args=(x,))
        thread.start()
        thread.join()
    else:
        with torch.autocast("cpu", enabled=change == "autocast"):
            out = other(x)
        assert out.requires_grad
    assert len(calls) == 2


def test_a_named_argument_is_reduced():
    (one, other), reduction, x = shared()
    calls = calls_of(reduction)
    torch.testing.assert_close(one(input=x), F.linear(reduction(x), one.weight, one.bias))
    other(input=x)
    assert len(calls) == 2  # one is the test's own


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_saves_what_it_computes_again(reentrant):
    class Checkpointed(Attends):
        def forward(self, x):
            parts = (checkpoint(each, x, use_reentrant=reentrant) for each in (self.q, self.k))
            return sum(parts) + self.v(x)

    model, inputs = nn.Sequential(nn.Linear(5, 32), Checkpointed()), torch.rand(2, 6, 5)
    lean = lean_fx.leanify(model, inputs, form="module")
    assert len({site.layers for site in lean_fx.plan_of(lean).sites}) >= 1
    lean(inputs).square().sum().backward()
    found = {name: each.grad.clone() for name, each in lean.named_parameters()}
    plain = copy.deepcopy(lean)
    plain[1].forward = lambda x: plain[1].q(x) + plain[1].k(x) + plain[1].v(x)
    plain.zero_grad()
    plain(inputs).square().sum().backward()
    for name, each in plain.named_parameters():
        torch.testing.assert_close(found[name], each.grad)


def test_it_trains_as_its_graph_does():
    model = Net()
    plan = lean_fx.plan(model, X, form="module")
    grads = []
    for made in both_forms(plan, model, X):
        made.train()
        made(X).square().sum().backward()
        grads.append(sorted(float(each.grad.norm()) for each in made.parameters()))
    torch.testing.assert_close(torch.tensor(grads[0]), torch.tensor(grads[1]))


def test_it_compiles():
    lean = lean_fx.leanify(Net(), X, form="module").eval()
    compiled = torch.compile(lean, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), lean(X))


def test_it_exports_each_shared_reduction_once(tmp_path):
    plan = lean_fx.plan(Net(), X, form="module")
    for made, name in zip(both_forms(plan, Net(), X), ("module", "graph"), strict=True):
        lean_fx.export_onnx(made, tmp_path / f"{name}.onnx", X)
    files = [onnx.load(tmp_path / f"{name}.onnx") for name in ("module", "graph")]
    counts = [sum(node.op_type == "LEAN" for node in file.graph.node) for file in files]
    assert counts == [len(plan.sites), len(plan.sites)] == [4, 4]
    assert lean_fx.plan_of(tmp_path / "module.onnx") == plan


def test_it_is_saved_and_loaded(tmp_path):
    model = Net()
    lean = lean_fx.leanify(model, X, form="module")
    lean_fx.save(lean, tmp_path / "net.safetensors")
    loaded = lean_fx.load(tmp_path / "net.safetensors", model, X)
    assert type(loaded) is Net
    torch.testing.assert_close(loaded(X), lean(X), rtol=0, atol=0)
    assert loaded.blocks[0].q.reduction is loaded.blocks[0].k.reduction


def test_a_layer_that_forward_writes_out():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Linear(5, 32), nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            x = self.stem(x)
            return F.linear(x, self.a.weight, self.a.bias) + self.b(x)

    model = Written()
    plan = lean_fx.plan(model, X, form="module")
    (one, other) = sorted(plan.sites, key=lambda site: site.layers)
    assert (one.layers, one.value, one.consumers[0].applied_by) == (("a",), "", "")
    assert (other.layers, other.value) == (("b",), "stem")
    lean = plan.apply(model, X)
    assert lean(X).shape == (2, 6, 32)
    assert lean.a.weight.shape == lean.b.weight.shape == (32, 4)


def test_a_model_that_asks_for_the_old_width():
    class Asks(Net):
        def forward(self, x):
            return self.head(self.features(x).reshape(-1, self.head.in_features))

    plan = lean_fx.plan(Asks(), X, form="module")
    (left,) = (each for each in plan.left_alone if each.layer == "head")
    assert left.reason.code == "fails_reduced"
    assert plan.apply(Asks(), X)(X).shape == (2, 7)


def test_a_layer_under_two_names():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one = nn.Linear(5, 32), nn.Linear(32, 32)
            self.other, self.head = self.one, nn.Linear(32, 2)

        def forward(self, x):
            return self.head(self.other(self.one(self.stem(x))))

    lean = lean_fx.leanify(Twice(), X, form="module")
    assert lean.one is lean.other
    assert lean(X).shape == (2, 6, 2)
    assert lean.head.in_features == 4


def test_the_sites_that_pay():
    plans = [lean_fx.plan(Net(), X, keep="saving", form=form) for form in ("graph", "module")]
    assert [site.layers for site in plans[0].sites] == [site.layers for site in plans[1].sites]
    assert plans[1].apply(Net(), X)(X).shape == (2, 7)


def test_what_cannot_be_traced_needs_no_warning(recwarn):
    class Branches(Net):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    lean = lean_fx.leanify(Branches(), X, form="module")
    assert type(lean) is Branches
    assert lean.head.in_features == 16 or lean.head.in_features < 128
    assert not [each for each in recwarn if issubclass(each.category, lean_fx.LeanWarning)]


def test_a_plan_survives_json():
    plan = lean_fx.plan(Net(), X, form="module")
    again = lean_fx.Plan.from_json(plan.to_json())
    assert again == plan
    assert type(again.apply(Net(), X)) is Net
    with pytest.raises(PlanError, match=r"form='both' is neither 'graph' nor 'module'"):
        lean_fx.Plan.from_json(plan.to_json().replace('"form": "module"', '"form": "both"'))
    with pytest.raises(PlanError, match="traced=False has form='module'"):
        lean_fx.Plan.from_json(
            lean_fx.plan(Net(), X).to_json().replace('"traced": true', '"traced": false')
        )


def test_a_plan_of_another_model():
    plan = lean_fx.plan(Net(), X, form="module")
    other = Net()
    other.conv = nn.Conv1d(32, 32, 3, groups=2)
    with pytest.raises(PlanError, match="layer 'conv' reads 32 channels in 2 groups"):
        plan.apply(other, X)


def test_refusals():
    with pytest.raises(ArgumentError, match=r"form='both'"):
        lean_fx.plan(Net(), X, form="both")
    with pytest.raises(ArgumentError, match="form='module' needs example_inputs"):
        lean_fx.leanify(Net(), form="module")
    plan = lean_fx.plan(Mixed(), X)
    assert plan.weights == ("table",)
    text = r"form='module' keeps forward as it is, so 'table' cannot become a layer"
    with pytest.raises(PlanError, match=text):
        dataclasses.replace(plan, form="module").apply(Mixed(), X)
    plan = dataclasses.replace(lean_fx.plan(Mixed(), X, form="module"), split_layers=("stem",))
    with pytest.raises(PlanError, match="'stem' is neither a stack of recurrent layers nor a Mul"):
        plan.apply(Mixed(), X)


def test_the_users_model_is_never_touched():
    model = Net()
    state = {name: each.clone() for name, each in model.state_dict().items()}
    lean = lean_fx.leanify(model, X, form="module")
    lean(X).sum().backward()
    for name, each in itertools.chain(model.named_parameters(), model.named_buffers()):
        assert torch.equal(each, state[name])
        assert each.grad is None
    assert not hasattr(model, "meta")
    assert all(not layer._forward_pre_hooks for layer in model.modules())


def test_methods_that_a_graph_has_not_are_no_reason_to_forget_signs():
    class Frozen(Net):
        """Keeps its stem in evaluation; its checkpoints are of an older form."""

        kept = True

        def train(self, mode=True):
            super().train(mode)
            if self.kept:
                self.stem.eval()
            return self

        def state_dict(self, *args, **kwargs):
            return {"net": super().state_dict(*args, **kwargs)}

    model = Frozen().train()
    with pytest.warns(lean_fx.LeanWarning, match="has a train of its own"):
        given = lean_fx.plan(model, X)
    plan = lean_fx.plan(model, X, form="module")
    assert plan.traced
    assert plan == given
    lean = plan.apply(model, X)
    assert lean.conv.reduction.nonnegative
    assert lean.blocks[0].q.reduction is lean.blocks[0].k.reduction
    lean.train()
    assert (lean.training, lean.stem.training) == (True, False)
    assert [*lean.state_dict()] == ["net"]


def test_a_decorated_forward_is_traced():
    def checked(forward):
        @functools.wraps(forward)
        def wrapper(self, *args, **kwargs):
            flag = kwargs.pop("flag", None)
            return forward(self, *args, **kwargs) * (1 if flag is None else 2)

        return wrapper

    class Decorated(Net):
        @checked
        def forward(self, x, scale=None, *, bias=0.0, **kwargs):
            return super().forward(x) + bias

    model = Decorated()
    for form in ("graph", "module"):
        plan = lean_fx.plan(model, X, form=form)
        assert (plan.traced, plan.form) == (True, form)
        lean = plan.apply(model, X)
        assert lean(X).shape == (2, 7)
    torch.testing.assert_close(capture(model, (X,))(X), model(X))


def test_a_train_that_changes_forward_is_no_source_of_facts():
    class Changes(Net):
        def train(self, mode=True):
            self.act = torch.relu if mode else torch.tanh
            return super().train(mode)

        def features(self, x):
            return self.conv(self.act(self.stem(x)).transpose(1, 2))

    model = Changes().train()
    plan = lean_fx.plan(model, X, form="module")
    assert not plan.traced
    assert not any(site.nonnegative for site in plan.sites)


def test_a_method_that_breaks_a_promise_of_forward_is_found():
    class Decodes(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.decode_layer = nn.Linear(5, 32), nn.Linear(32, 5)

        def forward(self, x):
            return self.decode(self.encode(x).relu())

        def decode(self, code):
            return self.decode_layer(code)

    lean = lean_fx.leanify(Decodes(), X, form="module")
    with lean_fx.checking_signs():
        lean(X)
        with pytest.raises(lean_fx.LeanError, match="the least value is -"):
            lean.decode(torch.randn(2, 32))


class Listed(nn.Module):
    """Calls its layers from a list that holds them too."""

    def __init__(self, branches):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        self.rnn = nn.GRU(32, 32, 2, batch_first=True)
        self.steps, self.branches = [self.a, self.b, {"last": (self.rnn, self.c)}], branches

    def forward(self, x):
        if self.branches and x.sum() > 1e9:
            return x
        first, second, held = self.steps
        rnn, last = held["last"]
        return last(rnn(second(first(x).relu()).relu())[0])


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
def test_lists_of_layers_hold_the_reduced_ones(branches):
    x = torch.rand(2, 6, 5)
    lean = lean_fx.leanify(Listed(branches), x, form="module")
    reduced = {name for site in lean_fx.plan_of(lean).sites for name in site.layers}
    assert reduced == {"b", "rnn.0", "rnn.1", "c"}
    assert lean.steps[1] is lean.b
    assert lean.steps[2]["last"][0] is lean.rnn
    lean(x).sum().backward()
    assert all(parameter.grad is not None for parameter in lean.parameters())
