"""The runs of examples/evidence.py: what they leave, how they go on, and what is chosen."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lean_fx.measure.costs import count_parameters
from support.evidence.arms import PARTS, Arm, make_net, smoke_parts
from support.evidence.latency import time_nets
from support.evidence.nets import DenseNet, ResNet
from support.evidence.pictures import Pictures
from support.evidence.runs import Planner, chosen_rate, read_results, score
from support.evidence.steps import Trainer, train_together
from support.evidence.summary import report
from support.evidence.training import Settings
from support.evidence.workers import work

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared/data"


def tiny(*names, part="paper"):
    """A part with a few of its arms, on pictures of 16 pixels."""
    found = next(each for each in smoke_parts() if each.name == part)
    return replace(found, arms=tuple(arm for arm in found.arms if arm.name in names))


def run(parts, folder, *, seeds=(0,), together=4, data="random"):
    settings = Settings(data, folder, limit=128)
    planner = Planner(parts, folder, "abc", seeds, together=together)
    work(planner, settings, time.monotonic() + 600, time.monotonic() + 600)
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.slow
def test_every_arm_leaves_its_searches_and_its_runs(tmp_path):
    files = run([tiny("baseline", "lean", "narrow")], tmp_path, seeds=(0, 1))
    assert len(files) == 3 * (2 + 2)
    one = next(
        r for r in files.values() if (r["arm"], r["split"], r["seed"]) == ("lean", "test", 1)
    )
    for key in ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "train_seconds"):
        assert len(one[key]) == one["epochs"] == 2
    assert one["macs"] > 0
    assert one["parameters"] == 24_590
    assert one["error"] is None
    assert one["side_by_side"] == 2
    assert not list(tmp_path.glob(".*"))


def test_an_unknown_reduction_is_a_row_with_its_error(tmp_path):
    part = tiny("slice")
    part = replace(part, arms=(Arm("leen", "leen", rates=(1e-3,)), *part.arms))
    files = run([part], tmp_path)
    assert "is not known" in files["paper-leen-validation-0.001-s0-e1-abc.json"]["error"]
    assert sum(name.startswith("paper-slice-test") for name in files) == 1


def test_what_is_there_is_not_run_again(tmp_path):
    part = tiny("slice")
    before = run([part], tmp_path)
    lost = next(name for name in before if "-test-" in name)
    (tmp_path / lost).unlink()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert run([part], tmp_path).keys() == before.keys()
    assert all(path.stat().st_mtime_ns == changed for path, changed in kept.items())


@pytest.mark.slow
def test_a_killed_search_goes_on(tmp_path):
    script = [sys.executable, str(ROOT / "examples/evidence.py"), "--smoke", "--data", "random"]
    script += ["--parts", "paper", "--arms", "slice,narrow", "--out", str(tmp_path)]
    script += ["--workers", "0", "--together", "1", "--commit", "abc"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(script, env=environment, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("*.json")) and time.monotonic() < until:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert 0 < len(kept) < 6
    again = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert len(list(tmp_path.glob("*.json"))) == 6
    assert again.stdout.count("\n") == 6 - len(kept)
    assert all(path.stat().st_mtime_ns == changed for path, changed in kept.items())


def test_the_best_rate_is_chosen_on_the_last_three_epochs():
    def found(rate, *accuracy, error=None):
        return {"rate": rate, "test_accuracy": list(accuracy), "error": error}

    results = [found(0.1, 0.9, 0.1, 0.1, 0.1), found(0.01, 0, 0.2, 0.3, 0.4)]
    assert score(results[1]) == pytest.approx(0.3)
    assert chosen_rate(results) == 0.01
    assert chosen_rate([*results, found(1.0, error="no")]) == 0.01
    assert chosen_rate([found(0.3, 0.5), found(0.1, 0.5)]) == 0.1
    assert chosen_rate([found(1.0, error="no")]) is None


def test_only_the_best_small_settings_are_trained_to_the_end(tmp_path):
    part = next(each for each in smoke_parts() if each.name == "settings")
    arms = tuple(Arm(name, name, 10, rates=(1e-3,)) for name in ("slice", "mean", "max"))
    files = run([replace(part, arms=arms, best=1)], tmp_path)
    searched = {r["arm"]: score(r) for r in files.values() if r["split"] == "validation"}
    trained = {result["arm"] for result in files.values() if result["split"] == "test"}
    assert len(trained) == 1
    assert searched[trained.pop()] == max(searched.values())


@pytest.mark.parametrize(
    ("name", "arm"),
    [
        (part.name, arm.name)
        for part in PARTS
        if part.name != "paper"
        for arm in part.arms
        if arm.control in ("narrow", "bottleneck")
    ],
)
def test_controls_have_the_parameters_of_the_lean_net(name, arm):
    part = next(each for each in PARTS if each.name == name)
    example = torch.rand(2, 3, part.pixels, part.pixels)
    arms = {each.name: each for each in part.arms}
    counts = {key: count_parameters(make_net(part, arms[key], example)) for key in ("lean", arm)}
    assert counts[arm] == pytest.approx(counts["lean"], rel=0.04)


def test_whole_nets():
    assert count_parameters(ResNet()) == 696_618
    assert count_parameters(DenseNet()) == 135_082


@pytest.mark.parametrize("augment", [False, True])
def test_a_rehearsal_changes_nothing(augment):
    split = Pictures("random", 128).split("validation", 16)
    histories = []
    for rehearsed in (False, True):
        torch.manual_seed(0)
        net = ResNet((4, 8))
        trainer = Trainer(net, split, rate=1e-2, epochs=2, seed=3, augment=augment)
        if rehearsed:
            trainer.rehearse()
        train_together([trainer], 2)
        history = trainer.history
        histories.append((history.train_loss, history.test_loss, history.test_accuracy))
    assert histories[0] == histories[1]


def test_nets_side_by_side_train_as_alone():
    split = Pictures("random", 128).split("test", 16)

    def trainer(rate):
        torch.manual_seed(0)
        return Trainer(ResNet((4, 8)), split, rate=rate, epochs=2, seed=0)

    together, alone = [trainer(1e-3), trainer(1e-2)], trainer(1e-2)
    train_together(together, 2)
    train_together([alone], 2)
    assert together[1].history.test_loss == alone.history.test_loss
    assert together[0].history.test_loss != alone.history.test_loss


def test_augmented_pictures_are_flipped_and_shifted():
    split = Pictures("random", 128).split("test", 48)
    trainer = Trainer(ResNet((4,)), split, rate=1e-3, epochs=1, seed=0, augment=True)
    index = torch.arange(trainer.batch)
    trainer._moves[0, 0] = torch.tensor([2, -3, 1])
    made, same = trainer._pictures(index)[:2]
    rows = (torch.arange(48) + 2).clamp(0, 47)
    columns = 47 - (torch.arange(48) - 3).clamp(0, 47)
    assert torch.equal(made, split.train_x[0][:, rows][:, :, columns])
    assert torch.equal(same, split.train_x[1])


def test_the_validation_part_is_fixed_and_apart():
    pictures = Pictures("random", 200)
    held = pictures.split("validation", 96)
    again = pictures.split("validation", 96)
    assert (len(held.train_y), len(held.test_y)) == (160, 40)
    assert torch.equal(held.test_x, again.test_x)
    seen = {bytes(image.numpy().tobytes()) for image in held.train_x}
    assert not any(bytes(image.numpy().tobytes()) in seen for image in held.test_x)
    values = held.normalised(held.train_x)
    assert values.mean().abs() < 1e-4
    means = pictures.split("test", 32)
    assert means.normalised(means.train_x).std((0, 2, 3)).sub(1).abs().max() < 1e-3


def test_the_report_takes_what_is_there(tmp_path):
    pytest.importorskip("matplotlib")
    part = tiny("baseline", "lean", "narrow")
    (tmp_path / "runs").mkdir()
    run([part], tmp_path / "runs", seeds=(0, 1))
    for path in (tmp_path / "runs").glob("paper-narrow-test*"):
        path.unlink()
    (tmp_path / "runs/paper-broken.json").write_text("{")
    time_nets([part], tmp_path / "runs", rounds=2)
    text = report(tmp_path / "runs", tmp_path / "out")
    assert re.search(r"\| lean \| 24,590 \| [0-9.]+ \| [0-9.]+ \|", text)
    assert re.search(r"\| baseline \| [0-9,]+ \| [0-9.]+ \| 1\.00 \|", text)
    assert "medians of 2 rounds in turn on " in text
    assert "95 % of the baseline" in text
    for picture in ("curves", "fronts"):
        assert (tmp_path / f"out/paper_{picture}.png").exists()
    assert len(read_results(tmp_path / "runs")) == 3 * 2 + 2 * 2


@pytest.mark.skipif(not (SHARED / "stl10_train.npz").exists(), reason="needs ../shared/data")
def test_pictures_of_the_shared_folder(tmp_path):
    import numpy as np

    packed = np.load(SHARED / "stl10_train.npz")
    image = pytest.importorskip("PIL.Image")
    io = pytest.importorskip("io")
    parts = zip(packed["off"][:64], packed["off"][1:65], strict=True)
    x = np.stack(
        [np.asarray(image.open(io.BytesIO(packed["img"][a:b].tobytes()))) for a, b in parts]
    ).transpose(0, 3, 1, 2)
    y = packed["y"][:64].astype(np.int64) - 1
    np.savez(tmp_path / "stl10.npz", train_x=x, train_y=y, test_x=x, test_y=y)
    (tmp_path / "runs").mkdir()
    files = run([tiny("slice")], tmp_path / "runs", data=str(tmp_path))
    assert all(result["error"] is None for result in files.values())
