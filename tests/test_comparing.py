"""Models side by side."""

import dataclasses
import itertools
import json
import os
import platform
import sys
import warnings
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from torch import nn

import lean_fx
from lean_fx.errors import ArgumentError, ExportError, MissingDependencyError, WriteError
from lean_fx.measure.comparison import _files
from lean_fx.measure.comparison_table import Compared, Comparison, ratio_of
from lean_fx.measure.energy import Energy
from lean_fx.measure.layout import blocked_layout
from lean_fx.measure.memory import peak_bytes
from lean_fx.measure.pictures import short
from lean_fx.measure.timing import Latency


def net(width=48):
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 8, 3), nn.Flatten(), nn.Linear(128, 4)
    )


def latency(*samples):
    return Latency(samples, batch=1, threads=1)


def test_a_ratio_and_its_interval():
    base = latency(*(10.0 + noise for noise in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)))
    half = latency(*(sample / 2 for sample in base.samples_ms))
    exact = ratio_of(half, base)  # what slows a round down slows both
    assert (exact.median, exact.low, exact.high) == (0.5, 0.5, 0.5)
    shuffled = latency(*reversed(half.samples_ms))
    wide = ratio_of(shuffled, base)
    assert wide.median == 0.5
    assert wide.low < 0.45
    assert wide.high > 0.55
    assert ratio_of(shuffled, base) == wide
    with pytest.raises(ArgumentError, match="2 and 10 rounds were not measured in turn"):
        ratio_of(latency(1.0, 2.0), base)


def test_an_interval_that_rounding_puts_beside_the_median_is_drawn():
    def measured(milliseconds):
        same = latency(*(milliseconds,) * 5)
        return Compared("net", 1, 4, 1, 4, 4, 4, 4, 0, (), (same,), same, same)

    assert ratio_of(latency(0.007, 0.007), latency(1.0, 1.0)).low > 0.007
    axis = Comparison((measured(1.0), measured(0.007)), "a machine").draw().axes[0]
    assert [bar.get_height() for bar in axis.patches] == [1.0, 0.007]


def test_json_has_every_figure_of_the_table():
    def measured(name, *samples):
        took = latency(*samples)
        return Compared(name, 1, 4, 1, 4, 4, 4, 4, 0, (), (took, took), took, took)

    result = Comparison((measured("base", 1.0, 2.0, 4.0), measured("net", 3.0, 3.5, 5.0)), "box")
    for model, told in zip(result.models, json.loads(result.to_json())["models"], strict=True):
        ratio = ratio_of(model.step, result.models[0].step)
        for each in (*told["latencies"], told["eager"], told["step"]):
            assert each == {
                "median_ms": model.step.median_ms,
                "q1_ms": model.step.q1_ms,
                "q3_ms": model.step.q3_ms,
                "ratio": {"median": ratio.median, "low": ratio.low, "high": ratio.high},
                "samples_ms": list(model.step.samples_ms),
                "batch": 1,
                "threads": 1,
                "kernel": False,
            }


def test_peak_memory_is_what_lives_at_once():
    def chain():
        x = torch.zeros(250)  # 1 kB
        for _ in range(10):
            x = x + 1
        return x

    assert peak_bytes(chain) == 2000
    layers = nn.Sequential(*(nn.Linear(100, 100) for _ in range(10)))
    weights, x = 10 * 4 * 10_100, torch.zeros(10, 100)
    with torch.no_grad():
        assert peak_bytes(lambda: layers(x), layers.parameters()) == weights + 2 * 4000
    assert peak_bytes(lambda: layers(x), layers.parameters()) == weights + 10 * 4000


