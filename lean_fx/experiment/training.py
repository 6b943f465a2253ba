"""Training from scratch with Lightning: metered, resumable, the same each time on a CPU.

After every epoch the checkpoint ``last.ckpt`` holds the weights, the optimizer, the settings and
the history under the key ``lean_fx``, in plain types, so that ``torch.load(weights_only=True)``
reads it. A run that was killed goes on from there and ends as if it had never stopped.

Started by torchrun, one process a device, on one machine or several, the processes train one model
together: ``torchrun --nproc-per-node 2 examples/digits.py``.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lean_fx.checks import check_choice, check_int, check_rate
from lean_fx.errors import ArgumentError, require
from lean_fx.experiment.batches import batches
from lean_fx.experiment.datasets import Dataset
from lean_fx.experiment.processes import Processes, is_first_process, processes
from lean_fx.experiment.resuming import read_checkpoint, unpack_history
from lean_fx.files import make_folder
from lean_fx.measure.energy import Energy, EnergyMeter, call_for
from lean_fx.measure.report import Epoch

require("lightning", extra="examples", purpose="training")
import lightning  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.utilities.exceptions import MisconfigurationException  # noqa: E402

from lean_fx.experiment.lightning_parts import (  # noqa: E402
    Bar,
    History,
    Task,
    WholeCheckpoints,
    quiet,
)

_ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")


@dataclass(frozen=True)
class Settings:
    """How a net is trained: Adam on the cross-entropy, on one device a process.

    Args:
        epochs: passes over the train split, at least 1.
        batch_size: pictures a step, at least 1, over all processes; the last step of an epoch
            takes what is left.
        learning_rate: Adam's, in ]0, 1].
        schedule: of the rate: ``"constant"``, or ``"cosine"``, which falls to 0 over all steps.
        seed: of the order of the pictures and of dropout, 0 to 2**32 - 1. The first weights are
            those of the model given: seed torch before you make it.
        accelerator: ``"auto"`` (the best there is), ``"cpu"``, ``"gpu"``, ``"cuda"`` or ``"mps"``.

    Raises:
        ArgumentError: a value lies out of its range.

    Example:
        >>> Settings(epochs=0)
        Traceback (most recent call last):
        ...
        lean_fx.errors.ArgumentError: Settings: epochs=0 is not an int of 1 or more
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 1e-3
    seed: int = 0
    accelerator: str = "auto"
    schedule: str = "constant"

    def __post_init__(self) -> None:
        ranges = {"epochs": (1, None), "batch_size": (1, None), "seed": (0, 2**32 - 1)}
        for name, (least, most) in ranges.items():
            checked = check_int(f"Settings: {name}", getattr(self, name), least, most)
            object.__setattr__(self, name, checked)  # a checkpoint takes no int of NumPy
        check_rate("Settings: learning_rate", self.learning_rate)
        check_choice("Settings: accelerator", self.accelerator, _ACCELERATORS)
        check_choice("Settings: schedule", self.schedule, ("constant", "cosine"))


def train(
    model: nn.Module,
    data: Dataset,
    settings: Settings,
    folder: str | Path,
    *,
    meter: EnergyMeter | None = None,
    name: str = "",
    stop: Callable[[Sequence[Epoch]], bool] = lambda _: False,
) -> tuple[Epoch, ...]:
    """Train ``model`` in place, and test it after every epoch.

    If ``folder`` holds a checkpoint of the same settings, name, data and shapes of weights,
    training goes on from it; if that one is complete, its weights are loaded and its history
    returned at once. On a CPU the same first weights, settings and threads give the same history
    of losses and accuracies, interrupted or not; torch's global random numbers are seeded anew
    each epoch. Ctrl-C leaves the program with a line on how to go on.

    Under torchrun every process must call it, alike. Each takes its share of every batch, so that
    the steps are those of one process, but for rounding; only dropout and batch normalization,
    which act on a share at a time, come out otherwise. Only the first process tests and writes.

    Args:
        model: the net, with its first weights; it ends on the CPU in evaluation mode.
        data: what to train and test on.
        settings: how.
        folder: where ``last.ckpt`` is kept; made if it is missing. Several machines share it.
        meter: a running one, inside its ``with``; that of the first process counts, and sees its
            own machine. Without it the history's joules and grams are NaN, its meter is
            ``"none"``, and only the seconds are measured.
        name: shown beside the progress bar.
        stop: called with the history after every epoch, in every process; training ends early
            where it returns True.

    Returns:
        One entry an epoch, the same in every process. Training loss and accuracy are means over
        the epoch's own steps, made while the weights changed; those on the test split are of the
        weights at its end. The energy is only that of the training steps.

    Raises:
        ArgumentError: the checkpoint there was made with something else, or there is no such
            accelerator, or there are not enough of them for the processes of this machine.
        DataError: the checkpoint there cannot be read, or is not the one of the first process.
        WriteError: ``folder`` cannot be made or written to.
        SystemExit: Ctrl-C was pressed.

    Example::

        with EnergyMeter() as meter:
            history = train(PaperNet(), stl10("data"), Settings(), "runs/baseline", meter=meter)
    """
    last = make_folder(folder) / "last.ckpt"
    made_with = {
        "name": name,
        "data": f"{data.name} ({len(data.train_y)} train, {len(data.test_y)} test)",
        **asdict(settings),
    }
    here = processes()
    history = History(made_with, meter, lambda net: evaluate(net, data, settings.batch_size), stop)
    if last.exists():
        saved = read_checkpoint(last, made_with, model)
        epochs = unpack_history(saved)
        if len(epochs) == settings.epochs:
            state = saved["state_dict"]
            model.load_state_dict({key.removeprefix("model."): state[key] for key in state})
            model.eval()
            return tuple(epochs)
    task = Task(model.train(), data, settings.learning_rate, settings.schedule)
    loader = batches(data, settings.batch_size, settings.seed, here)
    with quiet():
        _fit(_trainer(settings, here, last, history, name), task, loader, last)
    model.eval()
    return tuple(history.epochs)


