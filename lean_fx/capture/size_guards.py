"""Whether a captured graph takes the sizes that its model takes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from lean_fx.capture.guards import check_branch
from lean_fx.errors import BranchError
from lean_fx.graph.clones import fake_of, run_on


def refusing_modules(
    model: nn.Module, captured: GraphModule, inputs: Sequence[Any]
) -> frozenset[str]:
    """The modules with a branch that refuses larger inputs in the graph, but not in the model.

    Both run on fake tensors, which have sizes and no numbers: batches, and pictures or sequences,
    larger by a half than the example inputs.

    Args:
        model: what was captured.
        captured: its graph, which may check branches.
        inputs: the example inputs.

    Returns:
        The names of those that have the first such branch in their code; none where the model does
        not take such inputs. The name of the model's class stands for the model itself.
    """
    larger = [_larger(value) if isinstance(value, Tensor) else value for value in inputs]
    try:
        _run(model, larger)
    except Exception:  # the model's own code may raise anything on other sizes
        return frozenset()
    try:
        _run(captured, larger)
    except BranchError as error:
        checks = [node for node in captured.graph.nodes if node.target is check_branch]
        places = [str(node.args[2]).partition(" (") for node in checks]
        return frozenset(name for name, *code in places if "".join(code) in str(error))
    except Exception:  # nothing that another leaf would mend
        pass
    return frozenset()


def _larger(value: Tensor) -> Tensor:
    """A value of half as many more samples, and positions: all axes but 1, or but the last."""
    last = value.dim() - 1 if value.is_floating_point() else value.dim()
    channels = 1 if value.dim() > 3 else last
    sizes = [
        size if axis == channels else size + size // 2 for axis, size in enumerate(value.shape)
    ]
    return value.new_empty(sizes)


def _run(module: nn.Module, inputs: Sequence[Any]) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    given = [fake_of(each, mode) if isinstance(each, Tensor) else each for each in inputs]
    with mode, torch.no_grad(), _quiet():
        run_on(module, lambda tensor: fake_of(tensor, mode), tuple(given))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's log of what fails on fake tensors off the terminal: here it may."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
