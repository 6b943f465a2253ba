"""Whether a captured graph takes the sizes that its model takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from lean_fx.errors import BranchError
from lean_fx.passes.base import shallow


def refusing_module(model: nn.Module, captured: GraphModule, inputs: Sequence[Any]) -> str:
    """The module whose branches refuse larger inputs in the graph, and take them in the model.

    Both run on fake tensors, which have sizes and no numbers: batches, and pictures or sequences,
    larger by a half than the example inputs.

    Args:
        model: what was captured.
        captured: its graph, which may check branches.
        inputs: the example inputs.

    Returns:
        Its name; that of the model's class for the model itself; "" if there is none, or if the
        model does not take such inputs.
    """
    larger = [_larger(value) if isinstance(value, Tensor) else value for value in inputs]
    try:
        _run(model, larger)
    except Exception:  # the model's own code may raise anything on other sizes
        return ""
    try:
        _run(captured, larger)
    except BranchError as error:
        return str(error).partition(" (")[0]
    except Exception:  # nothing that another leaf would mend
        return ""
    return ""


def _larger(value: Tensor) -> Tensor:
    """A value of half as many more samples, and positions: all axes but 1, or but the last."""
    channels = 1 if value.dim() > 3 else 2 if value.is_floating_point() else value.dim()
    sizes = [
        size if axis == channels else size + size // 2 for axis, size in enumerate(value.shape)
    ]
    return value.new_empty(sizes)


def _run(module: nn.Module, inputs: Sequence[Any]) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    fakes: dict[str, Tensor] = {name: mode.from_tensor(each) for name, each in state.items()}
    given = [mode.from_tensor(each) if isinstance(each, Tensor) else each for each in inputs]
    with mode, torch.no_grad():
        torch.func.functional_call(shallow(module), fakes, tuple(given))
