"""Training from scratch with Lightning: metered, resumable, the same each time on a CPU.

After every epoch the checkpoint ``last.ckpt`` holds the weights, the optimizer, the settings and
the history under the key ``lean_fx``, in plain types, so that ``torch.load(weights_only=True)``
reads it. A run that was killed goes on from there and ends as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import logging
import math
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lean_fx.errors import ArgumentError, DataError, require
from lean_fx.experiment.datasets import Dataset
from lean_fx.files import make_folder
from lean_fx.measure.energy import Energy, EnergyMeter
from lean_fx.measure.report import Epoch

require("lightning", extra="examples", purpose="training")
import lightning  # noqa: E402
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar  # noqa: E402
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm  # noqa: E402
from lightning.pytorch.utilities.exceptions import MisconfigurationException  # noqa: E402

_ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
_NOISE = (
    "The '.*dataloader' does not have many workers",  # the tensors are in memory
    "The number of training batches .* is smaller than the logging interval",  # no logger
    "Checkpoint directory .* exists and is not empty",  # on purpose, when it goes on
    "The dirpath has changed from",  # the folder may be moved
    "GPU available but not used",  # the user's own choice
    ".*isinstance.treespec, LeafSpec.*",
)


@dataclass(frozen=True)
class Settings:
    """How a net is trained: Adam on the cross-entropy, on one device.

    Args:
        epochs: passes over the train split, at least 1.
        batch_size: pictures a step, at least 1; the last step of an epoch takes what is left.
        learning_rate: Adam's, in ]0, 1].
        seed: of the order of the pictures and of dropout, 0 to 2**32 - 1. The first weights are
            those of the model given: seed torch before you make it.
        accelerator: ``"auto"`` (the best there is), ``"cpu"``, ``"gpu"``, ``"cuda"`` or ``"mps"``.
        devices: ``"auto"`` or 1: one device of that kind.

    Raises:
        ArgumentError: a value lies out of its range.

    Example:
        >>> Settings(epochs=0)
        Traceback (most recent call last):
        ...
        lean_fx.errors.ArgumentError: Settings: epochs=0 is not a whole number of 1 or more
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 1e-3
    seed: int = 0
    accelerator: str = "auto"
    devices: int | str = "auto"

    def __post_init__(self) -> None:
        for name, value in (("epochs", self.epochs), ("batch_size", self.batch_size)):
            if not isinstance(value, int) or value < 1:
                raise ArgumentError(f"Settings: {name}={value} is not a whole number of 1 or more")
        if not 0 < self.learning_rate <= 1:
            raise ArgumentError(
                f"Settings: learning_rate={self.learning_rate} lies outside ]0, 1]; use 1e-3"
            )
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ArgumentError(
                f"Settings: seed={self.seed} is not a whole number in 0 to 2**32 - 1; use 0"
            )
        if self.accelerator not in _ACCELERATORS:
            raise ArgumentError(
                f"Settings: accelerator={self.accelerator!r} is unknown; "
                f"use one of {', '.join(_ACCELERATORS)}"
            )
        if self.devices not in ("auto", 1):
            raise ArgumentError(
                f"Settings: devices={self.devices!r}: training runs on one; use 1 or 'auto'"
            )


