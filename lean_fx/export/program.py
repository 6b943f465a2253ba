"""Make torch's ONNX program of a module, for :mod:`lean_fx.export.exporting` to write."""

from __future__ import annotations

import re
import warnings
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lean_fx.capture.guards import counting_items
from lean_fx.errors import ExportError, quiet_loggers
from lean_fx.export.inputs import Axes
from lean_fx.export.nodes import define_functions
from lean_fx.export.pooling import PoolsAnyLength
from lean_fx.export.recurrent import with_onnx_operators
from lean_fx.graph.model_code import globals_of
from lean_fx.graph.patching import patching
from lean_fx.reduction.onnx_nodes import as_onnx_nodes

#: The error for models that take or make packed sequences.
PACKED = (
    "ONNX has no packed sequences; give the recurrent layers padded tensors, batch and length as "
    "they are"
)

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def exported_program(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], axes: Axes, opset: int | None
) -> torch.onnx.ONNXProgram:
    """Let torch's exporter make an ONNX program whose reductions are LEAN nodes with a function.

    Args:
        model: in eval mode.
        inputs: example inputs.
        axes: for each input, the names of the axes that may have any size.
        opset: as in :func:`~lean_fx.export_onnx`.

    Raises:
        ExportError: torch cannot export it; the message says why.
    """
    # Names, not Dims: those promise every size from 1 on, and many nets need larger ones.
    shapes = axes if any(axes) else None
    try:
        # The code of a module that is not a graph may call len() on its batch.
        sizes = counting_items(globals_of(model.modules()))
        with _quiet(), as_onnx_nodes(), PoolsAnyLength(), patching(sizes):
            program = torch.onnx.export(
                with_onnx_operators(model),
                tuple(value.clone() for value in inputs),
                dynamo=True,
                opset_version=opset,
                input_names=_names("input", len(inputs), model.state_dict()),
                dynamic_shapes=shapes,
                verbose=False,
            )
    except Exception as error:
        cause: BaseException = error  # the exporter's own message is about itself
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if "PackedSequence" in str(cause):
            raise ExportError(f"export_onnx: {type(model).__name__}: {PACKED}") from error
        reason = " ".join(_COLOURS.sub("", str(cause)).split())[:300]
        raise ExportError(
            f"export_onnx: {type(model).__name__} cannot be exported "
            f"({type(cause).__name__}: {reason}); try it with torch.onnx.export first"
        ) from error
    assert program is not None
    found = program.model.opset_imports.get("")
    if opset is not None and found != opset:
        raise ExportError(
            f"export_onnx: opset={opset} cannot be reached, the exporter gives {found}; leave "
            "opset out, or give that"
        )
    define_functions(program.model)
    _name_apart(program.model)
    return program


def _name_apart(model: Any) -> None:
    """Rename an output to which the exporter gave the name of the input that it copies."""
    taken = {value.name for value in model.graph.inputs}
    for index, value in enumerate(model.graph.outputs):
        if value.name in taken:
            value.name = f"output_{index}"


def _names(stem: str, count: int, taken: Container[str]) -> list[str]:
    while stem in taken:
        stem += "_"
    return [stem] if count == 1 else [f"{stem}_{index}" for index in range(count)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's remarks on its internals."""
    with quiet_loggers("torch.onnx", "onnxscript", "onnx_ir"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)
        yield
