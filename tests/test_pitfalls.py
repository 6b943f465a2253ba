"""What once went wrong, or nearly: one small model each."""

import copy
import inspect
import operator
import pickle
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import symbolic_trace

import lean_fx
from graphs import Net, graph_text, reasons, sites
from lean_fx.errors import ArgumentError, BranchError, CaptureError, PlanError
from lean_fx.passes import TrackWrites, facts


def test_buffers_are_values_of_the_graph():
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)
            self.register_buffer("mean", torch.ones(8))
            self.register_buffer("table", torch.randn(1, 5, 8))

        def forward(self, x):
            self.mean.mul_(0.5)
            return self.layer(x - self.mean.view(1, 1, -1) + self.table[:, : x.size(1)])

    model = Running()
    lean = lean_fx.leanify(model, torch.rand(2, 3, 8), reduce_inputs=True, min_channels=4)
    assert set(model.state_dict()) <= set(lean.state_dict())
    assert lean.mean.eq(1).all()
    lean(torch.rand(2, 3, 8))
    assert lean.mean.eq(0.5).all()
    assert model.mean.eq(1).all()


def test_a_weight_that_is_read_elsewhere_keeps_its_layer():
    def tied(self, x):
        code = F.relu(self.encoder(F.relu(self.stem(x))))
        return F.linear(code, self.encoder.weight.t())

    model = Net(tied, stem=nn.Linear(8, 64), encoder=nn.Linear(64, 32))
    assert reasons(model)["encoder"].startswith("its parameter is used elsewhere: encoder.weight, ")
    model = Net(lambda self, x: F.linear(x, 2 * self.a.weight), a=nn.Linear(8, 64))
    assert reasons(model)["a"] == "forward reads its weight itself"


def test_hooks_of_the_model_itself_are_kept():
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4))
    model.register_forward_hook(lambda module, args, out: out.softmax(-1))
    model.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    lean = lean_fx.leanify(model)
    out = lean(torch.rand(2, 4))
    torch.testing.assert_close(out.sum(-1), torch.ones(2))
    torch.testing.assert_close(out[0], out[1])


def test_hooks_of_layers_see_no_fake_tensors():
    seen = []
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4))
    model[1].register_forward_hook(lambda module, args, out: seen.append(type(out)))
    lean = lean_fx.leanify(model, torch.rand(2, 4))
    assert seen == []
    lean(torch.rand(2, 4))
    assert seen == [Tensor]


def test_what_a_layer_caches_while_planning_is_not_kept():
    class Caching(nn.Linear):
        cache = None

        def forward(self, x):
            if self.cache is None:
                self.cache = torch.ones(1)
            return super().forward(x) * self.cache

    lean = lean_fx.leanify(
        nn.Sequential(Caching(4, 32), nn.ReLU(), nn.Linear(32, 4)), torch.rand(2, 4)
    )
    assert type(lean(torch.rand(2, 4))) is Tensor


@pytest.mark.parametrize("drop", [torch.dropout, F.dropout, nn.functional.alpha_dropout])
def test_functions_that_take_the_mode_run(drop):
    model = Net(
        lambda self, x: self.b(drop(F.relu(self.a(x)), 0.5, self.training)),
        a=nn.Linear(4, 32),
        b=nn.Linear(32, 4),
    )
    for mode in (True, False):
        lean = lean_fx.leanify(model.train(mode), torch.rand(3, 4))
        assert lean(torch.rand(3, 4)).shape == (3, 4)


@pytest.mark.parametrize("mode", [True, False])
def test_any_function_that_takes_the_mode_follows_it(mode):
    model = Net(
        lambda self, x: F.rrelu(self.b(F.relu(self.a(x))), training=self.training),
        a=nn.Linear(4, 32),
        b=nn.Linear(32, 4),
    )
    lean = lean_fx.leanify(model.train(mode))
    x = torch.rand(5, 4)
    assert lean.eval()(x).equal(lean(x))
    assert not lean.train()(x).equal(lean(x))


def test_dropout_in_a_frozen_block_stays_off():
    block = Net(lambda self, x: F.dropout(x, 0.5, self.training))
    model = nn.Sequential(nn.Linear(4, 32), block, nn.Linear(32, 4)).train()
    block.eval()
    lean = lean_fx.leanify(model)
    inputs = torch.rand(3, 4)
    torch.testing.assert_close(lean(inputs), lean(inputs), rtol=0, atol=0)


