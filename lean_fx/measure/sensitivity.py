"""How far a model amplifies small changes of its inputs.

A net trains badly if a negligible change of its inputs moves its outputs far: its gradients are as
large. Many literal LEAN reductions in a row do that, because each divides by small numbers
(:mod:`lean_fx.reduction.functional`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lean_fx.capture.agreement import COMPUTED, results
from lean_fx.capture.example_inputs import as_inputs
from lean_fx.checks import check_positive
from lean_fx.errors import ArgumentError, CaptureError, one_line_with_type, warn
from lean_fx.locks import SHARED_STATE
from lean_fx.model_checks import first_without_values
from lean_fx.planning.plans import Plan

_NOISE = 1e-3
#: Warn if the reduced model is at least this many times as sensitive as the original.
_MUCH = 10


def sensitivity(model: nn.Module, example_inputs: Any, *, noise: float = _NOISE) -> float:
    """How far noise on the inputs of a model moves its outputs, in training mode.

    A copy runs twice: on the inputs, and on the same with normal noise of ``noise`` times their
    root mean square. The outputs' change is divided by their own deviations from the mean of the
    batch, and by ``noise``. A net that trains well has a few times 1. Both runs draw the same
    random numbers, so that dropout does not count.

    Args:
        model: any module; it stays as it is.
        example_inputs: as :func:`~lean_fx.leanify` takes them, floating-point ones among them; a
            batch of two or more.
        noise: above 0, and small.

    Returns:
        The relative change of the outputs over that of the inputs; 0 or more. It is infinite if
        only the changed outputs deviate from their mean.

    Raises:
        ArgumentError: no input is floating-point, no output is, or the model fails on the inputs.
        CaptureError: the model cannot be copied.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> 0.9 < sensitivity(nn.Linear(16, 16), torch.randn(64, 16)) < 1.1
        True
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"sensitivity: model={type(model).__name__} object is not a module")
    check_positive("sensitivity: noise", noise, "give 1e-3, say")
    inputs = as_inputs(example_inputs, model)
    if not any(_is_numbers(each) for each in pytree.tree_leaves(inputs)):
        raise ArgumentError(
            "sensitivity: no example input is floating-point, so noise has no place; give one"
        )
    if first_without_values(model):
        raise ArgumentError("sensitivity: the model is on the meta device; give it numbers")
    with SHARED_STATE:
        found = results(model, [inputs, _noisy(inputs, noise)], training=True)
    for each in found:
        if isinstance(each, Exception):
            reason = one_line_with_type(each, 200)
            raise ArgumentError(f"sensitivity: {type(model).__name__} fails in training ({reason})")
    before, after = ([y for y in pytree.tree_leaves(each) if _is_numbers(y)] for each in found)
    if not before or [each.shape for each in before] != [each.shape for each in after]:
        raise ArgumentError(
            f"sensitivity: {type(model).__name__} gives no tensors of numbers to compare"
        )
    pairs = list(zip(before, after, strict=True))
    moved = math.sqrt(sum(_square(_centred(new - old)) for old, new in pairs))
    size = math.sqrt(sum(_square(_centred(old)) for old in before))
    if moved == 0:
        return 0.0
    return moved / size / noise if size else math.inf


def with_sensitivity(plan: Plan, model: nn.Module, lean: nn.Module, inputs: Any) -> Plan:
    """Add both sensitivities to a plan, if they can be measured; warn if the result has far more.

    Args:
        plan: what made ``lean`` from ``model``.
        model: the original.
        lean: the result.
        inputs: the example inputs, or None.
    """
    if inputs is None or not plan.sites:
        return plan
    try:
        before, after = (sensitivity(each, inputs) for each in (model, lean))
    except (ArgumentError, CaptureError):  # there is nothing to measure, or no copy
        return plan
    if not (math.isfinite(before) and math.isfinite(after)):
        return plan
    if after >= _MUCH * before > 0:
        remedy = "reduction='lean_damped' does not amplify noise"
        if plan.reduction == "lean_damped":
            remedy = "give more channels, or more example inputs if these are few"
        warn(
            f"{plan.model}: noise on its inputs moves the outputs of the reduced model "
            f"{after / before:.0f} times as far as its own, so it may train badly; {remedy}"
        )
    return dataclasses.replace(plan, sensitivity=(before, after))


def _is_numbers(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_nested:
        return False
    return value.dtype in COMPUTED and value.numel() > 0


def _noisy(inputs: Sequence[Any], noise: float) -> Any:
    """The inputs with the same noise each time."""
    numbers = torch.Generator().manual_seed(0)

    def moved(value: Any) -> Any:
        if not _is_numbers(value):
            return value
        added = torch.randn(value.shape, generator=numbers).to(value)
        return value + noise * value.square().mean().sqrt() * added

    return pytree.tree_map_only(Tensor, moved, list(inputs))


def _centred(value: Tensor) -> Tensor:
    return value - value.mean(0) if value.dim() and value.shape[0] > 1 else value


def _square(value: Tensor) -> float:
    return float(value.double().square().sum())