def train(
    model: nn.Module,
    data: Dataset,
    settings: Settings,
    folder: str | Path,
    *,
    meter: EnergyMeter | None = None,
    name: str = "",
) -> tuple[Epoch, ...]:
    """Train ``model`` in place, and test it after every epoch.

    If ``folder`` holds a checkpoint of the same settings, name, data and shapes of weights,
    training goes on from it; if that one is complete, its weights are loaded and its history
    returned at once. On a CPU the same first weights, settings and threads give the same history
    of losses and accuracies, interrupted or not; torch's global random numbers are seeded anew
    each epoch. Ctrl-C leaves the program with a line on how to go on.

    Args:
        model: the net, with its first weights; it ends on the CPU in evaluation mode.
        data: what to train and test on.
        settings: how.
        folder: where ``last.ckpt`` is kept; made if it is missing.
        meter: a running one, inside its ``with``. Without it the history's joules and grams are
            NaN, and only the seconds are measured.
        name: shown beside the progress bar.

    Returns:
        One entry an epoch. Training loss and accuracy are means over the epoch's own steps, made
        while the weights changed; those on the test split are of the weights at its end. The
        energy is that of the training steps alone.

    Raises:
        ArgumentError: the checkpoint there was made otherwise, or there is no such accelerator.
        DataError: the checkpoint there cannot be read.
        WriteError: ``folder`` cannot be made.
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
    history = _History(data, made_with, meter)
    if last.exists():
        saved = _read(last, made_with, model)
        if len(saved["lean_fx"]["history"]) == settings.epochs:
            state = saved["state_dict"]
            model.load_state_dict({key.removeprefix("model."): state[key] for key in state})
            history.on_load_checkpoint(None, None, saved)
            model.eval()
            return tuple(history.epochs)
    task = _Task(model.train(), data, settings.learning_rate)
    with _quiet():
        _fit(_trainer(settings, last, history, name), task, _loader(data, settings), last)
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
    """Measure the energy of one pass over the test split.

    Whole passes are repeated for ``min_seconds`` at least, as a meter reads short stretches badly,
    and the sum is divided by their number.

    Args:
        model: the net, on the device to measure.
        data: whose test split is passed through.
        batch_size: pictures at a time, at least 1.
        min_seconds: 0 or more; 0 is a single pass.
        country: as in :class:`~lean_fx.measure.energy.EnergyMeter`.
    """
    passes = 0
    with EnergyMeter(country) as meter:
        start = time.perf_counter()
        while passes == 0 or time.perf_counter() - start < min_seconds:
            evaluate(model, data, batch_size)
            passes += 1
    return meter.energy.scaled(1 / passes)


class _Task(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, model: nn.Module, data: Dataset, learning_rate: float) -> None:
        super().__init__()
        self.model = model
        self._data = data
        self._learning_rate = learning_rate

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, labels = batch
        logits = self.model(self._data.normalised(images))
        loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(1) == labels).float().mean()
        means = {"train_loss": loss.detach(), "train_accuracy": accuracy}
        self.log_dict(means, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=self._learning_rate)


class _History(Callback):  # type: ignore[misc]
    """Meters and tests each epoch, and keeps the history in the checkpoint."""

    def __init__(self, data: Dataset, made_with: dict[str, Any], meter: EnergyMeter | None) -> None:
        self.epochs: list[Epoch] = []
        self._data = data
        self._made_with = made_with
        self._meter = meter
        self._start = 0.0

    def on_train_epoch_start(self, trainer: Any, _: Any) -> None:
        # Each epoch has its own random numbers, so that one may go on from any of them.
        torch.manual_seed(_epoch_seed(self._made_with["seed"], trainer.current_epoch))
        if self._meter is not None:
            self._meter.lap()  # drops what came between: the test, the checkpoint
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, task: _Task) -> None:
        # Reading the means waits for the device, so it comes before the lap.
        loss = float(trainer.callback_metrics["train_loss"])
        accuracy = float(trainer.callback_metrics["train_accuracy"])
        if self._meter is not None:
            energy = self._meter.lap()
        else:
            energy = Energy(math.nan, math.nan, time.perf_counter() - self._start, "none")
        tested = evaluate(task.model, self._data, self._made_with["batch_size"])
        task.log("test_accuracy", tested[1], prog_bar=True)
        self.epochs.append(Epoch(loss, accuracy, *tested, energy))

    def on_save_checkpoint(self, _: Any, __: Any, checkpoint: dict[str, Any]) -> None:
        history = [asdict(epoch) for epoch in self.epochs]
        checkpoint["lean_fx"] = {"made_with": self._made_with, "history": history}

    def on_load_checkpoint(self, _: Any, __: Any, checkpoint: dict[str, Any]) -> None:
        self.epochs = [
            Epoch(**{**epoch, "train": Energy(**epoch["train"])})
            for epoch in checkpoint["lean_fx"]["history"]
        ]


class _Bar(TQDMProgressBar):  # type: ignore[misc]
    def __init__(self, name: str) -> None:
        super().__init__(refresh_rate=10)
        self._name = name

    def init_train_tqdm(self) -> Tqdm:
        # Lightning's own bar goes to stdout, where a program's results belong.
        return Tqdm(
            desc=self._name,
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stderr,
            smoothing=0,
            bar_format=self.BAR_FORMAT,
        )

    def on_train_epoch_start(self, trainer: Any, *rest: Any) -> None:
        super().on_train_epoch_start(trainer, *rest)
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self.train_progress_bar.set_description(f"{self._name} {epoch}".strip())

    def on_exception(self, *_: Any) -> None:
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()  # or it would be drawn once more, below the error


class _ShuffledBatches(Sampler[Tensor]):
    """Batches of places in an order that seed and epoch alone decide."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self._count, self._batch_size, self._seed = count, batch_size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the epoch from Lightning, which calls this before each."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        # Nothing is drawn before the first batch is asked for: when it goes on from a checkpoint,
        # Lightning makes the iterator first and sets the epoch afterwards.
        generator = torch.Generator().manual_seed(_epoch_seed(self._seed, self._epoch))
        order = torch.randperm(self._count, generator=generator)
        yield from torch.split(order, self._batch_size)

    def __len__(self) -> int:
        return math.ceil(self._count / self._batch_size)