def test_containers_have_the_models_mode():
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    assert not any(module.training for module in lean_fx.leanify(model).modules())


def test_a_second_leanify_adds_to_the_first():
    def branches(self, x):
        x = F.relu(self.a(x))
        return self.b(x) + self.c(x)

    model = Net(branches, a=nn.Linear(4, 32), b=nn.Linear(32, 4), c=nn.Linear(32, 4))
    once = lean_fx.leanify(model, skip="c", channels=4)
    twice = lean_fx.leanify(once, channels=8)
    assert [twice.b.in_features, twice.c.in_features] == [4, 8]
    assert twice(torch.rand(2, 4)).shape == (2, 4)


@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
def test_a_second_leanify_sees_reductions_through_a_flatten():
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Dropout()), nn.Linear(32 * 36, 8)
    )
    inputs = torch.rand(2, 3, 8, 8)
    once = lean_fx.leanify(model, inputs)
    assert reasons(once, inputs)["4"] == "it reads a reduction already"


@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
def test_a_reduction_of_ones_own_is_a_leaf_the_second_time():
    class Own(nn.Module):
        def __init__(self, in_channels, out_channels, dim):
            super().__init__()
            self.map = nn.Linear(in_channels, out_channels)

        def forward(self, x):
            return self.map(x)

    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4))
    once = lean_fx.leanify(model, reduction=Own)
    assert graph_text(lean_fx.leanify(once, reduction=Own)) == graph_text(once)


@pytest.mark.parametrize("name", ["reductions", "calls"])
def test_names_that_are_taken(name):
    def forward(self, x):
        x = F.relu(self.a(x))
        x = getattr(self, name)["relu"](x) if name in self._modules else x + getattr(self, name)
        return self.b(F.dropout(x, 0.5, self.training))

    parameter = nn.Parameter(torch.zeros(1))
    folder = nn.ModuleDict({"relu": nn.Identity(), "dropout": nn.Identity()})
    for taken in (parameter, folder):
        model = Net(forward, a=nn.Linear(4, 32), b=nn.Linear(32, 4), **{name: taken})
        lean = lean_fx.leanify(model)
        assert lean(torch.rand(2, 4)).shape == (2, 4)
        assert lean.b.in_features == 4


@pytest.mark.parametrize("name", ["code", "graph", "meta", "recompile"])
def test_names_that_a_graph_module_needs(name):
    model = Net(lambda self, x: x, **{name: nn.Linear(4, 4)})
    with pytest.raises(CaptureError, match=f"^Net: its submodule '{name}' has the name of an "):
        lean_fx.leanify(model)


def test_shapes_behind_data_dependent_operations_are_unknown():
    def scaled(self, x):
        return self.b(F.relu(self.a(x)) / x.max().item())

    model = Net(scaled, a=nn.Linear(4, 32), b=nn.Linear(32, 4))
    assert len(sites(model, torch.rand(2, 4))) == 1


def test_inputs_normalised_by_buffers_are_still_inputs():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(32))
            self.layer = nn.Linear(32, 4)

        def forward(self, x):
            return self.layer(x - self.mean)

    assert reasons(Normalised())["layer"].startswith("reads the model's input")


def test_frozen_layers_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4))
    model[2].requires_grad_(False)
    assert reasons(model)["2"] == "its weight is frozen, so a new one could not learn"


def test_lazy_layers_are_refused_by_name():
    with pytest.raises(ArgumentError, match=r"^model: layer '1' \(LazyLinear\) has no shape yet; "):
        lean_fx.plan(nn.Sequential(nn.Linear(4, 32), nn.LazyLinear(4)))


def test_a_subclass_with_the_name_of_its_base_is_told_apart():
    class Linear(nn.Linear):
        def forward(self, x):
            return super().forward(x) * x.norm(dim=-1, keepdim=True) * x.mean()

    found = reasons(nn.Sequential(nn.Linear(4, 32), Linear(32, 4)))["1"]
    assert found.startswith("test_pitfalls.")
    assert found.endswith("Linear is a subclass of Linear and may mean more")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": None}, "skip=None is a NoneType; give a tuple of names, patterns or types"),
        ({"channels": torch.tensor(0.5)}, "channels=tensor(0.5000) is a Tensor; give an int"),
        ({"reduce_inputs": "no"}, "reduce_inputs='no' is not True or False"),
        ({"reduction": nn.Linear}, "reduction=Linear cannot be made with (32, 4, dim=-1): "),
        ({"reduction": lambda i, o, dim: 3}, "reduction=<lambda> makes a int, not a module"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ArgumentError) as caught:
        lean_fx.leanify(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4)), **options)
    assert str(caught.value).startswith(message)


