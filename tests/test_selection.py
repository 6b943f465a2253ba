"""Plans without the sites that do not pay."""

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import lean_fx
from graphs import CHANGED
from lean_fx.capture.capturing import capture, clone_graph
from lean_fx.errors import ArgumentError
from lean_fx.measure.costs import count_macs
from lean_fx.passes import facts
from lean_fx.planned import _analyse
from lean_fx.planning.normalising import Rewritings
from lean_fx.planning.options import Options
from lean_fx.planning.planner import choose_sites
from lean_fx.planning.records import graph_records
from lean_fx.selection import _alone
from lean_fx.skip_reason import LeftAlone, SkipReason


class TwoSites(nn.Module):
    """One site with much work behind it, one with next to none."""

    def __init__(self):
        super().__init__()
        self.first, self.rich = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.poor = nn.Conv2d(64, 1, 1)

    def forward(self, x):
        return self.poor(self.rich(self.first(x).relu()).relu())


def test_saving_drops_what_costs_more_than_it_saves():
    inputs = torch.rand(2, 3, 16, 16)
    plan = lean_fx.plan(TwoSites(), inputs, keep="saving")
    assert [site.layers for site in plan.sites] == [("rich",)]
    # 512 positions: 64 x 64 x 9 MACs each, 7/8 of them saved, for 4 x 64.
    assert plan.sites[0].note == ("saves 16.5 M MACs and 0.244 MB, spends 0.131 M and 0.147 MB")
    (poor,) = (each for each in plan.left_alone if each.layer == "poor")
    assert poor.reason.text == "saves 0.0287 M MACs and 0.115 MB, spends 0.131 M and 0.147 MB"


@pytest.mark.parametrize("model", CHANGED)
def test_what_is_said_to_be_saved_is_saved(model):
    make, shape = CHANGED[model]
    net, inputs = make(), torch.rand(shape)
    plan = lean_fx.plan(net, inputs, keep="saving")
    saved = sum(float(site.note.partition("saves ")[2].split()[0]) for site in plan.sites)
    spent = sum(float(site.note.partition("spends ")[2].split()[0]) for site in plan.sites)
    difference = count_macs(net, inputs) - count_macs(plan.apply(net), inputs)
    assert difference / 1e6 == pytest.approx(saved - spent, rel=0.02, abs=1e-4)


@pytest.mark.parametrize("model", CHANGED)
def test_the_layers_of_a_site_alone_compute_what_they_did(model):
    make, shape = CHANGED[model]
    captured = clone_graph(capture(make().eval(), [torch.rand(shape)]))
    Rewritings.of(captured, Options()).apply(captured)
    _analyse(captured, (torch.rand(shape),))
    sites, _ = choose_sites(graph_records(captured, Options()), Options())
    nodes = {node.name: node for node in captured.graph.nodes}
    values = {}

    class Keeps(torch.fx.Interpreter):
        def run_node(self, n):
            values[n.name] = super().run_node(n)
            return values[n.name]

    Keeps(captured).run(torch.randn(shape))
    for site in sites:
        if not site.value:
            continue
        assert facts(nodes[site.value]).shape is not None
        bare, _ = _alone(site, captured)
        outputs = bare.eval()(values[site.value])
        for consumer, output in zip(site.consumers, outputs, strict=True):
            if len(nodes[consumer.node].args) > 1:
                continue  # recurrent layers start at zero there, not at states of their own
            torch.testing.assert_close(output, values[consumer.node])


def test_measured_keeps_what_is_faster(monkeypatch):
    inputs = torch.rand(1, 3, 16, 16)
    seen, signs = [], []

    def time_onnx(files, value, **options):
        for file in files.values():  # they run on the value of the site
            session = onnxruntime.InferenceSession(file)
            for node in onnx.load(file).graph.node:
                if node.op_type == "LEAN":
                    signs.append(node.overload)
            session.run(None, {session.get_inputs()[0].name: value})
        seen.append((list(files), value.shape))
        ratio = 0.5 if len(seen) == 1 else 2.0
        return {
            "without": lean_fx.measure.timing.Latency((1.0, 1.0), 1, 1),
            "with": lean_fx.measure.timing.Latency((ratio, ratio), 1, 1),
        }

    monkeypatch.setattr("lean_fx.measure.timing.time_onnx", time_onnx)
    plan = lean_fx.plan(TwoSites(), inputs, keep="measured")
    assert seen == [(["without", "with"], (1, 64, 16, 16))] * 2
    assert signs == ["8x8_nonnegative"] * 2
    assert [site.note for site in plan.sites] == ["measured 0.5 ms with it, 1 ms without"]
    assert plan.left_alone[-1] == LeftAlone(
        "poor", "Conv2d", SkipReason("keep", "measured 2 ms with it, 1 ms without")
    )


def test_measured_by_the_clock():
    model, inputs = TwoSites(), torch.rand(1, 3, 8, 8)
    chance = torch.get_rng_state()
    plan = lean_fx.plan(model, inputs, keep="measured")
    notes = [site.note for site in plan.sites] + [each.reason.text for each in plan.left_alone[1:]]
    assert len(notes) == 2
    assert all(note.startswith("measured ") for note in notes)
    assert torch.equal(torch.get_rng_state(), chance)  # a plan costs no random numbers


def test_errors():
    with pytest.raises(ArgumentError, match="keep='some' is not known; use all, saving or measur"):
        lean_fx.plan(TwoSites(), torch.rand(1, 3, 8, 8), keep="some")
    with pytest.raises(ArgumentError, match="keep='saving' needs the shapes .* give example_inp"):
        lean_fx.plan(TwoSites(), keep="saving")
