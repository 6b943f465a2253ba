"""Training: the same each time, going on after any stop, metered apart from testing."""

import contextlib
import fcntl
import importlib
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lean_fx.errors import ArgumentError, DataError, MissingDependencyError
from lean_fx.experiment import training
from lean_fx.experiment.batches import ShuffledBatches
from lean_fx.experiment.datasets import Dataset, digits
from lean_fx.experiment.training import Settings, evaluate, measure_test_energy, train
from lean_fx.measure.energy import Energy
from support.models import PaperNet

CPU = {"accelerator": "cpu", "batch_size": 32}
TRAIN_STEPS, TEST_STEPS = 4, 2


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Nets this small only lose by more, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def some_digits() -> Dataset:
    whole = digits()
    train_part = (whole.train_x[:100], whole.train_y[:100])
    return Dataset.of("some digits", train_part, (whole.test_x[:50], whole.test_y[:50]), 10)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return some_digits()


def net(seed: int = 0, width: int = 6) -> nn.Module:
    """A net with dropout, so that random numbers matter beside the order of the pictures."""
    torch.manual_seed(seed)
    paper = PaperNet((width,), in_channels=1, image_size=8)
    return nn.Sequential(nn.Dropout(0.2), paper)


def numbers(history):
    return [(e.train_loss, e.train_accuracy, e.test_loss, e.test_accuracy) for e in history]


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def stop_at_step(model: nn.Module, step: int, error: BaseException) -> None:
    """Raise ``error`` in the given forward call of the model, tests included."""
    calls = iter(range(1, 10**6))

    def hook(*_):
        if next(calls) == step:
            raise error

    model.register_forward_pre_hook(hook)


