"""What a checkpoint tells of its training, and when a training may go on from one.

The key ``lean_fx`` of ``last.ckpt`` holds what it was made with and the history, in plain types.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lean_fx.errors import ArgumentError, DataError
from lean_fx.measure.energy import Energy
from lean_fx.measure.report import Epoch


def pack(made_with: Mapping[str, Any], history: Sequence[Epoch]) -> dict[str, Any]:
    """Return what a checkpoint keeps under ``lean_fx``."""
    return {"made_with": dict(made_with), "history": [asdict(epoch) for epoch in history]}


def unpack_history(saved: Mapping[str, Any]) -> list[Epoch]:
    """Return the history that :func:`pack` put into a checkpoint."""
    history = saved["lean_fx"]["history"]
    return [Epoch(**{**epoch, "train": Energy(**epoch["train"])}) for epoch in history]


def read_checkpoint(last: Path, made_with: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Read a checkpoint, unless this training cannot go on from it.

    Args:
        last: the file.
        made_with: what this training is made with; further keys of the checkpoint are not
            compared.
        model: its weights must have the shapes of those in the checkpoint.

    Raises:
        ArgumentError: it was made otherwise, or of another model.
        DataError: it cannot be read.
    """
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
