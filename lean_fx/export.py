"""From a module to an ONNX file."""

from __future__ import annotations

import copy
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lean_fx.capture import as_inputs
from lean_fx.errors import ArgumentError, ExportError, require
from lean_fx.files import replacing

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    opset: int | None = None,
) -> None:
    """Write a model to an ONNX file with a dynamic batch, in eval mode.

    Inputs are named ``input`` (or ``input_0``, ``input_1``, ...), likewise outputs; the first axis
    of each input is the batch. The model's own mode is restored. A file at ``path`` is replaced
    only when the new one is whole.

    Args:
        model: a module, such as leanify's result.
        path: where to write; its folder must exist.
        example_inputs: a tensor, or a tuple of the positional inputs, batch first. A batch of 1
            is doubled, since torch's exporter would freeze it.
        opset: the ONNX opset, or None for the exporter's own.

    Raises:
        ArgumentError: the inputs are neither a tensor nor a tuple, or one is no batch.
        ExportError: torch cannot export the model; says why.
        MissingDependencyError: onnx or onnxscript is not installed.
        WriteError: the path cannot be written.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "net.onnx"
        >>> export_onnx(nn.Linear(4, 2), path, torch.rand(2, 4))
        >>> path.exists()
        True
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"export_onnx: model={type(model).__name__} object is not a module")
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError(f"export_onnx: path={path!r} is no path; give the name of a file")
    if opset is not None and (type(opset) is not int or opset < 1):
        raise ArgumentError(f"export_onnx: opset={opset!r} is not an int of 1 or more")
    require("onnx", purpose="export")
    require("onnxscript", purpose="export")
    inputs = tuple(_batch(value) for value in as_inputs(example_inputs))
    if len({value.shape[0] for value in inputs}) > 1:
        sizes = ", ".join(str(value.shape[0]) for value in inputs)
        raise ArgumentError(f"example_inputs: batches of {sizes} differ; give one batch size")
    _check_runs(model, inputs)
    batch = torch.export.Dim("batch", min=1)
    with replacing(path) as part, _evaluating(model), _quiet():
        try:
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                opset_version=opset,
                input_names=_names("input", len(inputs)),
                dynamic_shapes=tuple({0: batch} for _ in inputs),
                verbose=False,
            )
        except Exception as error:
            reason = " ".join(_COLOURS.sub("", str(error)).split())[:300]
            raise ExportError(
                f"export_onnx: {type(model).__name__} cannot be exported "
                f"({type(error).__name__}: {reason}); try it with torch.onnx.export first"
            ) from error
        assert program is not None
        found = program.model.opset_imports.get("")
        if opset is not None and found != opset:
            raise ExportError(
                f"export_onnx: opset={opset} cannot be reached, the exporter gives {found}; leave "
                "opset out, or give that"
            )
        program.save(part)


def _batch(value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        raise ArgumentError(
            "example_inputs: an input is no tensor with a batch axis; give tensors, batch first"
        )
    return torch.cat([value, value]) if value.shape[0] == 1 else value


def _check_runs(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Run a copy once: the exporter's own word on inputs that do not fit is hard to read."""
    try:
        with torch.no_grad():
            copy.deepcopy(model).eval()(*inputs)
    except Exception as error:
        shapes = ", ".join(str(list(value.shape)) for value in inputs) or "none"
        reason = " ".join(str(error).split())
        raise ArgumentError(
            f"example_inputs: {type(model).__name__} cannot run on {shapes} ({reason}); give "
            "inputs of the shape and dtype that the model takes"
        ) from error


def _names(stem: str, count: int) -> list[str]:
    return [stem] if count == 1 else [f"{stem}_{index}" for index in range(count)]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on its own insides off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