def test_compare(tmp_path):
    model, inputs = net(), torch.rand(2, 3, 8, 8)
    lean = lean_fx.leanify(model, inputs, channels=8).train()
    state = {name: value.clone() for name, value in lean.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = lean_fx.compare(
            {"base": model, "lean": lean}, inputs, batches=(1, 3), rounds=3, folder=tmp_path
        )
    base, reduced = result.models
    assert (base.name, reduced.name) == ("base", "lean")
    assert base.parameters == 3 * 48 * 9 + 48 + 48 * 8 * 9 + 8 + 128 * 4 + 4
    assert base.macs == 27 * 48 * 36 + 48 * 72 * 16 + 128 * 4
    assert base.weight_bytes == 4 * base.parameters
    assert reduced.macs == 27 * 48 * 36 + 8 * 72 * 16 + 128 * 4 + 4 * 48 * 36
    read, written = 192 + 1728 + 1728 + 128, 1728 + 1728 + 128 + 4
    assert base.moved_bytes == 4 * (read + written + base.parameters)
    assert base.moved_bytes == lean_fx.costs_of(model, inputs[:1]).moved_bytes
    assert [each.batch for each in base.latencies] == [1, 3]
    assert base.eager.batch == base.step.batch == 2
    assert base.onnx_bytes == (tmp_path / "base.onnx").stat().st_size
    assert base.peak_training_bytes > base.peak_inference_bytes > base.weight_bytes
    assert base.energy is base.step_energy is None
    assert not [label for label, *_ in result.rows() if "energy" in label or "CO2" in label]
    assert lean.training
    assert all(torch.equal(value, state[name]) for name, value in lean.state_dict().items())

    paths = result.save(tmp_path / "out")
    assert [path.name for path in paths] == ["comparison.md", "comparison.json", "latency.png"]
    assert json.loads(paths[1].read_text())["models"][1]["macs"] == reduced.macs
    assert "| ratio [95 %] | 1.00 [1.00-1.00] |" in paths[0].read_text()
    assert paths[2].read_bytes()[:4] == b"\x89PNG"
    assert [column.header.plain for column in result.table().columns] == ["", "base", "lean"]


def test_compare_in_inference_mode():
    with torch.inference_mode():
        inputs = torch.rand(2, 3, 8, 8)
        (base,) = lean_fx.compare({"base": net()}, inputs, batches=(1,), rounds=2).models
    assert base.peak_training_bytes > base.peak_inference_bytes


class Loops(nn.Module):
    """Captured as a graph it would have as many steps for ever."""

    def __init__(self):
        super().__init__()
        self.cell = nn.RNNCell(4, 4)

    def forward(self, x):
        state = None
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return state


def test_bytes_moved_of_what_cannot_be_captured_are_not_known():
    models = {"plain": nn.Sequential(nn.Flatten(), nn.Linear(8, 4)), "loops": Loops()}
    result = lean_fx.compare(models, torch.rand(2, 2, 4), rounds=2)
    assert [model.moved_bytes for model in result.models] == [4 * (8 + 36 + 4), None]
    assert [model.macs for model in result.models] == [32, 64]
    assert ("bytes moved, MB", "0.000192", "-") in result.rows()


def test_energy_of_a_call_and_of_a_training_step(monkeypatch):
    steps, turns = [], []

    class SGD(torch.optim.SGD):
        def step(self):
            steps.append(torch.get_num_threads())
            super().step()

    class Meter:
        """A turn costs a joule, a training step 3 J besides."""

        def __init__(self, country):
            assert country == "DEU"

        def __enter__(self):
            self.before = len(steps)
            return self

        def __exit__(self, *error):
            pass

        def lap(self):
            turns.append(steps[self.before :])
            self.before = len(steps)
            return Energy(1.0 + 3 * len(turns[-1]), co2_g=2.0, seconds=1, meter="cpu_load")

    monkeypatch.setattr("torch.optim.SGD", SGD)
    monkeypatch.setattr("lean_fx.measure.energy.EnergyMeter", Meter)
    clock = SimpleNamespace(perf_counter=itertools.count(0.0, 1 / 64).__next__)
    monkeypatch.setattr("lean_fx.measure.energy.time", clock)
    threads = torch.get_num_threads() + 1
    result = lean_fx.compare(
        {"base": net(), "lean": net(8)},
        torch.rand(2, 3, 8, 8),
        rounds=2,
        threads=threads,
        energy_s=0.05,
        country="DEU",
    )
    assert [bool(turn) for turn in turns] == [False] * 10 + [True] * 10  # calls, then steps
    for model, mine in zip(result.models, (turns[10::2], turns[11::2]), strict=True):
        count = sum(len(turn) for turn in mine)
        assert {each for turn in mine for each in turn} == {threads}
        assert 0 < model.energy.energy_j <= 1
        assert model.step_energy.energy_j == pytest.approx(3 + 5 / count)
        assert model.step_energy.co2_g == pytest.approx(5 * 2 / count)
    assert torch.get_num_threads() == threads - 1

    rows = {label: cells for label, *cells in result.rows()}
    assert rows["energy of a training step, mJ (cpu_load)"] == [
        short(1e3 * model.step_energy.energy_j) for model in result.models
    ]
    assert rows["CO2 of a call, ug (cpu_load)"] == [
        short(1e6 * model.energy.co2_g) for model in result.models
    ]
    base = result.models[0].energy
    note = (
        "Energy and CO2 (meter cpu_load): an estimate, which follows time: at equal load its "
        "ratios are the ratios of time; a call at batch 1, a training step at batch 2; "
        f"{3.6e6 * base.co2_g / base.energy_j:.0f} g of CO2 a kWh."
    )
    assert note in result.footnotes()
    memory = "Peak memory: tensors alive at once in PyTorch at batch 2, weights included."
    assert memory in result.footnotes()
    stored = json.loads(result.to_json())["models"][1]["step_energy"]
    assert stored == dataclasses.asdict(result.models[1].step_energy)


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (nn.Conv2d(48, 8, 3), (2, 48, 8, 8), None),
        (nn.Conv2d(7, 8, 3), (2, 7, 8, 8), None),
        (nn.Conv2d(50, 8, 3), (2, 50, 8, 8), "50 input channels are not below"),
        (nn.Conv2d(36, 8, 3, groups=2), (2, 36, 8, 8), "its 2 groups do not fill blocks of"),
        (nn.Conv1d(16, 8, 3), (2, 16, 8), "it takes only two-dimensional convolutions"),
    ],
)
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="needs that layout")
def test_layers_off_the_fast_path(layer, shape, reason, tmp_path):
    path = tmp_path / "net.onnx"
    model = nn.Sequential(nn.ReLU(), layer)
    lean_fx.export_onnx(model, path, torch.rand(shape))
    _, found = blocked_layout(path)
    assert len(found) == (reason is not None)
    if reason:
        assert found[0].startswith(f"1 is off ONNX Runtime's fast path: {reason}")
        with pytest.warns(lean_fx.LeanWarning, match="^net: 1 is off ONNX Runtime's fast path: "):
            lean_fx.compare({"net": model}, torch.rand(shape), rounds=2)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="needs that layout")
