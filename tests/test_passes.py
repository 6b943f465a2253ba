"""The four laws of a pass, for every pass; what passes write, and what they refuse."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

import lean_fx
from graphs import CHANGED, UNCHANGED, Residual, Tokens, graph_text
from lean_fx.capture.capturing import capture
from lean_fx.errors import ArgumentError, PassError, PlanError
from lean_fx.passes import (
    FindConsumers,
    InferSign,
    InsertReductions,
    MeasureScale,
    ModularizeCalls,
    ModularizeWeights,
    Pass,
    Pipeline,
    PropagateShapes,
    SplitLayers,
    SwapLayers,
    TrackChannels,
    TrackWrites,
    facts,
)

MODELS = CHANGED | UNCHANGED
REDUCING = ("SwapLayers", "InsertReductions")  # what else rewrites keeps all numbers


@functools.cache
def analysed(name):
    """A model, its inputs, its plan and its graph, which the tests copy."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    original, inputs = make(), torch.rand(shape)
    graph_module = capture(original)
    Pipeline([PropagateShapes((inputs,)), TrackChannels(), TrackWrites(), FindConsumers()])(
        graph_module
    )
    return original, inputs, lean_fx.plan(original, inputs), graph_module


def passes_for(plan, inputs):
    return {
        "SplitLayers": SplitLayers(plan.split_layers),
        "TrackWrites": TrackWrites(),
        "InferSign": InferSign(),
        "MeasureScale": MeasureScale((inputs,)),
        "PropagateShapes": PropagateShapes((inputs,)),
        "TrackChannels": TrackChannels(),
        "FindConsumers": FindConsumers(),
        "ModularizeCalls": ModularizeCalls(),
        "ModularizeWeights": ModularizeWeights(plan.weights),
        "SwapLayers": SwapLayers(plan.sites),
        "InsertReductions": InsertReductions(plan.sites),
    }


def description(graph_module):
    """All of a module that a pass may change but numbers: its graph, its modules, their modes."""
    modes = [module.training for module in graph_module.modules()]
    return graph_text(graph_module) + str(graph_module) + str(modes)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", passes_for(lean_fx.plan(nn.Linear(1, 1)), torch.rand(1, 1)))
def test_laws(name, model):
    original, inputs, plan, graph_module = copy.deepcopy(analysed(model))
    passes = passes_for(plan, inputs)
    the_pass = passes[name]
    if name == "InsertReductions":
        for earlier in ("ModularizeWeights", "SplitLayers"):
            passes[earlier](graph_module)

    before, numbers = description(graph_module), copy.deepcopy(graph_module.state_dict())
    result = the_pass(graph_module)
    after = description(result.graph_module)
    assert result.graph_module is graph_module
    assert result.modified == (before != after)  # laws 1 and 2
    if not result.modified:
        torch.testing.assert_close(dict(graph_module.state_dict()), dict(numbers), rtol=0, atol=0)
    if not result.modified or name not in REDUCING:  # law 4
        evaluated = copy.deepcopy(graph_module).eval()
        torch.testing.assert_close(evaluated(inputs), original.eval()(inputs))
    graph_module(inputs)
    again = the_pass(graph_module)  # law 3
    assert not again.modified
    assert description(graph_module) == after


def test_the_laws_are_not_vacuous():
    for model, changed in [(m, True) for m in CHANGED] + [(m, False) for m in UNCHANGED]:
        make, shape = MODELS[model]
        assert bool(lean_fx.plan(make(), torch.rand(shape)).sites) == changed, model


