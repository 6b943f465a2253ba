"""The control of equal budget: the same model, narrower, as large or as fast as another."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from torch import Tensor, nn

from lean_fx.checks import check_choice
from lean_fx.errors import ArgumentError
from lean_fx.export.exporting import export_onnx
from lean_fx.measure.costs import count_macs, count_parameters
from lean_fx.measure.timing import time_onnx

#: Makes a model of a width in ]0, 1], with fresh weights; 1 is the whole.
MakeWidth: TypeAlias = Callable[[float], nn.Module]


def equal_budget(
    make: MakeWidth, inputs: Tensor, *, of: nn.Module, by: str = "parameters", steps: int = 10
) -> nn.Module:
    """Return the model of the width that comes nearest to the budget of another, by bisection.

    Args:
        make: gives the model of a width in ]0, 1]; a greater width must not give a smaller model.
        inputs: a batch for both; latency is that of its first sample, on one thread.
        of: the model whose budget it is.
        by: ``"parameters"``, ``"macs"`` or ``"latency"``. Each step of the last exports a model
            and times it in turn with the other; let nothing else run meanwhile.
        steps: of the bisection, 1 or more; each halves what is left of the widths.

    Returns:
        A fresh model; at most the whole, where that is below the budget.

    Raises:
        ArgumentError: the width changes nothing.
        LeanError: a model cannot be counted, exported or timed.

    Example:
        >>> def make(width: float) -> nn.Module:
        ...     return nn.Sequential(nn.Linear(8, round(100 * width)), nn.ReLU())
        >>> import torch
        >>> count_parameters(equal_budget(make, torch.rand(2, 8), of=nn.Linear(8, 50)))
        450
    """
    check_choice("equal_budget: by", by, ("parameters", "macs", "latency"))
    shares = _latency_share(of, inputs) if by == "latency" else _count_share(by, of, inputs)
    found: dict[float, float] = {}
    low, high = 0.0, 1.0
    with shares as share:
        found[1.0] = share(_made(make, 1.0))
        for _ in range(steps):
            middle = (low + high) / 2
            try:
                model = _made(make, middle)
            except (RuntimeError, ZeroDivisionError):
                low = middle  # too narrow to be built: no channels are left
                continue
            found[middle] = share(model)
            low, high = (middle, high) if found[middle] < 1 else (low, middle)
    if len(set(found.values())) == 1:
        raise ArgumentError(
            f"equal_budget: {by} of make(width) are the same for {len(found)} widths from "
            f"{min(found):.3g} to 1; give a factory whose width scales the channels"
        )
    return _made(make, min(found, key=lambda width: abs(found[width] - 1)))


def _made(make: MakeWidth, width: float) -> nn.Module:
    model = make(width)
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"make({width:.3g}) gives a {type(model).__name__}, which is not an nn.Module; return "
            "the model"
        )
    return model


@contextlib.contextmanager
def _latency_share(of: nn.Module, inputs: Tensor) -> Iterator[Callable[[nn.Module], float]]:
    """Yield a function that gives a model's latency as a share of another's, timed in turn."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in ("of", "own")}
        export_onnx(of, files["of"], inputs[:2])

        def share(model: nn.Module) -> float:
            export_onnx(model, files["own"], inputs[:2])
            times = time_onnx(files, inputs[:1].numpy())
            return times["own"].median_ms / times["of"].median_ms

        yield share


@contextlib.contextmanager
def _count_share(by: str, of: nn.Module, inputs: Tensor) -> Iterator[Callable[[nn.Module], float]]:
    """Yield a function that gives a model's parameters or multiply-adds as a share of another's."""

    def count(model: nn.Module) -> int:
        return count_parameters(model) if by == "parameters" else count_macs(model, inputs[:1])

    budget = count(of)
    yield lambda model: count(model) / budget