def test_reorders_are_counted(tmp_path):
    path = tmp_path / "net.onnx"
    lean_fx.export_onnx(net(), path, torch.rand(2, 3, 8, 8))
    assert blocked_layout(path) == (1, ())  # before the flatten
    lean_fx.export_onnx(nn.Linear(4, 4), path, torch.rand(2, 4))
    assert blocked_layout(path) == (0, ())


def test_files_are_never_shared(tmp_path):
    names = ["a/b", "a-b", "A-B", "..", "../x y", "a" * 300, "a" * 301]
    files = [path.relative_to(tmp_path) for path in _files(tmp_path, names)]
    assert len({str(path).casefold() for path in files}) == len(names)
    assert all(len(path.parts) == 1 for path in files)
    first, second = nn.Linear(16, 4), nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4))
    inputs = torch.rand(2, 16)
    pair = lean_fx.compare({"a/b": first, "a-b": second}, inputs, rounds=2)
    assert pair.models[0].onnx_bytes < pair.models[1].onnx_bytes


def test_every_file_is_fed_by_the_names_of_its_own_inputs():
    class Named(nn.Linear):
        def __init__(self):
            super().__init__(4, 2)
            self.input = nn.Parameter(torch.zeros(2))  # so the file's input is called input_

        def forward(self, x):
            return super().forward(x) + self.input

    models = {"plain": nn.Linear(4, 2), "named": Named()}
    result = lean_fx.compare(models, torch.rand(2, 4), rounds=2, energy_s=0.01)
    assert [len(model.latencies) for model in result.models] == [2, 2]


