"""A grid of reductions, channels and seeds: one row each, kept in a CSV file."""

from __future__ import annotations

import csv
import dataclasses
import io
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from lean_fx.checks import check_choice, check_ints, whole_numbers
from lean_fx.errors import DataError, require
from lean_fx.experiment.comparison import export_and_time, require_all
from lean_fx.experiment.datasets import Dataset
from lean_fx.experiment.processes import is_first_process, leave_to_first_process
from lean_fx.files import make_folder, write_text
from lean_fx.measure.costs import count_macs, count_parameters
from lean_fx.reduction.registry import reductions
from lean_fx.transform import leanify


@dataclass(frozen=True, order=True)
class Setting:
    """What one row is trained with.

    Attributes:
        reduction: ``"baseline"``, ``"narrow"``, or the name of a reduction.
        channels: C' of every reduction; 0 for the baseline.
        seed: of the weights and of the order of the pictures.
        epochs: of training.
    """

    reduction: str
    channels: int
    seed: int
    epochs: int

    def __str__(self) -> str:
        """A name for files and progress bars."""
        channels = f"-{self.channels}" if self.channels else ""
        return f"{self.reduction}{channels}-seed{self.seed}-epochs{self.epochs}"


@dataclass(frozen=True)
class Row:
    """The result of one setting.

    Attributes:
        reduction: as in :class:`Setting`, like the next three.
        channels: C' that was asked for.
        seed: of this run.
        epochs: of this run.
        accuracy: on the test split after the last epoch, in [0, 1].
        parameters: of the net.
        macs: multiply-adds of one picture.
        latency_ms: median of one picture in ONNX Runtime, 1 thread.
        latency_q1_ms: lower quartile.
        latency_q3_ms: upper quartile.
        latency_ratio: to the baseline, timed in turn with it in the same run; below 1 is faster.
            Compare rows by this: the milliseconds of different rows come from different runs.
        lean_nodes: what computed LEAN nodes there: ``"kernel"`` or ``"function"``.
    """

    reduction: str
    channels: int
    seed: int
    epochs: int
    accuracy: float
    parameters: int
    macs: int
    latency_ms: float
    latency_q1_ms: float
    latency_q3_ms: float
    latency_ratio: float
    lean_nodes: str

    @property
    def setting(self) -> Setting:
        """The setting of this row."""
        return Setting(self.reduction, self.channels, self.seed, self.epochs)


#: Makes the net of a setting, with fresh weights.
Make: TypeAlias = "Callable[[Setting], nn.Module]"


def grid(
    channels: str | Sequence[int],
    controls: str | Sequence[str],
    seeds: str | Sequence[int],
    epochs: int,
) -> list[Setting]:
    """The settings of an ablation: the baseline, LEAN and the controls, for each seed.

    Args:
        channels: numbers of 1 or more, in a list or a text with commas between them.
        controls: names of reductions, or ``"narrow"``, likewise; may be empty.
        seeds: numbers of 0 or more, likewise.
        epochs: 1 or more.

    Raises:
        ArgumentError: a number or a name is none of these.

    Example:
        >>> [str(setting) for setting in grid("4", "slice", [0], epochs=2)]
        ['baseline-seed0-epochs2', 'lean-4-seed0-epochs2', 'slice-4-seed0-epochs2']
    """
    channels = _whole_numbers("channels", channels, 1)
    seeds = _whole_numbers("seeds", seeds, 0)
    if isinstance(controls, str):
        controls = [name.strip() for name in controls.split(",") if name.strip()]
    names = dict.fromkeys(["lean", *controls])
    known = (*reductions(), "narrow")
    for name in names:
        check_choice("control", name, known)
    settings = []
    for seed in seeds:
        settings.append(Setting("baseline", 0, seed, epochs))
        settings += [Setting(name, count, seed, epochs) for name in names for count in channels]
    return list(dict.fromkeys(settings))


def _whole_numbers(subject: str, given: str | Sequence[int], least: int) -> tuple[int, ...]:
    if not isinstance(given, str):
        return check_ints(subject, list(given), least)
    return tuple(whole_numbers(subject, given, least))


