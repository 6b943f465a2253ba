"""Compiled kernels for the reductions of a model, the rest of which stays as it is."""

from __future__ import annotations

from typing import Any

from torch import nn

from lean_fx.errors import ArgumentError
from lean_fx.reduction.lean import LeanReduction


def compile_reductions(model: nn.Module, **options: Any) -> nn.Module:
    """Let torch.compile make a kernel of each LEAN reduction, forward and backward.

    In eager PyTorch each formula of :mod:`lean_fx.reduction.functional` is a pass over memory; a
    compiler fuses them. The first call takes seconds for every reduction, and again for a new size.
    The values equal the eager ones up to rounding. If ``torch.compile`` takes the whole model, this
    function is not needed.

    Args:
        model: with one LeanReduction or more. They are compiled in place, as by
            ``torch.nn.Module.compile``: copies, pickles and ONNX files of it do not know.
        options: of ``torch.compile``, such as ``backend`` or ``dynamic``.

    Returns:
        The model itself.

    Raises:
        ArgumentError: the model has no LeanReduction, or is not a module.

    Example:
        >>> import torch, lean_fx
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> lean = compile_reductions(lean_fx.leanify(net, torch.rand(5, 8)))
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise ArgumentError(f"compile_reductions: model={kind} object is not a module")
    found = [module for module in model.modules() if isinstance(module, LeanReduction)]
    if not found:
        raise ArgumentError(
            f"compile_reductions: model={type(model).__name__} has no LeanReduction; give what "
            "leanify makes"
        )
    # Torch caches eight compiled forms of a function. All reductions share one function, so each
    # gets a cache of its own.
    options.setdefault("isolate_recompiles", True)
    for reduction in found:
        reduction.compile(**options)
    return model