def test_any_mapping_of_models_takes_named_inputs():
    models = MappingProxyType({"plain": nn.Linear(4, 2)})
    (one,) = lean_fx.compare(models, {"input": torch.rand(2, 4)}, rounds=2).models
    assert one.name == "plain"


def test_shared_weights_and_other_buffers_count_once(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("table", torch.zeros(1000), persistent=False)
    (one,) = lean_fx.compare({"tied": model}, torch.rand(2, 16), rounds=2).models
    assert one.weight_bytes == 4 * (256 + 1000)
    assert one.peak_inference_bytes > one.weight_bytes


def test_nothing_of_the_callers_is_changed():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(4, 4))
    inputs = torch.randn(2, 4)
    before, state = inputs.clone(), torch.random.get_rng_state()
    lean_fx.compare({"net": model}, inputs, rounds=2)
    assert torch.equal(inputs, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"models": {}}, "models is not a mapping, or is empty; give names and models"),
        ({"models": [net()]}, "models is not a mapping, or is empty; give names and models"),
        ({"models": {"a\nb": net()}}, "the name 'a.*nb' is not printable text; give another"),
        ({"models": {"a": 3}}, "'a' is a int; give a module"),
        ({"example_inputs": torch.rand(0, 3, 8, 8)}, "example_inputs have no rows; give one or m"),
        ({"batches": (0,)}, "batches=.0,. is not a list of ints of 1 or more"),
        ({"batches": 3}, "batches=3 is not a list of ints of 1 or more"),
        ({"energy_s": "3"}, "energy_s='3' is not a finite number of 0 or more; leave it out"),
        (
            {"models": {"n": nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.BatchNorm1d(3))}}
            | {"example_inputs": torch.rand(1, 3, 8, 8)},
            "'n' cannot do a training step .*Expected more than 1 value.*; give a model whose out",
        ),
        (
            {"threads": 4 * os.cpu_count() + 1},
            r"threads=\d+ is above \d+, four a core; give fewer",
        ),
        ({"rounds": 1}, "rounds=1 is not an int of 2 or more"),
        ({"energy_s": -1.0}, "energy_s=-1.0 is not a finite number of 0 or more; leave it out"),
        ({"example_inputs": torch.rand(2, 4)}, "'base' fails on the example inputs .*; give inpu"),
        (
            {"models": {"a": nn.Flatten(), "b": nn.Identity()}},
            r"'b' returns \[2, 3, 8, 8\] and 'a' returns \[2, 192\]; compare models whose outputs have the",
        ),
    ],
)
def test_errors(changed, message):
    arguments = {"models": {"base": net()}, "example_inputs": torch.rand(2, 3, 8, 8), **changed}
    with pytest.raises(ArgumentError, match=f"^compare: {message}"):
        lean_fx.compare(arguments.pop("models"), arguments.pop("example_inputs"), **arguments)


