"""A forward pass and a training step of a model in PyTorch, for timing and metering."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lean_fx.measure.timing import Latency, time_in_turn


def forward_pass(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """A call of the model without gradients, on fresh copies of the inputs."""

    def call() -> object:
        with torch.no_grad():
            return model(*(value.clone() for value in inputs))

    return call


def training_step(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """A call that trains the model: forward, the mean square of the outputs, backward, SGD."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-6) if parameters else None

    def step() -> None:
        outputs = [
            x
            for x in pytree.tree_leaves(model(*(value.clone() for value in inputs)))
            if isinstance(x, Tensor)
        ]
        loss = torch.stack([x.float().square().mean() for x in outputs]).sum()
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return step


def time_eager(
    models: Mapping[str, nn.Module], inputs: tuple[Tensor, ...], *, threads: int, rounds: int
) -> tuple[dict[str, Latency], dict[str, Latency]]:
    """Time a forward pass, and a training step, of each model, all models in turn.

    Args:
        models: by name, in eval mode; they are not changed.
        inputs: the positional inputs, batch first.
        threads: of PyTorch, 1 or more; put back afterwards.
        rounds: samples of each time, 2 or more.

    Returns:
        The times of the forward passes and those of the training steps, by name.
    """
    forwards = {name: forward_pass(model, inputs) for name, model in models.items()}
    steps = {
        name: training_step(copy.deepcopy(model).train(), inputs) for name, model in models.items()
    }
    with using_threads(threads):
        forward = time_in_turn(forwards, rounds=rounds)
        step = time_in_turn(steps, rounds=rounds)
    batch = next(value.shape[0] for value in inputs if value.dim())
    return (
        {name: Latency(samples, batch, threads) for name, samples in forward.items()},
        {name: Latency(samples, batch, threads) for name, samples in step.items()},
    )


@contextlib.contextmanager
def using_threads(threads: int) -> Iterator[None]:
    """Let PyTorch compute with a number of threads.

    Example:
        >>> with using_threads(1):
        ...     torch.get_num_threads()
        1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
