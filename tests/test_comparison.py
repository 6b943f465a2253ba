import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lean_fx.errors import DataError
from lean_fx.experiment import script
from lean_fx.experiment.comparison import paper_arms, run
from lean_fx.experiment.models import PaperNet
from lean_fx.measure.cost import count_parameters
from lean_fx.measure.report import Report
from test_ablation import small_digits

ROOT = Path(__file__).parents[1]


def test_arms_start_from_the_same_first_layer_and_share_a_budget():
    baseline, lean, narrow = paper_arms(small_digits(), channels=10, seed=3).values()
    assert torch.equal(baseline.conv1.weight, lean.conv1.weight)
    assert isinstance(narrow, PaperNet)
    counts = [count_parameters(model) for model in (baseline, lean, narrow)]
    assert counts[:2] == [182_260, 23_390]
    assert abs(counts[2] - counts[1]) < 0.02 * counts[1]


def test_a_comparison_end_to_end(tmp_path, capfd):
    from lean_fx.experiment.training import Settings

    data = small_digits()
    command = "python examples/digits.py"
    report = run(
        paper_arms(data), data, Settings(epochs=2), tmp_path, title="digits", command=command
    )
    assert [arm.name for arm in report.arms] == ["baseline", "lean", "narrow 18/35/53"]
    assert Report.from_json((tmp_path / "report.json").read_text()) == report
    assert "conv2" in report.arms[1].plan
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".onnx", ".json", ".md", ".png"}
    capfd.readouterr()
    script.show(report, tmp_path)
    shown = capfd.readouterr().out
    assert "182,260" in shown
    assert "…" not in shown

    # A second run trains nothing anew.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("last.ckpt")}
    again = run(
        paper_arms(data), data, Settings(epochs=2), tmp_path, title="digits", command=command
    )
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("last.ckpt")} == before
    assert [arm.epochs for arm in again.arms] == [arm.epochs for arm in report.arms]


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
        ("examples/digits.py --channels 0", "error: channels=0 is not 1 or more"),
        ("examples/digits.py --epochs 0", "error: Settings: epochs=0 is not a whole number"),
        ("examples/metering.py --rounds 1", "error: metering: rounds=1 is too little; give 2"),
        ("examples/bench_onnx.py --out /dev/null", "error: /dev/null: cannot be made (File exists"),
        (
            "examples/ablate.py --control slize",
            "error: control='slize' is not known; use lean_row, ",
        ),
    ],
)
def test_examples_say_what_to_do_in_one_line(command, message, tmp_path):
    run = subprocess.run(
        [sys.executable, ROOT / command.split()[0], *command.split()[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr.startswith(message)
    assert run.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
