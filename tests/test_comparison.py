import functools
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lean_fx.errors import ArgumentError, DataError
from lean_fx.experiment.comparison import run
from lean_fx.measure.costs import count_parameters
from lean_fx.measure.report import Report
from support import script
from support.arms import as_fast_arm, paper_arms, three_arms
from support.models import PaperNet
from test_ablation import small_digits

ROOT = Path(__file__).parents[1]


def test_arms_start_from_the_same_first_layer_and_share_a_budget():
    baseline, lean, narrow = paper_arms(small_digits(), channels=10, seed=3).values()
    assert torch.equal(baseline.conv1.weight, lean.conv1.weight)
    assert isinstance(narrow, PaperNet)
    counts = [count_parameters(model) for model in (baseline, lean, narrow)]
    assert counts[:2] == [182_260, 23_390]
    assert abs(counts[2] - counts[1]) < 0.02 * counts[1]


def test_the_net_that_is_as_fast_is_found_once(tmp_path, monkeypatch):
    def timed(files, *arrays):
        return {
            name: SimpleNamespace(median_ms=file.stat().st_size) for name, file in files.items()
        }

    def exported(model, file, inputs):
        file.write_bytes(bytes(count_parameters(model)))

    monkeypatch.setattr("lean_fx.experiment.budget.time_onnx", timed)
    monkeypatch.setattr("lean_fx.experiment.budget.export_onnx", exported)
    data = small_digits()
    lean = paper_arms(data)["lean"]
    found = as_fast_arm(data, lean, tmp_path, seed=1)
    assert found.widths == (16, 32, 48)
    smaller = paper_arms(data, channels=2)["lean"]
    assert as_fast_arm(data, smaller, tmp_path).widths < found.widths
    monkeypatch.delattr("support.arms.equal_budget")
    again = [as_fast_arm(data, smaller, tmp_path, seed=1) for _ in range(2)]
    assert torch.equal(again[0].linear.weight, again[1].linear.weight)


@pytest.mark.parametrize("epochs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_comparison_end_to_end(epochs, tmp_path, capfd, monkeypatch):
    from lean_fx.experiment import training
    from lean_fx.experiment.training import Settings

    once = functools.partial(training.measure_test_energy, min_seconds=0)
    monkeypatch.setattr(training, "measure_test_energy", once)
    data = small_digits()

    def again():
        arms = {seed: paper_arms(data, seed=seed) for seed in (0, 4)}
        given = {"title": "digits", "command": "python x.py", "rates": (1e-2, 1e-6)}
        return run(arms, data, Settings(epochs=epochs), tmp_path, **given)

    report = again()
    assert [arm.name for arm in report.arms] == ["baseline", "lean", "narrow 18/35/53"]
    assert report.seeds == (0, 4)
    assert all(len(set(arm.runs)) == 2 for arm in report.arms)
    assert Report.from_json((tmp_path / "report.json").read_text()) == report
    assert "conv2" in report.arms[1].plan
    (note,) = report.notes
    tried = "Learning rates, chosen of 1e-06, 0.01 on a fifth of the train split in 1 epochs: "
    assert re.fullmatch(
        rf"{tried}baseline (1e-06|0.01), lean (1e-06|0.01), narrow 18/35/53 (1e-06|0.01)\.", note
    )
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".onnx", ".json", ".md", ".png"}
    capfd.readouterr()
    script.show(report, tmp_path)
    shown = capfd.readouterr().out
    assert "182,260" in shown
    assert "…" not in shown

    # A second run trains nothing anew.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("last.ckpt")}
    assert len(before) == 6 + 3 * 2
    report_again = again()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("last.ckpt")} == before
    assert [arm.runs for arm in report_again.arms] == [arm.runs for arm in report.arms]


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({}, "run: arms is empty, or its seeds have models of different names"),
        ({0: {"a": nn.Identity()}, 1: {"b": nn.Identity()}}, "run: arms is empty, or its seeds h"),
        ({0: {"a": nn.Identity()}, 2**32: {"a": nn.Identity()}}, "Settings: seed=4294967296 is"),
    ],
)
def test_arms_that_make_no_report_are_refused_before_anything_is_trained(tmp_path, arms, message):
    from lean_fx.experiment.training import Settings

    with pytest.raises(ArgumentError, match=f"^{message}"):
        run(arms, small_digits(), Settings(), tmp_path, title="none", command="python x.py")
    assert list(tmp_path.iterdir()) == []


def test_the_arms_of_any_net_share_a_budget():
    def make(widths):
        layers = nn.Linear(20, widths[0]), nn.ReLU(), nn.Linear(*widths), nn.ReLU()
        return nn.Sequential(*layers, nn.Linear(widths[1], 3))

    arms = three_arms(make, (48, 60), torch.randn(4, 20), channels=6, min_channels=21, seed=2)
    assert list(arms) == ["baseline", "lean", "narrow 25/32"]
    assert [count_parameters(model) for model in arms.values()] == [
        (20 * 48 + 48) + (48 * 60 + 60) + (60 * 3 + 3),
        (20 * 48 + 48) + (6 * 60 + 60) + (6 * 3 + 3) + 2 * 6,
        (20 * 25 + 25) + (25 * 32 + 32) + (32 * 3 + 3),
    ]
    assert arms["lean"].meta["lean_fx.plan"].left_alone[0].layer == "0"
    again = three_arms(make, (48, 60), torch.randn(4, 20), channels=6, min_channels=21, seed=2)
    assert all(
        torch.equal(again[name].state_dict()["0.weight"], model.state_dict()["0.weight"])
        for name, model in arms.items()
    )


def test_scripts_end_with_one_line(capsys):
    def fails():
        raise DataError("x.bin: is damaged")

    with pytest.raises(SystemExit) as caught:
        script.run_script(fails)
    assert str(caught.value) == "error: x.bin: is damaged"

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="stopped; run the same again to go on"):
        script.run_script(interrupted)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("examples/stl10.py --data nowhere", "error: nowhere: has not all of train_X.bin"),
        (
            "examples/spoken_digits.py --data nowhere",
            "error: nowhere: lacks 3000 of 3000 recordings, the first 0_george_0.wav; run again "
            "with --download",
        ),
        ("examples/digits.py --channels 0", "error: channels=0 is not an int of 1 or more"),
        ("examples/digits.py --epochs 0", "error: Settings: epochs=0 is not an int of 1"),
        ("examples/metering.py --rounds 1", "error: metering: rounds=1 is not an int of 2 or"),
        ("examples/bench_onnx.py --out /dev/null", "error: /dev/null: cannot be made (File exists"),
        (
            "examples/ablate.py --arms slize",
            "error: Space: arm='slize' is not known; use baseline, narrow, ",
        ),
    ],
)
def test_examples_say_what_to_do_in_one_line(command, message, tmp_path, monkeypatch):
    path, *args = command.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [path, *args])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_a_script_says_is_all_that_it_prints(tmp_path):
    run = subprocess.run(
        [sys.executable, ROOT / "examples/stl10.py", "--data", "nowhere"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr.startswith("error: nowhere: has not all of train_X.bin")
    assert run.stderr.count("\n") == 1
