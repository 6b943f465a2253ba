"""Each model's own learning rate, chosen on a part of the train split that is held out."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from lean_fx.errors import ArgumentError
from lean_fx.experiment.datasets import Dataset
from lean_fx.experiment.training import Settings, train


def choose_rate(
    model: nn.Module,
    data: Dataset,
    settings: Settings,
    rates: Sequence[float],
    folder: Path,
    name: str = "",
) -> float:
    """Train copies of a model, each at another rate, on four fifths of the train split.

    A rate that suits one model may not suit another: literal LEAN needs a larger one than the net
    that it was made from.

    Args:
        model: with its first weights; it stays as it is.
        data: its test split is not looked at.
        settings: of the training, all but the rate.
        rates: to choose from.
        folder: where each copy has a folder of its own to go on from.
        name: shown beside the progress bar.

    Returns:
        The rate whose copy is the most accurate on the fifth that is held out, after the last
        epoch; of several the smallest.

    Raises:
        ArgumentError: there is no rate, or one lies outside ]0, 1].
        LeanError: see :func:`~lean_fx.experiment.training.train`.

    Example::

        rate = choose_rate(PaperNet(), digits(), Settings(), (1e-3, 3e-3, 1e-2), Path("runs/rates"))
    """
    if not rates:
        raise ArgumentError("choose_rate: rates is empty; give one or more, such as 1e-3, 1e-2")
    every = [dataclasses.replace(settings, learning_rate=rate) for rate in sorted(rates)]
    held_out = data.held_out()
    accuracies = {}
    for each in every:
        rate = each.learning_rate
        shown = f"{name}, rate {rate:g}"
        history = train(copy.deepcopy(model), held_out, each, folder / f"rate-{rate:g}", name=shown)
        accuracies[rate] = history[-1].test_accuracy
    return max(accuracies, key=accuracies.__getitem__)
