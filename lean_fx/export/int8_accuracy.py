"""What an INT8 twin of an ONNX file loses: how far its outputs are off, and its accuracy."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lean_fx.errors import ArgumentError, DataError, one_line, warn
from lean_fx.export.batches import arrays_by_name, first_output
from lean_fx.export.quantization import Int8Target
from lean_fx.export.sessions import open_session

#: The greatest mean difference of a twin from its file, as a fraction of the mean magnitude of the
#: file's outputs, that brings no warning.
INT8_BOUND = 0.1


def int8_difference(
    path: str | os.PathLike[str], twin: str | os.PathLike[str], batches: Iterable[Any]
) -> float:
    """How far a twin is from its file on this machine.

    Args:
        path: the file.
        twin: its INT8 twin.
        batches: one batch of inputs or more, each a tensor or a tuple of them.

    Returns:
        The mean difference of their floating-point outputs, as a fraction of the mean magnitude of
        the file's: the greatest of the outputs. 0 where there are none.

    Raises:
        ArgumentError: a batch does not fit the file.
    """
    sessions = [open_session(str(each), Path(each), threads=1) for each in (path, twin)]
    names = [value.name for value in sessions[0].get_inputs()]
    apart: dict[int, float] = defaultdict(float)
    size: dict[int, float] = defaultdict(float)
    for batch in batches:
        arrays = arrays_by_name("calibration", names, batch)
        outputs = (session.run(None, arrays) for session in sessions)
        for place, pair in enumerate(zip(*outputs, strict=True)):
            exact, rounded = map(torch.as_tensor, pair)
            if exact.is_floating_point():
                apart[place] += float((exact - rounded).abs().sum())
                size[place] += float(exact.abs().sum())
    return max((apart[place] / size[place] for place in apart if size[place]), default=0.0)


def check_int8(
    path: str | os.PathLike[str],
    twin: str | os.PathLike[str],
    batches: Iterable[Any],
    target: Int8Target,
) -> float:
    """Compare a twin with its file on this machine, and warn where it is too far off.

    Args:
        path: the file.
        twin: its INT8 twin.
        batches: inputs, as in :func:`int8_difference`.
        target: what the twin was made for.

    Returns:
        The difference.

    Warns:
        LeanWarning: it is above :data:`INT8_BOUND`.
    """
    apart = int8_difference(path, twin, batches)
    if not apart <= INT8_BOUND:
        remedy = (
            "this processor may saturate 8-bit weights: use int8_target='portable'"
            if target == "vnni"
            else "calibrate with more data, or use the float file"
        )
        warn(
            f"export_onnx: the INT8 twin differs from {Path(path).name} by {apart:.2g} of the mean "
            f"output on this machine, bound {INT8_BOUND:g}; {remedy}"
        )
    return apart


def accuracy_of(path: str | os.PathLike[str], evaluation: Iterable[Any]) -> float:
    """The part of samples whose greatest score is that of their label, in [0, 1].

    Args:
        path: an ONNX file whose first output are scores ``[N, classes]``.
        evaluation: batches ``(inputs, labels)``, such as a DataLoader gives; inputs a tensor or a
            tuple of them, labels whole numbers ``[N]``.

    Raises:
        DataError: there are no samples, or the file is not there.
        ArgumentError: a batch is not a pair of inputs and labels, or the file does not take its
            inputs, or there is no label for each row of scores.
    """
    session = open_session(str(path), Path(path), threads=max(1, torch.get_num_threads()))
    names = [value.name for value in session.get_inputs()]
    right = total = 0
    for batch in evaluation:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ArgumentError("evaluation: a batch is not a pair; give batches (inputs, labels)")
        arrays = arrays_by_name("evaluation", names, batch[0])
        scores = first_output("evaluation", session, path, arrays)
        try:
            labels = torch.as_tensor(batch[1])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(
                f"evaluation: labels are no numbers ({one_line(error)}); give whole numbers [N]"
            ) from error
        if scores.dim() != 2 or labels.shape != scores.shape[:1]:
            raise ArgumentError(
                f"evaluation: scores {list(scores.shape)} and labels {list(labels.shape)} do not "
                "fit; give a model whose first output is [N, classes] and labels [N]"
            )
        right += int((scores.argmax(1) == labels).sum())
        total += len(labels)
    if not total:
        raise DataError("evaluation: has no samples; give one batch or more")
    return right / total