def test_a_reduction_that_does_not_reduce():
    class Nothing(nn.Module):
        def __init__(self, in_channels, out_channels, dim):
            super().__init__()

        def forward(self, x):
            return x

    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4))
    with pytest.raises(PlanError, match="^plan: Nothing makes .1024, 32. of .1024, 32., not "):
        lean_fx.leanify(model, reduction=Nothing)


def test_a_plan_for_a_layer_that_has_groups_now():
    def net(groups):
        return nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 1, groups=groups))

    with pytest.raises(PlanError, match="'2' reads 32 channels in 4 groups, but the plan says 32"):
        lean_fx.plan(net(1)).apply(net(4))
    with pytest.raises(PlanError, match="reads 32 channels, but the plan says 32 in 2 groups; "):
        lean_fx.plan(net(2)).apply(net(1))


def test_min_channels_speaks_of_one_group():
    def net(groups):
        return nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 1, groups=groups))

    assert sites(net(4)) == [("_1", 1, 16, ("2",))]
    assert reasons(net(8))["2"] == "in_channels=8 of each of 8 groups is below min_channels=16"
    assert reasons(net(64))["2"] == "groups=64: one input channel a group, nothing to reduce"
    assert " 16 -> 4 in 4 groups  1,024 -> 256" in str(lean_fx.plan(net(4)))


def test_groups_without_a_batch():
    model = nn.Sequential(nn.Conv1d(3, 64, 1), nn.ReLU(), nn.Conv1d(64, 8, 1, groups=4))
    inputs = torch.rand(3, 7)
    assert sites(model, inputs) == [("_1", 0, 16, ("2",))]
    lean = lean_fx.leanify(model, inputs)
    assert lean(inputs).shape == model(inputs).shape


def test_writes_are_tracked_through_views():
    def writes(self, x):
        y = F.relu(x)
        y.view(-1).flatten()[0].neg_()
        return y + 0

    graph_module = symbolic_trace(Net(writes))
    TrackWrites()(graph_module)
    known = {node.name: facts(node) for node in graph_module.graph.nodes}
    assert known["neg_"].writes
    assert known["neg_"].storage == known["view"].storage == "relu"
    assert known["add"].storage == "add"
    assert operator.add in {node.target for node in graph_module.graph.nodes}


def test_copies_have_state_of_their_own():
    lean = lean_fx.leanify(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4)))
    twin = copy.deepcopy(lean)
    with torch.no_grad():
        twin.reductions._1.seed.zero_()
    assert lean.reductions._1.seed.any()


class Optional(nn.Module):
    """A forward with an optional input."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 32)
        self.b = nn.Linear(32, 4)

    def forward(self, x, mask=None):
        x = F.relu(self.a(x))
        if mask is not None:
            x = x * mask
        return self.b(x)


def test_an_optional_input_that_is_not_given_is_none():
    x, mask = torch.rand(2, 4), torch.rand(2, 32)
    for inputs in (None, x, (x, None)):
        lean = lean_fx.leanify(Optional(), inputs)
        assert list(inspect.signature(lean.forward).parameters) == ["x", "mask"]
        torch.testing.assert_close(lean(x, mask=None), lean(x))
        for call in (lambda: lean(x, mask), lambda: lean(x=x, mask=mask)):  # noqa: B023
            with pytest.raises(BranchError) as caught:
                call()
            assert str(caught.value) == (
                "mask is a Tensor, but the model was captured where it is None; capture it with "
                "example inputs that give it"
            )


def test_the_check_of_an_absent_input_by_torch_fx_is_kept():
    class Needed(Optional):
        def forward(self, x, mask):
            return super().forward(x, mask)

    lean = lean_fx.leanify(symbolic_trace(Needed(), concrete_args={"mask": None}))
    x = torch.rand(2, 4)
    assert lean(x, None).shape == (2, 4)
    with pytest.raises(AssertionError, match="mask has been specialized to have value None"):
        lean(x, x)


def test_an_absent_input_of_any_annotation():
    class Own:
        """Found in no module."""

    for kind in (Own, Literal["sum", None]):

        def forward(self, x, mode: kind = None):
            return self.b(F.relu(self.a(x))) if mode is None else x

        model = type("Net", (Optional,), {"forward": forward})()
        lean = lean_fx.leanify(model)
        twin, x = pickle.loads(pickle.dumps(lean)), torch.rand(2, 4)
        torch.testing.assert_close(twin(x, mode=None), lean(x))


def test_an_optional_input_that_is_given_is_needed():
    x, mask = torch.rand(2, 4), torch.rand(2, 32)
    plan = lean_fx.plan(Optional(), (x, mask))
    lean = plan.apply(Optional(), (x, mask))
    assert [site.value for site in plan.sites] == ["mul"]
    assert not torch.equal(lean(x, mask), lean(x, 1 - mask))
    with pytest.raises(PlanError, match="make the plan anew"):
        plan.apply(Optional())


class Annotated(nn.Module):
    """A forward whose annotation is text, as with ``from __future__ import annotations``."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 32), nn.Linear(32, 4)

    def forward(self, x: "Tensor") -> "Tensor":
        return self.b(F.relu(self.a(x)))


