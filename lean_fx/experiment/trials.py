"""One trial of a study, in a process of its own: make, train, count, time.

Training processes share a lock, and timing holds it exclusively: no model is timed on a machine
while another of the same folder trains there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any, TypeAlias

from lean_fx.errors import ArgumentError, LeanError, one_line_with_type, require
from lean_fx.experiment.arms import model_of
from lean_fx.experiment.budget import MakeWidth
from lean_fx.experiment.comparison import export_and_time
from lean_fx.experiment.configurations import Configuration
from lean_fx.experiment.data_modules import DataModule, dataset_of
from lean_fx.experiment.datasets import Dataset
from lean_fx.experiment.training import Settings, train
from lean_fx.files import make_folder
from lean_fx.measure.costs import count_macs, count_parameters
from lean_fx.measure.energy import EnergyMeter
from lean_fx.measure.report import Epoch

#: A data set, or what makes it in the process that needs it; or a LightningDataModule, likewise.
Data: TypeAlias = "Dataset | DataModule | Callable[[], Dataset | DataModule]"

#: Called with the accuracies after each epoch; returns whether to stop the training.
Stop: TypeAlias = Callable[[Sequence[float]], bool]

_CONTEXT: ForkServerContext | SpawnContext = multiprocessing.get_context("spawn")
if "forkserver" in multiprocessing.get_all_start_methods():
    # A server that has imported all this once makes each process; training takes seconds to import.
    _CONTEXT = multiprocessing.get_context("forkserver")
    _CONTEXT.set_forkserver_preload([__name__])


_END_S = 10.0  # that a process may take to end by itself


class TrialError(LeanError):
    """A trial failed; the message is the error of its own process."""


@dataclass(frozen=True)
class Job:
    """What a trial's process is given.

    Attributes:
        configuration: of the model and its training.
        make: gives the model of a width.
        data: to train and to test on.
        held_out: whether to test on a part of the train split that is held out.
        like: the reduction that narrow controls are made equal to.
        settings: of the training; rate and seed are the configuration's.
        folder: for the checkpoint.
        lock: a file that the trials of a machine share.
        timed: whether latency is measured.
        metered: whether energy is measured.
    """

    configuration: Configuration
    make: MakeWidth
    data: Data
    held_out: bool
    like: str
    settings: Settings
    folder: Path
    lock: Path
    timed: bool = False
    metered: bool = False


@dataclass(frozen=True)
class Outcome:
    """The result of a trial.

    Attributes:
        accuracy: on the test split, or the part held out, after the last epoch, in [0, 1].
        epochs: that were trained.
        parameters: of the model.
        macs: multiply-adds of one sample.
        seconds: that the training took.
        energy_j: joules of training; NaN if it was not metered.
        latency_ms: median of one sample in ONNX Runtime, one thread; NaN if it was not timed.
        latency_ratio: to that of the whole model, timed in turn.
        lean_nodes: what computed LEAN nodes: ``"kernel"`` or ``"function"``; empty if not timed.
        host: the machine.
    """

    accuracy: float
    epochs: int
    parameters: int
    macs: int
    seconds: float
    energy_j: float = math.nan
    latency_ms: float = math.nan
    latency_ratio: float = math.nan
    lean_nodes: str = ""
    host: str = ""


def data_of(job: Job) -> Dataset:
    """The data that a trial trains and tests on.

    Raises:
        ArgumentError: they are neither a data set nor a data module.
    """
    given = job.data() if callable(job.data) else job.data
    if not isinstance(given, Dataset | DataModule):
        raise ArgumentError(
            f"data is a {type(given).__name__}; give a Dataset or a LightningDataModule"
        )
    data = given if isinstance(given, Dataset) else dataset_of(given)
    return data.held_out() if job.held_out else data


def run_here(job: Job, stop: Stop) -> Outcome:
    """Run a trial in this process.

    Raises:
        LeanError: the model cannot be made, trained, counted, exported or timed.
    """
    lock = require("filelock", extra="examples", purpose="a study").ReadWriteLock(str(job.lock))
    data = data_of(job)
    inputs = data.normalised(data.train_x[:32])
    configuration = job.configuration
    # Its width is found by timing.
    times = configuration.arm == "narrow_latency"
    with lock.write_lock() if times else lock.read_lock():
        model = model_of(configuration, job.make, inputs, job.like)
    settings = dataclasses.replace(
        job.settings, learning_rate=configuration.learning_rate, seed=configuration.seed
    )

    def stopped(history: Sequence[Epoch]) -> bool:
        return stop([epoch.test_accuracy for epoch in history])

    metering = EnergyMeter() if job.metered else contextlib.nullcontext()
    with lock.read_lock(), metering as meter:
        history = train(model, data, settings, job.folder, meter=meter, stop=stopped)
    outcome = Outcome(
        accuracy=history[-1].test_accuracy,
        epochs=len(history),
        parameters=count_parameters(model),
        macs=count_macs(model, inputs[:1]),
        seconds=sum(epoch.train.seconds for epoch in history),
        energy_j=sum(epoch.train.energy_j for epoch in history),
        host=socket.gethostname(),
    )
    if not job.timed:
        return outcome
    with lock.write_lock():
        taken = export_and_time({"whole": job.make(1.0), "own": model}, data, job.folder)
    own, whole = taken["own"], taken["whole"]
    return dataclasses.replace(
        outcome,
        latency_ms=own.median_ms,
        latency_ratio=own.median_ms / whole.median_ms,
        lean_nodes="kernel" if own.kernel else "function",
    )


def run_apart(job: Job, stop: Stop) -> Outcome:
    """Run a trial in a process of its own, so that nothing it does outlives it.

    Args:
        job: what to run.
        stop: is called in this process.

    Raises:
        TrialError: it failed, or its process ended.
    """
    make_folder(job.folder)
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_answer, args=(theirs, job), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            message, value = ours.recv()
            if message == "epoch":
                ours.send(stop(value))
            elif message == "outcome":
                process.join(_END_S)  # a process that is stopped leaves its semaphores behind
                return Outcome(**value)
            else:
                raise TrialError(value)
    except EOFError:
        process.join()
        raise TrialError(f"its process ended with status {process.exitcode}") from None
    finally:
        process.terminate()
        process.join()


def _answer(pipe: Connection, job: Job) -> None:
    """Run a trial for another process, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def stop(accuracies: Sequence[float]) -> bool:
        pipe.send(("epoch", list(accuracies)))
        return bool(pipe.recv())

    message: tuple[str, Any]
    try:
        message = ("outcome", dataclasses.asdict(run_here(job, stop)))
    except Exception as error:  # a user's own factory may raise anything
        message = ("error", one_line_with_type(error))
    pipe.send(message)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