def test_what_cannot_be_metered_is_told_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr("lean_fx.measure.comparison.export_onnx", None)
    with pytest.raises(ArgumentError, match="^compare: country='XX' is not known to CodeCarbon; "):
        lean_fx.compare(
            {"a": nn.Linear(4, 2)}, torch.rand(2, 4), energy_s=1.0, country="XX", folder=tmp_path
        )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_compares_without_gradients(mode):
    with mode():
        result = lean_fx.compare({"a": nn.Linear(4, 2)}, torch.rand(2, 4), rounds=2)
    assert result.models[0].step.samples_ms
    assert result.models[0].peak_training_bytes > result.models[0].peak_inference_bytes


def test_hidden_states_are_refused_in_words_of_its_own():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.GRU(3, 4, batch_first=True)

        def forward(self, x, state):
            return self.layer(x, state)[0]

    with pytest.raises(
        ArgumentError,
        match="^compare: example_inputs: batches of 2, 1 differ; give one batch, the first axis of all",
    ):
        lean_fx.compare({"a": Stateful()}, (torch.rand(2, 5, 3), torch.rand(1, 2, 4)), rounds=2)


class Wayward(nn.Linear):
    """Runs and trains, but cannot be exported."""

    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else y + 1


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def earlier(tmp_path):
    """A folder with the results of a comparison, and the comparison."""
    models = {"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)}
    result = lean_fx.compare(models, torch.rand(2, 4), rounds=2, folder=tmp_path)
    result.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 5
    return tmp_path, result


def test_earlier_results_stay_when_a_later_comparison_fails(earlier, monkeypatch):
    folder, _ = earlier
    before = contents(folder)
    inputs, fine = torch.rand(2, 4), nn.Linear(4, 2)
    with pytest.raises(ExportError, match="cannot be exported"):
        lean_fx.compare({"a": fine, "b": Wayward(4, 2)}, inputs, rounds=2, folder=folder)
    with pytest.raises(ArgumentError, match="compare models whose outputs have the same form"):
        lean_fx.compare({"a": fine, "b": nn.Linear(4, 3)}, inputs, rounds=2, folder=folder)
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(MissingDependencyError, match="codecarbon is not installed"):
        lean_fx.compare({"a": fine}, inputs, rounds=2, energy_s=1.0, folder=folder)
    assert contents(folder) == before


def test_earlier_reports_stay_when_the_picture_cannot_be_drawn(earlier, monkeypatch):
    folder, result = earlier
    before = contents(folder)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    other = dataclasses.replace(result, machine="another")
    with pytest.raises(MissingDependencyError, match="matplotlib is not installed"):
        other.save(folder)
    assert contents(folder) == before


def test_what_is_missing_is_told_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(MissingDependencyError, match="codecarbon is not installed and metering"):
        lean_fx.compare({"base": net()}, torch.rand(2, 3, 8, 8), energy_s=1.0)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match="onnxruntime is not installed"):
        lean_fx.compare({"base": net()}, torch.rand(2, 3, 8, 8))


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="cannot be made .* give a folder that you may write to"):
        lean_fx.compare({"a": net()}, torch.rand(2, 3, 8, 8), rounds=2, folder=tmp_path / "file")


@pytest.mark.parametrize("folder", [5, b"a", "a\0b"])
def test_what_is_no_folder(folder):
    with pytest.raises(ArgumentError, match="^folder=.* is not a path; give the name of a folder$"):
        lean_fx.compare({"a": nn.Linear(4, 2)}, torch.rand(2, 4), rounds=2, folder=folder)


def test_a_read_only_folder_is_told_before_the_work(monkeypatch):
    folder = Path("/sys/kernel")  # for root too
    if not folder.is_dir():
        pytest.skip("needs a folder that nobody may write to")
    monkeypatch.setattr("lean_fx.measure.comparison.export_onnx", None)
    with pytest.raises(WriteError, match="kernel: cannot be written .*; give a folder that you m"):
        lean_fx.compare({"a": net()}, torch.rand(2, 3, 8, 8), rounds=2, folder=folder)
