"""Batches that a user gives, as the inputs of an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lean_fx.capture.example_inputs import as_inputs
from lean_fx.errors import ArgumentError, one_line


def gives_batches(data: Any) -> bool:
    """Whether data is an iterable of batches; the rows of a single tensor are not batches.

    Example:
        >>> gives_batches([torch.rand(2, 3)]), gives_batches(torch.rand(2, 3))
        (True, False)
    """
    try:
        iter(data)
    except TypeError:
        return False
    return not isinstance(data, torch.Tensor)


def arrays_by_name(subject: str, names: list[str], inputs: Any) -> dict[str, Any]:
    """The arrays of a batch by the names of a file's inputs.

    Args:
        subject: what the batches are for, for errors.
        names: of the inputs, in their order.
        inputs: a tensor, or a tuple or list of them.

    Raises:
        ArgumentError: they are none of these, or of another number.

    Example:
        >>> arrays_by_name("calibration", ["x"], torch.zeros(1, 2))["x"].shape
        (1, 2)
    """
    if not isinstance(inputs, torch.Tensor | tuple | list):
        raise ArgumentError(
            f"{subject}: a batch is a {type(inputs).__name__} object; give tensors, or tuples of "
            "them"
        )
    tensors = as_inputs(inputs)
    if len(tensors) != len(names):
        raise ArgumentError(
            f"{subject}: a batch has {len(tensors)} inputs and the model takes {len(names)}; give "
            "batches of its inputs"
        )
    arrays = (torch.as_tensor(each).detach().cpu().numpy() for each in tensors)
    return dict(zip(names, arrays, strict=True))


def first_output(subject: str, session: Any, path: Any, arrays: dict[str, Any]) -> torch.Tensor:
    """The first output of a file.

    Raises:
        ArgumentError: it does not take the inputs.
    """
    try:
        return torch.as_tensor(session.run(None, arrays)[0])
    except Exception as error:
        shapes = ", ".join(f"{array.dtype} {list(array.shape)}" for array in arrays.values())
        raise ArgumentError(
            f"{subject}: {Path(path).name} cannot run on {shapes} ({one_line(error)}); give "
            "batches of its inputs"
        ) from error
