"""What Lightning's Trainer is given: the task, the history, the progress bar, and silence."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lean_fx.errors import DataError, quiet_loggers, require
from lean_fx.experiment.batches import Share, epoch_seed
from lean_fx.experiment.datasets import Dataset
from lean_fx.experiment.resuming import pack, unpack_history
from lean_fx.files import replacing
from lean_fx.measure.energy import Energy, EnergyMeter
from lean_fx.measure.report import Epoch

require("lightning", extra="examples", purpose="training")
import lightning  # noqa: E402
from lightning.pytorch.callbacks import Callback, TQDMProgressBar  # noqa: E402
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm  # noqa: E402
from lightning.pytorch.plugins.io import TorchCheckpointIO  # noqa: E402

_NOISE = (
    "The '.*dataloader' does not have many workers",  # the tensors are in memory
    "The number of training batches .* is smaller than the logging interval",  # no logger
    "Checkpoint directory .* exists and is not empty",  # on purpose, when it goes on
    "The dirpath has changed from",  # the folder may be moved
    "GPU available but not used",  # the user's own choice
    "It is recommended to use `self.log.'test_accuracy'",  # one process tests, for all
    ".*isinstance.treespec, LeafSpec.*",
)


class Task(lightning.LightningModule):  # type: ignore[misc]
    """Adam on the cross-entropy; what it logs are means over the epoch's batches."""

    def __init__(
        self, model: nn.Module, data: Dataset, learning_rate: float, schedule: str
    ) -> None:
        super().__init__()
        self.model = model
        self._data = data
        self._learning_rate = learning_rate
        self._schedule = schedule

    def training_step(self, batch: Share, _: int) -> Tensor:
        """Return the loss of this process's share, weighted so that the processes' mean is right.

        The mean is that of the gradients, which Lightning takes, and of what is logged.
        """
        logits = self.model(self._data.normalised(batch.images))
        loss = batch.weight * F.cross_entropy(logits, batch.labels)
        accuracy = batch.weight * (logits.argmax(1) == batch.labels).float().mean()
        self.log_dict(
            {"train_loss": loss.detach(), "train_accuracy": accuracy},
            prog_bar=True,
            on_step=False,
            on_epoch=True,
            batch_size=batch.batch_size,
            sync_dist=True,
        )
        return loss

    def configure_optimizers(self) -> Any:
        """Return the optimizer and the schedule of its rate, as Lightning asks for them."""
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self._learning_rate)
        if self._schedule == "constant":
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": falling, "interval": "step"},
        }


class History(Callback):  # type: ignore[misc]
    """Meters and tests each epoch, and keeps the history in the checkpoint.

    Only the first process tests, and its readings are the history of all.

    Args:
        made_with: what the training is made with; its ``seed`` is that of dropout.
        meter: a running one, or None.
        test: gives the loss and the accuracy of a model on the test split.
        stop: called with the history after every epoch; where it returns True, training ends.

    Attributes:
        epochs: the history.
    """

    def __init__(
        self,
        made_with: dict[str, Any],
        meter: EnergyMeter | None,
        test: Callable[[nn.Module], tuple[float, float]],
        stop: Callable[[Sequence[Epoch]], bool],
    ) -> None:
        self.epochs: list[Epoch] = []
        self._made_with = made_with
        self._meter = meter
        self._test = test
        self._stop = stop
        self._start = 0.0

    def on_train_start(self, trainer: Any, _: Any) -> None:
        """Refuse to mix trainings, as would happen where a machine has a folder of its own."""
        mine = (self._made_with, len(self.epochs))
        if trainer.strategy.broadcast(mine) != mine:
            raise DataError(
                f"{trainer.default_root_dir}: holds another checkpoint than the first process "
                "sees; give a folder that all machines share"
            )

    def on_train_epoch_start(self, trainer: Any, _: Any) -> None:
        """Start the clock, and the random numbers."""
        # Each epoch has its own random numbers, so that one may go on from any of them.
        seed = self._made_with["seed"]
        torch.manual_seed(epoch_seed(seed, trainer.current_epoch, trainer.global_rank))
        if self._meter is not None:
            self._meter.lap()  # drops what came between: the test, the checkpoint
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, task: Task) -> None:
        """Stop the clock, then test."""
        # Reading the means waits for the device, so it comes before the lap.
        loss = float(trainer.callback_metrics["train_loss"])
        accuracy = float(trainer.callback_metrics["train_accuracy"])
        if self._meter is not None:
            energy = self._meter.lap()
        else:
            energy = Energy(math.nan, math.nan, time.perf_counter() - self._start, "none")
        tested = self._test(task.model) if trainer.is_global_zero else (math.nan, math.nan)
        epoch = trainer.strategy.broadcast(Epoch(loss, accuracy, *tested, energy))
        task.log("test_accuracy", epoch.test_accuracy, prog_bar=True, rank_zero_only=True)
        self.epochs.append(epoch)
        trainer.should_stop = self._stop(self.epochs)

    def on_save_checkpoint(self, _: Any, __: Any, checkpoint: dict[str, Any]) -> None:
        """Put the history into the checkpoint."""
        checkpoint["lean_fx"] = pack(self._made_with, self.epochs)

    def on_load_checkpoint(self, _: Any, __: Any, checkpoint: dict[str, Any]) -> None:
        """Take the history from the checkpoint."""
        self.epochs = unpack_history(checkpoint)


class WholeCheckpoints(TorchCheckpointIO):  # type: ignore[misc]
    """Writes a checkpoint into a hidden folder beside its place, then renames it.

    Lightning writes it to TMPDIR and copies it if that is another file system; a process that is
    killed meanwhile leaves half a file.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write it whole or not at all.

        Raises:
            WriteError: as in :func:`lean_fx.files.replacing`.
        """
        whole = io.BytesIO()
        torch.save(checkpoint, whole)
        with replacing(path) as part:
            part.write_bytes(whole.getbuffer())


class Bar(TQDMProgressBar):  # type: ignore[misc]
    """Lightning's bar on stderr, with a name and the epoch."""

    def __init__(self, name: str) -> None:
        super().__init__(refresh_rate=10)
        self._name = name

    def init_train_tqdm(self) -> Tqdm:
        """Return a bar on stderr: Lightning's own goes to stdout, where results belong."""
        return Tqdm(
            desc=self._name,
            disable=self.is_disabled or None,  # None: where stderr is not a terminal
            dynamic_ncols=True,
            file=sys.stderr,
            smoothing=0,
            bar_format=self.BAR_FORMAT,
        )

    def on_train_epoch_start(self, trainer: Any, *rest: Any) -> None:
        """Show which epoch it is."""
        super().on_train_epoch_start(trainer, *rest)
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self.train_progress_bar.set_description(f"{self._name} {epoch}".strip())

    def on_exception(self, *_: Any) -> None:
        """Close the bar, or it would be drawn once more, below the error."""
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's remarks; its other warnings are shown."""
    own = ("lightning.pytorch", "lightning.fabric")
    with quiet_loggers(*own, level=logging.WARNING), warnings.catch_warnings():
        for pattern in _NOISE:
            warnings.filterwarnings("ignore", message=pattern)
        yield