def test_training_learns(tmp_path, data):
    model = net()
    before = evaluate(model, data)
    history = train(model, data, Settings(epochs=6, learning_rate=0.01, **CPU), tmp_path)
    assert len(history) == 6
    assert history[-1].train_loss < history[0].train_loss
    loss, accuracy = evaluate(model, data)
    assert loss < before[0]
    assert accuracy > before[1]
    assert (history[-1].test_loss, history[-1].test_accuracy) == pytest.approx((loss, accuracy))
    assert not model.training


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_first_epoch_is_adam_on_shuffled_normalised_batches(tmp_path, data, schedule):
    settings = Settings(epochs=1, seed=3, schedule=schedule, **CPU)
    paper, twin = net()[1], net()[1]
    history = train(paper, data, settings, tmp_path)
    order = torch.cat(list(ShuffledBatches(100, 32, settings.seed)))
    assert sorted(order.tolist()) == list(range(100))
    assert order.tolist() != list(range(100))
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-3)
    losses = []
    for step, part in enumerate(order.split(32)):
        if schedule == "cosine":  # over 4 steps
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * step / 4)) / 2
        loss = F.cross_entropy(twin(data.normalised(data.train_x[part])), data.train_y[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() * len(part))
    if schedule == "constant":
        assert same_weights(paper, twin)
    torch.testing.assert_close(paper.state_dict(), twin.state_dict())
    assert history[0].train_loss == pytest.approx(sum(losses) / 100, rel=1e-6)


def test_the_same_settings_give_the_same_history(tmp_path, data):
    settings = Settings(epochs=2, **CPU)
    first, again = net(), net()
    one = train(first, data, settings, tmp_path / "one")
    torch.rand(7)  # what others draw from torch's random numbers does not matter
    two = train(again, data, settings, tmp_path / "two")
    assert numbers(one) == numbers(two)
    assert same_weights(first, again)
    other = train(net(), data, Settings(epochs=2, seed=1, **CPU), tmp_path / "other")
    assert numbers(one) != numbers(other)


EPOCH = TRAIN_STEPS + TEST_STEPS


@pytest.mark.parametrize(
    ("step", "kept"),
    [(2, 0), (EPOCH, 0), (EPOCH + 1, 1), (EPOCH + 3, 1), (2 * EPOCH, 1), (2 * EPOCH + 1, 2)],
)
def test_an_interrupted_run_ends_as_if_it_had_never_stopped(tmp_path, data, step, kept):
    settings = Settings(epochs=3, schedule="cosine", **CPU)
    whole = net()
    expected = train(whole, data, settings, tmp_path / "whole")

    broken = net()
    stop_at_step(broken, step, RuntimeError("power cut"))
    with pytest.raises(RuntimeError, match="power cut"):
        train(broken, data, settings, tmp_path / "broken")
    with contextlib.suppress(FileNotFoundError):
        saved = torch.load(tmp_path / "broken" / "last.ckpt", weights_only=True)
        assert len(saved["lean_fx"]["history"]) == kept
    assert (tmp_path / "broken" / "last.ckpt").exists() == (kept > 0)

    # With other first weights where a checkpoint brings them.
    resumed = net(seed=9 if kept else 0)
    seen = []
    resumed.register_forward_pre_hook(lambda *_: seen.append(resumed.training))
    assert numbers(train(resumed, data, settings, tmp_path / "broken")) == numbers(expected)
    assert same_weights(resumed, whole)
    assert sum(seen) == (3 - kept) * TRAIN_STEPS


def test_a_complete_run_is_only_loaded(tmp_path, data):
    settings = Settings(epochs=2, **CPU)
    trained, loaded = net(), net(seed=9)
    history = train(trained, data, settings, tmp_path)
    written = (tmp_path / "last.ckpt").stat().st_mtime_ns
    stop_at_step(loaded, 1, AssertionError("it was run"))
    assert repr(train(loaded, data, settings, tmp_path)) == repr(history)
    assert same_weights(loaded, trained)
    assert not loaded.training
    assert (tmp_path / "last.ckpt").stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_may_be_moved_between_stop_and_start(tmp_path, data):
    settings = Settings(epochs=2, **CPU)
    broken, whole = net(), net()
    stop_at_step(broken, EPOCH + 1, RuntimeError("power cut"))
    with pytest.raises(RuntimeError, match="power cut"):
        train(broken, data, settings, tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(broken, data, settings, tmp_path / "there")
    train(whole, data, settings, tmp_path / "whole")
    assert same_weights(broken, whole)
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["last.ckpt"]


def test_another_training_in_the_folder_is_refused(tmp_path, data):
    train(net(), data, Settings(epochs=1, **CPU), tmp_path, name="lean")
    last = tmp_path / "last.ckpt"
    with pytest.raises(ArgumentError) as error:
        train(net(), data, Settings(epochs=2, seed=4, **CPU), tmp_path, name="lean")
    assert str(error.value) == (
        f"{last}: was made with epochs=1, seed=0, not epochs=2, seed=4; use those again, give "
        "another folder, or delete it to train anew"
    )
    with pytest.raises(ArgumentError, match="was made with name='lean', not name='mean'; use"):
        train(net(), data, Settings(epochs=1, **CPU), tmp_path, name="mean")
    with pytest.raises(ArgumentError, match=r"data='some digits \(100 train, 50 test\)', not"):
        train(net(), digits(), Settings(epochs=1, **CPU), tmp_path, name="lean")
    with pytest.raises(ArgumentError, match=r"holds another model, as 1\.conv1\.bias differs; gi"):
        train(net(width=7), data, Settings(epochs=1, **CPU), tmp_path, name="lean")


@pytest.mark.parametrize("harm", ["short", "empty", "text", "foreign"])
def test_a_damaged_checkpoint_is_refused(tmp_path, data, harm):
    last = tmp_path / "last.ckpt"
    torch.save({"state_dict": net().state_dict()}, last)
    if harm != "foreign":
        whole = last.read_bytes()
        last.write_bytes({"short": whole[:-100], "empty": b"", "text": b"hello"}[harm])
    with pytest.raises(DataError) as error:
        train(net(), data, Settings(epochs=1, **CPU), tmp_path)
    assert str(error.value) == (
        f"{last}: is not a whole checkpoint of this training; delete it to train anew"
    )


class CountingMeter:
    """Stands in for an energy meter: its n-th lap is n joules."""

    def __init__(self, events: list[str] | None = None) -> None:
        self.events = [] if events is None else events
        self.laps = 0

    def lap(self) -> Energy:
        self.laps += 1
        self.events.append("lap")
        return Energy(float(self.laps), self.laps / 10, self.laps / 100, "counting")


def test_testing_lies_outside_the_metered_laps(tmp_path, data):
    events: list[str] = []
    model = net()
    model.register_forward_pre_hook(lambda *_: events.append("train" if model.training else "test"))
    meter = CountingMeter(events)
    history = train(model, data, Settings(epochs=2, **CPU), tmp_path, meter=meter)
    epoch = ["lap", *["train"] * TRAIN_STEPS, "lap", *["test"] * TEST_STEPS]
    assert events == epoch * 2
    assert [epoch.train for epoch in history] == [
        Energy(2.0, 0.2, 0.02, "counting"),
        Energy(4.0, 0.4, 0.04, "counting"),
    ]
    again = train(net(), data, Settings(epochs=2, **CPU), tmp_path, meter=meter)
    assert again == history


def test_without_a_meter_only_the_seconds_are_known(tmp_path, data):
    (epoch,) = train(net(), data, Settings(epochs=1, **CPU), tmp_path)
    assert math.isnan(epoch.train.energy_j)
    assert math.isnan(epoch.train.co2_g)
    assert epoch.train.seconds > 0
    assert epoch.train.meter == "none"


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64])
def test_evaluate_is_the_mean_over_all_test_pictures(data, batch_size):
    model = net().train()
    loss, accuracy = evaluate(model, data, batch_size)
    assert model.training
    logits = model.eval()(data.normalised(data.test_x))
    assert loss == pytest.approx(F.cross_entropy(logits, data.test_y).item(), rel=1e-6)
    assert accuracy == (logits.argmax(1) == data.test_y).sum().item() / 50


