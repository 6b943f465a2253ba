"""Several processes, started by torchrun, train as one does, and the first alone goes on."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lean_fx.errors import ArgumentError
from lean_fx.experiment.processes import (
    Processes,
    is_first_process,
    leave_to_first_process,
    processes,
)
from lean_fx.experiment.training import Settings, train
from test_training import net, numbers, some_digits, stop_at_step

ROOT = Path(__file__).parents[1]
# 100 pictures make batches of 33, 33, 33 and 1: of two processes the shares are never equal, and
# one of them has none of the last batch.
SETTINGS = Settings(epochs=3, batch_size=33, learning_rate=0.01, seed=2, accelerator="cpu")

SCRIPT = """
import sys
from pathlib import Path

import torch

from lean_fx.experiment.processes import leave_to_first_process, processes
from lean_fx.experiment.training import train
from test_processes import SETTINGS, CountingMeter, undropped
from test_training import numbers, some_digits

here = processes()
for text in sys.argv[1:]:
    folder = Path(text.format(rank=here.rank))
    model = undropped(seed=here.rank)  # the first process's weights are to count
    history = train(model, some_digits(), SETTINGS, folder, meter=CountingMeter(here.rank))
    result = numbers(history), [epoch.train.energy_j for epoch in history], model.state_dict()
    torch.save(result, folder / f"rank{here.rank}.pt")
print("trained", flush=True)
leave_to_first_process()
print("went on")
"""


class CountingMeter:
    """Stands in for an energy meter: the laps of process r are r joules each."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def lap(self):
        from lean_fx.measure.energy import Energy

        return Energy(float(self.rank), 0.0, 1.0, "counting")


def undropped(seed: int = 0) -> torch.nn.Module:
    """Without dropout, whose numbers each process draws by itself."""
    return net(seed)[1]


@dataclass(frozen=True)
class Launch:
    status: int
    out: list[str]
    error: list[str]


def launch(folder: Path, *command: object) -> Launch:
    """Run a script in two processes, and return what each has printed."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    logs = folder / "logs"
    done = subprocess.run(
        [sys.executable, *torchrun, "--redirects", "3", "--log-dir", logs, *command],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT / 'examples'}",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        timeout=300,
    )
    out, error = (
        [next(logs.glob(f"*/attempt_0/{rank}/{stream}.log")).read_text() for rank in (0, 1)]
        for stream in ("stdout", "stderr")
    )
    return Launch(done.returncode, out, error)


@dataclass(frozen=True)
class Trained:
    history: tuple
    model: torch.nn.Module


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Trained:
    """What one process comes to."""
    model = undropped()
    return Trained(train(model, some_digits(), SETTINGS, tmp_path_factory.mktemp("a")), model)


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> tuple[Path, Launch]:
    """A launch that trains anew, goes on from one epoch, and finds a training complete."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "script.py").write_text(SCRIPT)
    begun = undropped()
    stop_at_step(begun, 4 + 2 + 1, RuntimeError("power cut"))  # 4 steps, 2 of the test
    with pytest.raises(RuntimeError, match="power cut"):
        train(begun, some_digits(), SETTINGS, folder / "begun")
    train(undropped(), some_digits(), SETTINGS, folder / "complete")
    folders = (folder / name for name in ("anew", "begun", "complete"))
    return folder, launch(folder, folder / "script.py", *folders)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["anew", "begun", "complete"])
def test_two_processes_train_as_one_does(alone, together, name, rank):
    folder, run = together
    assert run.status == 0, run.error
    history, _, state = torch.load(folder / name / f"rank{rank}.pt")
    torch.testing.assert_close(history, numbers(alone.history), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, dict(alone.model.state_dict()), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_first_process_meters_for_all(together):
    folder, _ = together
    for rank in (0, 1):
        assert torch.load(folder / "anew" / f"rank{rank}.pt")[1] == [0.0, 0.0, 0.0]
        begun = torch.load(folder / "begun" / f"rank{rank}.pt")[1]
        assert math.isnan(begun[0])
        assert begun[1:] == [0.0, 0.0]


@pytest.mark.slow
def test_the_first_process_alone_goes_on(together):
    folder, run = together
    assert run.out == ["trained\nwent on\n", "trained\n"]
    assert run.error == ["", ""]  # no bar where there is no terminal
    for name in ("anew", "begun", "complete"):
        there = {path.name for path in (folder / name).iterdir()}
        assert there == {"last.ckpt", "rank0.pt", "rank1.pt"}


@pytest.mark.slow
def test_machines_that_do_not_share_the_folder_are_refused(tmp_path):
    """One process finds a checkpoint, the other none."""
    (tmp_path / "script.py").write_text(SCRIPT)
    begun = undropped()
    stop_at_step(begun, 4 + 2 + 1, RuntimeError("power cut"))
    with pytest.raises(RuntimeError, match="power cut"):
        train(begun, some_digits(), SETTINGS, tmp_path / "own0")
    before = (tmp_path / "own0" / "last.ckpt").read_bytes()
    run = launch(tmp_path, tmp_path / "script.py", tmp_path / "own{rank}")
    assert run.status == 1
    assert (
        f"DataError: {tmp_path / 'own1'}: holds another checkpoint than the first process sees; "
        "give a folder that all machines share"
    ) in run.error[1]
    assert "trained" not in run.out[0]
    assert (tmp_path / "own0" / "last.ckpt").read_bytes() == before


SEVENTH = {"TORCHELASTIC_RUN_ID": "x", "RANK": "6", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}


def test_torchruns_environment_is_read(monkeypatch):
    for name, value in SEVENTH.items():
        monkeypatch.setenv(name, value)
    assert processes() == Processes(rank=6, count=8, per_machine=4)
    assert processes().machines == 2
    assert not is_first_process()
    with pytest.raises(SystemExit) as caught:
        leave_to_first_process()
    assert caught.value.code == 0
    monkeypatch.setenv("RANK", "0")
    assert is_first_process()
    leave_to_first_process()


def test_another_launchers_environment_is_not(monkeypatch):
    for name, value in SEVENTH.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert processes() == Processes()
    assert is_first_process()


def test_machines_of_unequal_size_are_refused():
    with pytest.raises(ArgumentError) as caught:
        Processes(rank=0, count=3, per_machine=2)
    assert str(caught.value) == (
        "torchrun: 3 processes in all are not a multiple of the 2 on this machine; start equally "
        "many on each"
    )


@pytest.mark.skipif(torch.cuda.device_count() > 3, reason="this machine has the devices")
def test_more_processes_than_devices_are_refused(tmp_path, monkeypatch):
    for name, value in SEVENTH.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ArgumentError) as caught:
        train(net(), some_digits(), Settings(accelerator="gpu"), tmp_path)
    assert str(caught.value) == (
        "Settings: accelerator='gpu' is not available here for 4 processes; use fewer or 'cpu'"
    )


@pytest.mark.slow
def test_an_example_just_works(tmp_path):
    run = launch(tmp_path, ROOT / "examples/digits.py", "--epochs", "1", "--out", "runs")
    assert run.status == 0, run.error
    assert run.out[0].count("are in runs/") == 1
    assert (run.out[1], run.error[1]) == ("", "")
    there = [path.name for path in (tmp_path / "runs").iterdir() if not path.is_dir()]
    assert sorted(name for name in there if not name.endswith(".onnx")) == [
        *("curves.png", "figure3.png", "report.json", "report.md")
    ]
    assert "- Training: 2 processes." in (tmp_path / "runs" / "report.md").read_text()
