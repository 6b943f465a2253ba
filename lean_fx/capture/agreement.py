"""Check that a captured graph computes what its model computes.

Tracing cannot see everything that Python code does. So the model and the graph each run twice: on
the example inputs, and then on scaled ones. A value that the trace froze shows in the second run,
and so does an effect that it lost.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lean_fx.capture.example_inputs import call, copied_inputs
from lean_fx.capture.fed_by_hooks import is_users_hook
from lean_fx.capture.side_effects import keeping_rng_state
from lean_fx.cloning import clone
from lean_fx.errors import BranchError
from lean_fx.graph.calls import CALL_HOOKS
from lean_fx.graph.reachable import leaving_state
from lean_fx.graph.running import without_gradients

_SCALE = 0.7  # of the second inputs: they stay positive, or probabilities, if the first ones are
_TOLERANCE = 1e-3
_SEED = 0
#: The floating-point types that torch computes in; it only stores those of eight bits.
COMPUTED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def disagreement(model: nn.Module, captured: nn.Module, inputs: Sequence[Any]) -> str:
    """How a graph differs from its model, or an empty string if it does not.

    Copies run, without the user's hooks; globals and random generators are restored.

    Args:
        model: what was captured.
        captured: its graph, or a copy that should compute the same.
        inputs: the example inputs. If the model itself fails on them, nothing is compared.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> graph = torch.fx.symbolic_trace(model)
        >>> disagreement(model, graph, [torch.ones(1, 2)])
        ''
        >>> disagreement(nn.Sequential(nn.Linear(2, 2)), graph, [torch.ones(1, 2)])
        'its outputs differ'
    """
    wanted, found = (results(each, _variations(inputs)) for each in (model, captured))
    for number, (one, other) in enumerate(zip(wanted, found, strict=True)):
        if isinstance(one, Exception):
            return ""
        if isinstance(other, Exception):
            if number and isinstance(other, BranchError):
                return ""
            return f"it fails with {type(other).__name__}"
        if not _alike(one, other):
            return "its outputs differ"
    return ""


def _variations(inputs: Sequence[Any]) -> Sequence[Any]:
    def scaled(value: Tensor) -> Tensor:
        return value * _SCALE if value.dtype in COMPUTED else value

    return (inputs, pytree.tree_map_only(Tensor, scaled, list(inputs)))


def results(
    module: nn.Module, variations: Sequence[Any], *, training: bool | None = None
) -> list[Any]:
    """Call a copy of a module several times; return what each call returns or raises.

    Every call draws the same random numbers. The copy has no hooks of the user; globals and random
    generators are restored.

    Args:
        module: what to run; it stays as it is.
        variations: the inputs of each call.
        training: the mode of the copy and all its parts; None leaves each in its own.

    Raises:
        CaptureError: the module cannot be copied.
    """
    found: list[Any] = []
    with leaving_state(module), keeping_rng_state(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copied = _without_hooks(clone(module))
        if training is not None:
            copied.train(training)
        for given in variations:
            _seed()
            try:
                found.append(_called(copied, given))
            except Exception as error:  # the model's own code
                found.append(error)
    return found


def _called(module: nn.Module, given: Sequence[Any]) -> Any:
    """What a call returns, without the memory of its gradients."""
    found = without_gradients(lambda: call(module, copied_inputs(given)))
    return pytree.tree_map_only(Tensor, Tensor.detach, found)


def _seed() -> None:
    """Seed the generators in use; torch.manual_seed would take a millisecond without a GPU."""
    torch.default_generator.manual_seed(_SEED)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(_SEED)


def _without_hooks(module: nn.Module) -> nn.Module:
    """Remove the user's hooks, which may count or print."""
    for each in module.modules():
        for hooks in CALL_HOOKS:
            every = getattr(each, hooks).items()
            kept = OrderedDict((key, hook) for key, hook in every if not is_users_hook(hook))
            setattr(each, hooks, kept)
    return module


def _alike(one: Any, other: Any) -> bool:
    """Whether two outputs have the same types, and values that are close."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and _close(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and _alike(list(one.values()), list(other.values()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    return not isinstance(one, bool | int | float | str) or one == other


def _close(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.is_nested != other.is_nested:
        return False
    if one.layout is not torch.strided or one.is_nested:
        return True
    if one.shape != other.shape:
        return False
    if not one.numel():
        return True
    if not one.is_floating_point():
        return torch.equal(one, other)
    if one.dtype not in COMPUTED:
        one, other = one.float(), other.float()
    finite = one[one.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 1.0
    return torch.allclose(one, other, _TOLERANCE, _TOLERANCE * size + 1e-30, equal_nan=True)