@pytest.mark.parametrize("min_seconds", [0, 0.1])
def test_the_energy_of_a_test_is_that_of_one_pass(data, monkeypatch, min_seconds):
    made = []

    class Meter:
        energy = Energy(60.0, 6.0, 0.6, "counting")

        def __init__(self, country):
            made.append(country)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(training, "EnergyMeter", Meter)
    model = net()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(model.training))
    energy = measure_test_energy(model, data, 25, min_seconds, country="DEU")
    passes = len(calls) // 2
    assert passes == 1 if min_seconds == 0 else passes > 1
    assert energy.energy_j == pytest.approx(60 / passes)
    assert made == ["DEU"]
    assert not any(calls)


def test_a_real_meter_reads_something(tmp_path, data):
    model = net()
    with training.EnergyMeter() as meter:
        (epoch,) = train(model, data, Settings(epochs=1, **CPU), tmp_path, meter=meter)
    for energy in (epoch.train, measure_test_energy(model, data, min_seconds=0)):
        assert energy.energy_j > 0
        assert energy.co2_g > 0
        assert energy.seconds > 0
        assert energy.meter


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": True}, "epochs=True is not an int of 1 or more"),
        ({"epochs": 0}, "epochs=0 is not an int of 1 or more"),
        ({"epochs": 1.5}, r"epochs=1\.5 is not an int of 1 or more"),
        ({"batch_size": -1}, "batch_size=-1 is not an int of 1 or more"),
        ({"learning_rate": 0}, r"learning_rate=0 lies outside \]0, 1\]; use 1e-3"),
        ({"learning_rate": math.nan}, r"learning_rate=nan lies outside \]0, 1\]; use 1e-3"),
        ({"seed": 2**32}, "seed=4294967296 is not an int of 0 to 4294967295"),
        ({"accelerator": "tpu"}, "accelerator='tpu' is not known; use auto, cpu, gpu, cuda or m"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ArgumentError, match=f"^Settings: {message}"):
        Settings(**wrong)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has an mps device")
