"""The controls of equal budget: the same model, narrower, as large or as fast as another."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from torch import Tensor, nn

from lean_fx.checks import check_choice, check_int
from lean_fx.errors import ArgumentError
from lean_fx.export.exporting import export_onnx
from lean_fx.measure.costs import count_macs, count_parameters
from lean_fx.measure.timing import time_onnx

#: Makes a model of a width in ]0, 1], with fresh weights; 1 is the whole.
MakeWidth: TypeAlias = Callable[[float], nn.Module]

# Raised by a model that is too narrow to be built: no channels are left.
_TOO_NARROW = (RuntimeError, ZeroDivisionError)


def equal_width(
    make: MakeWidth,
    inputs: Tensor,
    *,
    of: nn.Module,
    by: str = "parameters",
    steps: int | None = None,
) -> float:
    """Return the width at which a model has the budget of another.

    By parameters or multiply-adds it is the width of the nearest count. By latency it is the
    greatest that is no slower: some widths suit a runtime better than smaller ones, as ONNX
    Runtime's convolutions like multiples of 16 channels, and a fair control has such a width.

    Args:
        make: gives the model of a width in ]0, 1]; a greater width must not give a smaller model.
        inputs: a batch for both; latency is that of its first sample, on one thread.
        of: the model whose budget it is.
        by: ``"parameters"``, ``"macs"`` or ``"latency"``.
        steps: how finely widths are tried, 1 or more. Counts are found by a bisection of so many
            steps, 10 if it is left out. By latency, multiples of ``1 / steps`` are tried from 1
            down, 50 if it is left out; each exports a model and times it in turn with the other,
            so let nothing else run meanwhile.

    Returns:
        A width in ]0, 1]; 1 where the whole is below the budget. By latency the fastest, where none
        is fast enough.

    Raises:
        ArgumentError: the width changes nothing, or an argument is out of its range.
        LeanError: a model cannot be counted, exported or timed.

    Example:
        >>> import torch
        >>> def make(width: float) -> nn.Module:
        ...     return nn.Linear(8, round(100 * width))
        >>> equal_width(make, torch.rand(2, 8), of=nn.Linear(8, 50))
        0.5
    """
    check_choice("equal_width: by", by, ("parameters", "macs", "latency"))
    if steps is not None:
        check_int("equal_width: steps", steps, 1)
    if by == "latency":
        return _as_fast(make, inputs, of, steps or 50)
    return _as_large(make, inputs, of, by, steps or 10)


def equal_budget(
    make: MakeWidth,
    inputs: Tensor,
    *,
    of: nn.Module,
    by: str = "parameters",
    steps: int | None = None,
) -> nn.Module:
    """Return a fresh model of the :func:`equal_width`; arguments and errors are those.

    Example:
        >>> def make(width: float) -> nn.Module:
        ...     return nn.Sequential(nn.Linear(8, round(100 * width)), nn.ReLU())
        >>> import torch
        >>> count_parameters(equal_budget(make, torch.rand(2, 8), of=nn.Linear(8, 50)))
        450
    """
    return _made(make, equal_width(make, inputs, of=of, by=by, steps=steps))


def _as_large(make: MakeWidth, inputs: Tensor, of: nn.Module, by: str, steps: int) -> float:
    """The width of the nearest count, by bisection."""

    def count(model: nn.Module) -> int:
        return count_parameters(model) if by == "parameters" else count_macs(model, inputs[:1])

    budget = count(of)
    found = {1.0: count(_made(make, 1.0))}
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        try:
            found[middle] = count(_made(make, middle))
        except _TOO_NARROW:
            low = middle
            continue
        low, high = (middle, high) if found[middle] < budget else (low, middle)
    _check_changes(by, found)
    return min(found, key=lambda width: abs(found[width] - budget))


def _as_fast(make: MakeWidth, inputs: Tensor, of: nn.Module, steps: int) -> float:
    """The greatest width that is no slower, from the whole down."""
    counts: dict[float, int] = {}
    shares: dict[float, float] = {}
    with _latency_share(of, inputs) as share:
        for step in range(steps, 0, -1):
            width = step / steps
            try:
                model = _made(make, width)
            except _TOO_NARROW:
                if not shares:  # the whole cannot be built
                    raise
                break
            count = count_parameters(model)
            known = count in counts.values()
            counts[width] = count
            if known:  # the same model, as widths are rounded
                continue
            shares[width] = share(model)
            if shares[width] <= 1:
                return width
    _check_changes("parameters", counts)
    return min(shares, key=lambda width: shares[width])


def _check_changes(what: str, found: Mapping[float, int]) -> None:
    if len(set(found.values())) == 1:
        raise ArgumentError(
            f"equal_width: {what} of make(width) are the same for {len(found)} widths from "
            f"{min(found):.3g} to 1; give a factory whose width scales the channels"
        )


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