def test_a_reduced_model_can_be_pickled():
    lean = lean_fx.leanify(Annotated())
    twin = pickle.loads(pickle.dumps(lean))
    inputs = torch.rand(2, 4)
    torch.testing.assert_close(twin(inputs), lean(inputs), rtol=0, atol=0)


def test_a_reduced_model_can_be_traced_again_by_torch_fx():
    lean = lean_fx.leanify(Annotated())
    traced = symbolic_trace(lean)
    inputs = torch.rand(2, 4)
    torch.testing.assert_close(traced(inputs), lean(inputs), rtol=0, atol=0)


@pytest.mark.parametrize("fraction", [0.25, 0.3])
def test_the_plan_says_what_was_wanted(fraction):
    model = nn.Sequential(nn.Linear(4, 50), nn.ReLU(), nn.Linear(50, 4))
    site = lean_fx.plan(model, channels=fraction).sites[0]
    assert site.note == f"{50 * fraction:.3g} wanted, 10 is the nearest divisor"


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.rand(2, 40, 4), "LeanReduction: axis 1 of [2, 40, 4] is not in_channels=50; give"),
        (torch.ones(2, 50, dtype=torch.int64), "lean_reduction: x is torch.int64; give floating-"),
        (torch.rand(50), "LeanReduction: dim=1 is not an axis of [50]; give values of more axes"),
    ],
)
def test_values_that_a_reduction_cannot_take(x, message):
    with pytest.raises(ArgumentError) as caught:
        lean_fx.LeanReduction(50, 10)(x)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.mT.sub_(5.0),
        lambda y: torch.select(y, 0, 0).sub_(5.0),
        lambda y: torch.detach(y).sub_(5.0),
        lambda y: y.__setitem__(0, -1.0),
    ],
)
def test_writes_through_every_view_undo_a_proof(change):
    def forward(self, x):
        y = F.relu(self.a(x))
        change(y)
        return self.b(y)

    model = Net(forward, a=nn.Linear(4, 32), b=nn.Linear(32, 4)).requires_grad_(True)
    try:
        plan = lean_fx.plan(model)
    except CaptureError:
        return  # torch.fx does not trace it
    assert not plan.sites[0].nonnegative


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (torch.rand(2, 5), {}, "example_inputs: Annotated cannot run on [2, 5] ("),
        ((), {}, "example_inputs: Annotated cannot run on none ("),
        (torch.rand(2, 4), {"opset": True}, "export_onnx: opset=True is not an int of 18 or more"),
        (
            torch.rand(2, 4),
            {"path": None},
            "export_onnx: path=None is not a path; give the name of ",
        ),
    ],
)
def test_what_cannot_be_exported(inputs, options, message, tmp_path, capfd):
    arguments = {"path": tmp_path / "a.onnx", "example_inputs": inputs, **options}
    with pytest.raises(ArgumentError) as caught:
        lean_fx.export_onnx(Annotated(), **arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_planning_on_inputs_that_do_not_fit_prints_nothing(capfd):
    with pytest.raises(ArgumentError):
        lean_fx.plan(Annotated(), torch.rand(2, 5))
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
def test_a_model_that_is_one_layer():
    assert lean_fx.plan(nn.Linear(32, 4)).sites == ()
