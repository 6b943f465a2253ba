"""Modules that are exported together, since one export takes as long as many small modules do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import lean_fx


class SideBySide(nn.Module):
    """Each module reads an input of its own."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [part(x) for part, x in zip(self.parts, inputs, strict=True)]


def drawn(kind: type[nn.Module], *arguments: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A reduction whose every parameter is drawn: the initial ones hide terms."""
    module = kind(*arguments).to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def export_side_by_side(
    modules: Sequence[nn.Module], inputs: Sequence[Tensor], path: Path, tolerance: float | None
) -> None:
    """Write one file for all; export_onnx compares each of its outputs."""
    lean_fx.export_onnx(SideBySide(modules), path, ([*inputs],), tolerance=tolerance)


def run_side_by_side(
    session: onnxruntime.InferenceSession, inputs: Sequence[Tensor]
) -> list[Tensor]:
    names = [each.name for each in session.get_inputs()]
    given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(found) for found in session.run(None, given)]


def check_side_by_side(
    modules: Sequence[nn.Module], inputs: Sequence[Tensor], path: Path, atol: float = 1e-5
) -> None:
    """Check reductions in ONNX Runtime: their numbers, and that zeros give zeros."""
    for x in inputs:
        x[1] = 0
    export_side_by_side(modules, inputs, path, tolerance=1e-5)
    session = onnxruntime.InferenceSession(path)
    for module, x, y in zip(modules, inputs, run_side_by_side(session, inputs), strict=True):
        np.testing.assert_allclose(y, module(x).detach(), 1e-4, atol, err_msg=str(module))
        assert (y[1] == 0).all()