def _epoch_seed(seed: int, epoch: int) -> int:
    return seed * 1_000_003 + epoch


def _loader(data: Dataset, settings: Settings) -> DataLoader[Any]:
    return DataLoader(
        TensorDataset(data.train_x, data.train_y),
        # The sampler gives whole batches: one indexing each, not batch_size of them.
        sampler=_ShuffledBatches(len(data.train_y), settings.batch_size, settings.seed),
        batch_size=None,
        # Its own, or each new iterator would draw one of the numbers that dropout is to get.
        generator=torch.Generator(),
    )


def _trainer(settings: Settings, last: Path, history: _History, name: str) -> Any:
    keeper = ModelCheckpoint(dirpath=last.parent, filename=last.stem, enable_version_counter=False)
    try:
        return lightning.Trainer(
            accelerator=settings.accelerator,
            devices=1,
            max_epochs=settings.epochs,
            callbacks=[history, _Bar(name), keeper],
            default_root_dir=last.parent,
            logger=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except MisconfigurationException as error:
        raise ArgumentError(
            f"Settings: accelerator={settings.accelerator!r} is not to be had here; "
            "use 'auto' or 'cpu'"
        ) from error


def _fit(trainer: Any, task: _Task, loader: DataLoader[Any], last: Path) -> None:
    on_interrupt = signal.getsignal(signal.SIGINT)
    start = str(last) if last.exists() else None
    try:
        trainer.fit(task, loader, ckpt_path=start, weights_only=True)
    except SystemExit:
        if not trainer.interrupted:
            raise
        # Lightning catches Ctrl-C, ignores any further one, and exits without a word.
        signal.signal(signal.SIGINT, on_interrupt)
        how = (
            f"to go on from {last}" if last.exists() else "to start anew, as no epoch was finished"
        )
        raise SystemExit(f"\nstopped; run the same again {how}") from None


def _read(last: Path, made_with: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Read a checkpoint, unless it cannot be gone on from."""
    try:
        saved: dict[str, Any] = torch.load(last, map_location="cpu", weights_only=True)
        before = saved["lean_fx"]["made_with"]
    except (OSError, EOFError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise DataError(
            f"{last}: is not a whole checkpoint of this training; delete it to train anew"
        ) from error
    differing = [key for key in made_with if before.get(key) != made_with[key]]
    if differing:
        old, new = (
            ", ".join(f"{key}={values.get(key)!r}" for key in differing)
            for values in (before, made_with)
        )
        raise ArgumentError(
            f"{last}: was made with {old}, not {new}; use those again, give another folder, or "
            "delete it to train anew"
        )
    there = {key: value.shape for key, value in saved["state_dict"].items()}
    wanted = {f"model.{key}": value.shape for key, value in model.state_dict().items()}
    if there != wanted:
        first = min(key for key in there | wanted if there.get(key) != wanted.get(key))
        raise ArgumentError(
            f"{last}: holds another model, as {first.removeprefix('model.')} differs; give another "
            "folder, or delete it to train anew"
        )
    return saved


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's remarks off the terminal; its other warnings pass."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for pattern in _NOISE:
                warnings.filterwarnings("ignore", message=pattern)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