def test_an_accelerator_that_is_not_there_is_refused(tmp_path, data):
    with pytest.raises(ArgumentError, match=r"accelerator='mps' is not available here; use 'auto'"):
        train(net(), data, Settings(epochs=1, accelerator="mps"), tmp_path)


def test_without_lightning_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "lean_fx.experiment.training")
    with pytest.raises(
        MissingDependencyError, match=r"^lightning is not installed and training ne"
    ):
        importlib.import_module("lean_fx.experiment.training")


def test_a_warning_of_the_model_is_not_hidden(tmp_path, data):
    model = net()
    model.register_forward_pre_hook(lambda *_: warnings.warn("logits overflow", stacklevel=1))
    with pytest.warns(UserWarning, match="logits overflow"):
        train(model, data, Settings(epochs=1, **CPU), tmp_path)


@pytest.mark.parametrize(
    ("step", "how"),
    [(EPOCH + 2, "to go on from {last}"), (2, "to start anew, as no epoch was finished")],
)
def test_ctrl_c_leaves_with_a_line_on_how_to_go_on(tmp_path, data, step, how):
    handler = signal.getsignal(signal.SIGINT)
    model = net()
    stop_at_step(model, step, KeyboardInterrupt())
    with pytest.raises(SystemExit) as error:
        train(model, data, Settings(epochs=2, **CPU), tmp_path)
    last = tmp_path / "last.ckpt"
    assert str(error.value) == f"\nstopped; run the same again {how.format(last=last)}"
    assert signal.getsignal(signal.SIGINT) is handler


SCRIPT = """
import itertools, signal, sys
import torch
from lean_fx.experiment.datasets import digits
from support.models import PaperNet
from lean_fx.experiment.training import Settings, train

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
torch.set_num_threads(1)
model = PaperNet((2,), in_channels=1, image_size=8)
steps = itertools.count(1)
model.register_forward_pre_hook(
    lambda *_: signal.raise_signal(signal.SIGINT) if next(steps) == 14 else None
)
arguments = model, digits(), Settings(epochs=2, batch_size=256, accelerator="cpu"), sys.argv[1]
try:
    train(*arguments, name="baseline")
except SystemExit as stop:
    print(stop)
print(len(train(*arguments, name="baseline")))
"""


def test_a_terminal_shows_the_bar_and_nothing_else(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "examples")}
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))
    with open(ours, errors="replace") as stream:
        reading = threading.Thread(target=lambda: shown.extend(_until_closed(stream)))
        shown: list[str] = []
        reading.start()
        done = subprocess.run(command, stdout=-1, stderr=theirs, text=True, check=True, env=env)
        os.close(theirs)
        reading.join()
    assert done.stdout.splitlines() == [
        "",
        f"stopped; run the same again to go on from {tmp_path / 'last.ckpt'}",
        "2",
    ]
    lines = [line.strip() for line in re.split(r"[\r\n]+", "".join(shown))]
    lines = [re.sub(r"\x1b\[\w", "", line) for line in lines]
    assert [line for line in lines if not re.match(r"$|baseline\b|Epoch \d: ", line)] == []
    for epoch in (1, 2):
        assert any(line.startswith(f"baseline epoch {epoch}/2: 100%") for line in lines)


def test_where_there_is_no_terminal_nothing_is_shown(tmp_path, data, capfd):
    train(net(), data, Settings(epochs=1, **CPU), tmp_path)
    assert capfd.readouterr() == ("", "")


def _until_closed(stream):
    """The text of a stream; a terminal whose other end is closed is an OSError."""
    with contextlib.suppress(OSError):
        while text := stream.read(1):
            yield text
