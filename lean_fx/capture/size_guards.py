"""Find the branches by which a captured graph rejects sizes that its model accepts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from lean_fx.capture.example_inputs import call_arguments, copied_inputs
from lean_fx.capture.guards import check_branch
from lean_fx.capture.side_effects import keeping_rng_state
from lean_fx.errors import BranchError
from lean_fx.graph.calls import modules_by_name
from lean_fx.graph.reachable import leaving_state
from lean_fx.graph.running import fake_errors_unlogged, fake_of, run_on, without_gradients


def refusing_modules(
    model: nn.Module, captured: GraphModule, inputs: Sequence[Any]
) -> dict[str, str]:
    """The modules whose branches reject other sizes in the graph, but not in the model.

    Both run on a single sample, on a larger batch, and on larger images or longer sequences. They
    run on fake tensors, which have sizes and no numbers, or on real ones if the model needs
    numbers.

    Args:
        model: what was captured.
        captured: its graph, which may check branches.
        inputs: the example inputs.

    Returns:
        For each module whose code holds a branch that fails first, the reason that its check gives.
        Empty if the model does not accept such inputs itself. The name of the model's class stands
        for the model.
    """
    refusing: dict[str, str] = {}
    run = _run if _succeeds(_run, model, inputs) else _run_real
    for sizes in _other_inputs(inputs):
        other = next((each for each in sizes if _succeeds(run, model, each)), None)
        try:
            if other is not None:
                run(captured, other)
        except BranchError as error:
            refusing |= _with_their_like(error.reason, model, captured)
        except Exception:  # nothing that another leaf would mend
            pass
    return refusing


def _with_their_like(text: str, model: nn.Module, captured: GraphModule) -> dict[str, str]:
    """The module whose branch an error names, and others of its class with the same branch."""
    checks = [node for node in captured.graph.nodes if node.target is check_branch]
    places = [str(node.args[2]) for node in checks]
    modules = modules_by_name(model)
    names = {name: code for name, _, code in (place.partition(" (") for place in places)}
    first = next((place.partition(" (")[0] for place in places if text.startswith(place)), "")
    return {
        name: text
        for name, code in names.items()
        if name == first
        or (code in text and first in modules and type(modules.get(name)) is type(modules[first]))
    }


def _succeeds(run: Any, module: nn.Module, inputs: Sequence[Any]) -> bool:
    try:
        run(module, inputs)
    except Exception:  # the model's own code may raise anything on other sizes
        return False
    return True


def _other_inputs(inputs: Sequence[Any]) -> Iterator[Iterator[list[Any]]]:
    """A single sample; a larger batch; and larger images or longer sequences, in several variants.

    Channels are on axis 1 or the last axis. Sizes grow by a half and one, since code that pads to
    whole frames branches on the remainder; or by a half.
    """
    yield iter([[_first(each) for each in inputs]])
    yield iter([[_larger(each, [0], 0) for each in inputs]])
    yield (
        [_larger(each, _axes_but(each, channels), more) for each in inputs]
        for more, channels in itertools.product((1, 0), (1, -1))
    )


def _axes_but(value: Any, channels: int) -> list[int]:
    dim = value.dim() if isinstance(value, Tensor) else 0
    numbers = dim > 1 and value.is_floating_point()  # integer tokens have no channels
    return [axis for axis in range(dim) if not numbers or axis != channels % dim]


def _first(value: Any) -> Any:
    return value[:1] if isinstance(value, Tensor) and value.dim() else value


def _larger(value: Any, axes: Sequence[int], more: int) -> Any:
    """A tensor that repeats a half, and ``more``, of its numbers along some axes."""
    if not isinstance(value, Tensor) or not value.dim():
        return value
    for axis in axes:
        size = value.shape[axis]
        added = min(size, size // 2 + (more if axis else 0))
        value = torch.cat([value, value.narrow(axis, 0, added)], axis)
    return value


def _run_real(module: nn.Module, inputs: Sequence[Any]) -> None:
    with leaving_state(module), keeping_rng_state():
        without_gradients(
            lambda: run_on(module, torch.clone, *call_arguments(module, copied_inputs(inputs)))
        )


def _run(module: nn.Module, inputs: Sequence[Any]) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: Tensor) -> Tensor:
        return fake_of(tensor, mode)

    given = [fake(each) if isinstance(each, Tensor) else each for each in inputs]
    with mode, fake_errors_unlogged():
        without_gradients(lambda: run_on(module, fake, *call_arguments(module, given)))
