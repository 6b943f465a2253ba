"""ONNX files, and the files beside them for weights that do not fit into one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lean_fx.errors import require


def weights_beside(path: str | os.PathLike[str]) -> Path:
    """The file that holds the weights of an ONNX model if they do not fit into its own.

    Example:
        >>> weights_beside("net.onnx").name
        'net.onnx.data'
    """
    return Path(f"{os.fspath(path)}.data")


def weight_files(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """The files beside an ONNX file that hold its weights; leftovers of an older file do not count.

    Raises:
        MissingDependencyError: onnx is not installed.

    Example:
        >>> import lean_fx, tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "net.onnx"
        >>> exported = lean_fx.export_onnx(torch.nn.Linear(4, 2), path, torch.rand(2, 4))
        >>> weight_files(path)
        ()
    """
    onnx = require("onnx", purpose="reading ONNX files")
    model = onnx.load(os.fspath(path), load_external_data=False)
    return tuple(Path(path).parent / place for place in places_of_weights(model))


def places_of_weights(model: Any) -> list[str]:
    """The names of the files beside an ONNX model that hold weights of it."""
    external = require("onnx.external_data_helper", purpose="reading ONNX files")
    weights = filter(external.uses_external_data, model.graph.initializer)
    places = {external.ExternalDataInfo(weight).location for weight in weights}
    return sorted(places - {""})


def onnx_bytes(path: str | os.PathLike[str]) -> int:
    """The size of an ONNX file, with its weights beside it if there are any.

    Raises:
        MissingDependencyError: onnx is not installed.
    """
    return sum(file.stat().st_size for file in (Path(path), *weight_files(path)))