@pytest.mark.parametrize("model", CHANGED)
def test_numbers(model):
    """Law 4 of InsertReductions: each layer reads the reduction of what it read before."""
    make, shape = CHANGED[model]
    original, inputs = make().eval(), torch.rand(shape)
    plan = lean_fx.plan(original, inputs)
    lean = plan.apply(original).eval()
    seen = {}
    sites = [site for site in plan.sites if site.value]
    for site in sites:
        module = lean.get_submodule(f"reductions.{site.name}")
        module.register_forward_hook(lambda m, a, out, s=site: seen.update({s.name: (a[0], out)}))
        for layer in site.layers:
            lean.get_submodule(layer).register_forward_pre_hook(
                lambda m, a, name=layer: seen.update({name: a[0]})
            )
    lean(inputs)
    for site in sites:
        given, reduced = seen[site.name]
        dim = site.reduced_dim
        assert given.shape[dim] == site.in_channels
        assert reduced.shape[dim] == site.out_channels
        seed = lean.get_submodule(f"reductions.{site.name}").seed
        expected = lean_fx.lean_reduction(given, seed, dim)
        torch.testing.assert_close(reduced, expected)
        for consumer in site.consumers:
            read = reduced.flatten(1) if consumer.path else reduced
            read = reduced.flatten(dim - 1, dim) if site.groups > 1 else read
            torch.testing.assert_close(seen[consumer.layer], read, rtol=0, atol=0)


def test_shapes_are_written_and_buffers_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    captured = capture(model)
    before = {name: value.clone() for name, value in captured.state_dict().items()}
    PropagateShapes((torch.rand(2, 3, 9, 9),))(captured)
    shapes = {node.name: facts(node).shape for node in captured.graph.nodes}
    assert shapes["_0"] == shapes["_1"] == (2, 4, 7, 7)
    for name, value in captured.state_dict().items():
        assert torch.equal(value, before[name])


def test_channels_along_an_axis_that_is_pooled_are_not_tracked():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 32, 1), nn.MaxPool2d(2)
            self.read = nn.Linear(8 * 16 * 4, 5)

        def forward(self, x):
            return self.read(self.pool(self.conv(x).permute(0, 2, 1, 3)).flatten(1))

    x = torch.rand(2, 3, 8, 8)
    for inputs in (None, x):
        (left,) = lean_fx.plan(Turned(), inputs).left_alone[1:]
        assert left.reason.text == "the channels of what is flattened before it are unknown"


def test_channels_are_tracked_without_shapes():
    captured = capture(Tokens())
    TrackChannels()(captured)
    found = {node.name: facts(node).channels for node in captured.graph.nodes}
    assert (found["patch"].axis, found["patch"].count) == (1, 32)
    assert (found["down"].axis, found["down"].count) == (-1, 32)
    assert (found["flatten"].axis, found["flatten"].count) == (1, 32)
    assert found["transpose"] is None


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            (torch.rand(2, 4, 8, 8),),
            "example_inputs: the model cannot run on them: stem([2, 4, 8, 8]) failed on what comes "
            "from 'x' (",
        ),
        (
            (torch.rand(2, 3, 8, 8), torch.rand(1)),
            "example_inputs: 2 given, but the model takes 1 (x); give one tensor, or a tuple of them",
        ),
        ((), "example_inputs: 0 given, but the model takes 1 (x)"),
    ],
)
def test_example_inputs_that_do_not_fit(inputs, message):
    with pytest.raises(ArgumentError) as caught:
        PropagateShapes(inputs)(capture(Residual()))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_failing_pass_is_named_with_those_before_it():
    class Breaks(Pass):
        def run(self, graph_module):
            raise ZeroDivisionError("no")

    pipeline = Pipeline([TrackChannels(), FindConsumers(), Breaks()])
    with pytest.raises(PassError) as caught:
        pipeline(symbolic_trace(Residual()))
    assert str(caught.value) == (
        "Breaks failed (ZeroDivisionError: no); passes before it: TrackChannels, FindConsumers"
    )


def test_sites_that_do_not_fit_leave_the_graph_whole():
    plan = lean_fx.plan(Residual())
    other = capture(nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)))
    before = description(other)
    with pytest.raises(
        PlanError, match="^plan: layer 'left' is not called by 'left' in this model; make"
    ):
        InsertReductions(plan.sites)(other)
    assert description(other) == before

    wider = Residual()
    wider.right = nn.Conv2d(64, 32, 1)
    with pytest.raises(PlanError) as caught:
        plan.apply(wider)
    assert str(caught.value) == (
        "plan: layer 'right' reads 64 channels, but the plan says 32; make the plan anew from this "
        "model"
    )
    wider.left = nn.ConvTranspose2d(32, 32, 3)
    with pytest.raises(PlanError, match="'left' is a ConvTranspose2d, but the plan says Conv2d"):
        plan.apply(wider)
