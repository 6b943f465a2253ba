"""Long checks of what must hold at any moment; ``make test-slow`` runs them."""

import copy
import json
import multiprocessing
import os
import random
import signal
import threading
import time

import onnxruntime
import pytest
import torch
from torch import nn

import lean_fx
from lean_fx.experiment.ablation import Row, _with_row, read_rows
from lean_fx.files import replacing, write_text

FORK = multiprocessing.get_context("fork")
X = torch.rand(2, 3, 8, 8)


def net():
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 16, 10)),
    )


class Text:
    """One file."""

    def write(self, folder, number):
        write_text(folder / "a.txt", f"{number} " * 20_000)

    def check(self, folder):
        assert len(set((folder / "a.txt").read_text().split())) == 1


class Pair:
    """Two files that belong together: the second is there only where it is the first one's."""

    def write(self, folder, number):
        with replacing(folder / "a.json") as part:
            write_text(part.with_suffix(".md"), str(number))
            write_text(part, str(number))

    def check(self, folder):
        if (folder / "a.json").exists():
            assert (folder / "a.json").read_text() == (folder / "a.md").read_text()


class Rows:
    """A table that grows."""

    def write(self, folder, number):
        _with_row(
            folder / "a.csv", Row("lean", 4, number, 1, 0.5, 1, 2, 1.0, 1.0, 1.0, 1.0, "kernel")
        )

    def check(self, folder):
        seeds = [row.seed for row in read_rows(folder / "a.csv")]
        assert seeds == list(range(len(seeds)))
        last = getattr(self, "last", 0)
        assert len(seeds) >= last
        self.last = len(seeds)


class Checkpoint:
    """What a training goes on from."""

    def write(self, folder, number):
        from lean_fx.experiment.lightning_parts import WholeCheckpoints

        values = {"values": torch.full((100_000,), float(number))}
        WholeCheckpoints().save_checkpoint(values, folder / "last.ckpt")

    def check(self, folder):
        values = torch.load(folder / "last.ckpt", weights_only=True)["values"]
        assert len(values.unique()) == 1


class Exported:
    """A file of a model."""

    def write(self, folder, number):
        torch.set_num_threads(1)
        lean_fx.export_onnx(net(), folder / "net.onnx", X)

    def check(self, folder):
        session = onnxruntime.InferenceSession(folder / "net.onnx")
        assert session.run(None, {"input": X.numpy()})[0].shape == (2, 10)


class Comparison:
    """A table, a picture and the figures of one run."""

    def write(self, folder, number):
        from lean_fx.measure.report import Report

        text = (folder / "seed.json").read_text()
        data = json.loads(text) | {"title": f"run {number}"}
        Report.from_json(json.dumps(data)).save(folder)

    def check(self, folder):
        if (folder / "report.json").exists():
            title = json.loads((folder / "report.json").read_text())["title"]
            assert (folder / "report.md").read_text().startswith(f"# {title}\n")


def _write_for_ever(writer, folder, first):
    number = first
    while True:
        writer.write(folder, number)
        number += 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("writer", "kills", "longest"),
    [
        (Text(), 200, 0.05),
        (Pair(), 200, 0.05),
        (Rows(), 200, 0.1),
        (Checkpoint(), 200, 0.05),
        (Exported(), 200, 2.0),
        (Comparison(), 200, 1.0),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "write") else "",
)
def test_kills_lose_nothing(writer, kills, longest, tmp_path):
    if isinstance(writer, Comparison):
        from test_report import make_report

        write_text(tmp_path / "seed.json", make_report().to_json())
    chance = random.Random(0)
    writer.write(tmp_path, 0)
    for _ in range(kills):
        first = getattr(writer, "last", 1)
        process = FORK.Process(target=_write_for_ever, args=(writer, tmp_path, first))
        process.start()
        time.sleep(chance.uniform(0, longest))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        writer.check(tmp_path)
    writer.write(tmp_path, getattr(writer, "last", 1))
    assert list(tmp_path.glob(".*.lean_fx")) == []


@pytest.mark.slow
def test_threads_get_what_one_gets(tmp_path):
    """8 threads, 100 calls each, of plan, leanify and export_onnx."""
    first, wrong = net(), []
    # Plans are equal whatever their sensitivity is: that of the result depends on the seeds drawn,
    # and the ninth thread draws from torch's generator without the lock.
    wanted = lean_fx.plan(first, X)

    def work(number):
        try:
            for call in range(100):
                model = copy.deepcopy(first)
                if lean_fx.plan(model, X) != wanted:
                    wrong.append((number, call, "plan"))
                lean = lean_fx.leanify(model, X)
                if lean(X).shape != (2, 10) or lean.get_submodule("2").in_channels != 4:
                    wrong.append((number, call, "leanify"))
                if call % 25 == 0:
                    lean_fx.export_onnx(lean, tmp_path / f"{number}.onnx", X)
        except Exception as error:
            wrong.append((number, error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    call = nn.Module.__call__
    for each in threads:
        each.start()
    while any(each.is_alive() for each in threads):  # a ninth thread runs models meanwhile
        assert net()(X).shape == (2, 10)
    for each in threads:
        each.join()
    assert wrong == []
    assert nn.Module.__call__ is call
    assert torch.is_grad_enabled()