def run_grid(
    settings: Iterable[Setting], data: Dataset, folder: Path, make: Make | None = None
) -> list[Row]:
    """Train, export and time every setting that is not in ``folder/ablation.csv`` yet.

    A row is written as soon as it is known; training that was interrupted goes on from its
    checkpoint. Other calls may add their rows to the same folder meanwhile. Under torchrun all
    processes train, and only the first does the rest.

    Args:
        settings: the rows that are wanted.
        data: to train and to test on.
        folder: of the table and the checkpoints; made if it is missing.
        make: gives the net of a setting; every net is timed in turn with that of ``"baseline"``.
            Without it, a small convolutional net for the pictures of ``data``.

    Returns:
        The rows of the settings, in their order.

    Raises:
        DataError: the CSV file there is not one of these.
        LeanError: a setting cannot be trained or exported.
        SystemExit: of status 0, at the end, in all processes but the first.
    """
    make = make or (lambda setting: small_net(setting, data))
    file = make_folder(folder) / "ablation.csv"
    rows = {row.setting: row for row in read_rows(file)} if file.exists() else {}
    wanted = list(settings)
    missing = [setting for setting in wanted if setting not in rows]
    require_all()
    for setting in missing:
        make(setting)  # fails before anything is trained
    for number, setting in enumerate(missing, start=1):
        if is_first_process():
            print(f"{number}/{len(missing)} {setting}", file=sys.stderr, flush=True)
        row = _measured(setting, data, folder, make)
        if row is not None:
            rows = _with_row(file, row)
    leave_to_first_process()
    return [rows[setting] for setting in wanted]


def _with_row(file: Path, row: Row) -> dict[Setting, Row]:
    """Add a row to those that are in a file by now; return them all."""
    filelock = require("filelock", extra="examples", purpose="an ablation")
    with filelock.FileLock(file.with_suffix(".lock")):
        rows = {each.setting: each for each in read_rows(file)} if file.exists() else {}
        rows[row.setting] = row
        write_rows(file, rows.values())
    return rows


def _measured(setting: Setting, data: Dataset, folder: Path, make: Make) -> Row | None:
    """Train in every process; measure in the first, the others return None."""
    from lean_fx.experiment.training import Settings, train

    torch.manual_seed(setting.seed)
    model = make(setting)
    training = Settings(epochs=setting.epochs, seed=setting.seed)
    history = train(model, data, training, folder / str(setting), name=str(setting))
    if not is_first_process():
        return None
    baseline_net = make(dataclasses.replace(setting, reduction="baseline", channels=0))
    latency = export_and_time({"baseline": baseline_net, str(setting): model}, data, folder)
    own, baseline = latency[str(setting)], latency["baseline"]
    return Row(
        **dataclasses.asdict(setting),
        accuracy=history[-1].test_accuracy,
        parameters=count_parameters(model),
        macs=count_macs(model, data.normalised(data.test_x[:1])),
        latency_ms=own.median_ms,
        latency_q1_ms=own.q1_ms,
        latency_q3_ms=own.q3_ms,
        latency_ratio=own.median_ms / baseline.median_ms,
        lean_nodes="kernel" if own.kernel else "function",
    )


def small_net(setting: Setting, data: Dataset) -> nn.Module:
    """A convolutional net for the pictures of a data set, as a setting says."""
    widths = (32, 64)
    if setting.reduction == "baseline":
        return _cnn(widths, data)
    reduction = "lean" if setting.reduction == "narrow" else setting.reduction
    example = data.train_x[:2].float()
    lean = leanify(_cnn(widths, data), example, channels=setting.channels, reduction=reduction)
    if setting.reduction != "narrow":
        return lean
    parts = [_cnn((part, 2 * part), data) for part in range(1, widths[0] + 1)]
    wanted = count_parameters(lean)
    return min(parts, key=lambda net: abs(count_parameters(net) - wanted))


def _cnn(widths: tuple[int, int], data: Dataset) -> nn.Module:
    _, channels, height, width = data.train_x.shape
    return nn.Sequential(
        *(nn.Conv2d(channels, widths[0], 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(widths[0], widths[1], 3, padding=1), nn.ReLU(), nn.Flatten()),
        nn.Linear(widths[1] * (height // 2) * (width // 2), data.classes),
    )


def read_rows(file: Path) -> list[Row]:
    """Read what :func:`write_rows` wrote.

    Raises:
        DataError: the file is not such a table.
    """
    kinds = {"str": str, "int": int, "float": float}
    fields = {field.name: kinds[str(field.type)] for field in dataclasses.fields(Row)}
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream, strict=True)
            table = list(reader)
        if reader.fieldnames != list(fields):
            raise ValueError(f"its columns are {reader.fieldnames}")
        return [Row(**{name: kind(line[name]) for name, kind in fields.items()}) for line in table]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(
            f"{file}: is not a table of this ablation ({error}); move it away to begin anew"
        ) from error


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """Write rows as CSV, whole or not at all.

    Raises:
        WriteError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Row)])
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    write_text(file, text.getvalue())