def evaluate(model: nn.Module, data: Dataset, batch_size: int = 64) -> tuple[float, float]:
    """Return the mean cross-entropy and the accuracy, in [0, 1], over the test split.

    It runs on the device of the model's parameters, in evaluation mode and without gradients; the
    model's mode is put back afterwards.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    was_training = model.training
    model.eval()
    loss, correct = 0.0, 0
    with torch.no_grad():
        for first in range(0, len(data.test_y), batch_size):
            part = slice(first, first + batch_size)
            labels = data.test_y[part].to(device)
            logits = model(data.normalised(data.test_x[part].to(device)))
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += int((logits.argmax(1) == labels).sum())
    model.train(was_training)
    return loss / len(data.test_y), correct / len(data.test_y)


def measure_test_energy(
    model: nn.Module,
    data: Dataset,
    batch_size: int = 64,
    min_seconds: float = 5,
    *,
    country: str = "USA",
) -> Energy:
    """Measure the energy of one pass over the test split: the mean of several.

    They are repeated for ``min_seconds`` at least, as a meter reads short stretches badly.

    Args:
        model: the net, on the device to measure.
        data: whose test split is passed through.
        batch_size: pictures at a time, at least 1.
        min_seconds: 0 or more; 0 is a single pass.
        country: as in :class:`~lean_fx.measure.energy.EnergyMeter`.
    """
    with EnergyMeter(country) as meter:
        passes = call_for(lambda: evaluate(model, data, batch_size), min_seconds)
    return meter.energy.scaled(1 / passes)


def _trainer(
    settings: Settings, here: Processes, last: Path, history: History, name: str
) -> lightning.Trainer:
    keeper = ModelCheckpoint(dirpath=last.parent, filename=last.stem, enable_version_counter=False)
    try:
        return lightning.Trainer(
            accelerator=settings.accelerator,
            devices=here.per_machine,
            num_nodes=here.machines,
            strategy="auto" if here.count == 1 else "ddp",
            max_epochs=settings.epochs,
            callbacks=[history, Bar(name), keeper],
            plugins=[WholeCheckpoints()],
            default_root_dir=last.parent,
            logger=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except MisconfigurationException as error:
        many = f" for {here.per_machine} processes" if here.per_machine > 1 else ""
        raise ArgumentError(
            f"Settings: accelerator={settings.accelerator!r} is not available here{many}; use "
            f"{'fewer' if many else repr('auto')} or 'cpu'"
        ) from error


def _fit(trainer: lightning.Trainer, task: Task, loader: Any, last: Path) -> None:
    on_interrupt = signal.getsignal(signal.SIGINT)
    start = str(last) if last.exists() else None
    try:
        trainer.fit(task, loader, ckpt_path=start, weights_only=True)
    except SystemExit:
        if not trainer.interrupted or not is_first_process():
            raise
        # Lightning catches Ctrl-C, ignores any further one, and exits without a word.
        signal.signal(signal.SIGINT, on_interrupt)
        how = (
            f"to go on from {last}" if last.exists() else "to start anew, as no epoch was finished"
        )
        raise SystemExit(f"\nstopped; run the same again {how}") from None
