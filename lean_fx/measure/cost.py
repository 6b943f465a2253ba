"""Cost that does not depend on a machine: parameters and multiply-adds (MACs)."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lean_fx.errors import ArgumentError


def count_parameters(model: nn.Module) -> int:
    """Count the elements of all parameters, trained or frozen; a shared one counts once.

    Example:
        >>> count_parameters(nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example_inputs: Tensor | tuple[Any, ...]) -> int:
    """Count the multiply-adds of one forward pass, in eval mode and without gradients.

    Convolutions, linear and recurrent layers, matrix products and attention are counted by
    :class:`torch.utils.flop_counter.FlopCounterMode` (two FLOPs are one multiply-add); biases,
    activations, normalisation and pooling count nothing, nor does any operator that the counter
    has no formula for (nn.Bilinear). A reduction, that is a submodule with
    an integer attribute ``macs_per_position``, counts ``macs_per_position`` for every position
    of its input in place of whatever the counter saw inside it, since most of its products are
    element-wise and invisible to the counter.

    The pass runs on a copy on the CPU: the model, its mode and its statistics stay as they are.

    Args:
        model: any module that ``copy.deepcopy`` can copy.
        example_inputs: the input, or the tuple of positional inputs. The count is of the whole
            batch and is not divided by anything: give a batch of 1 for the MACs of one sample.

    Returns:
        The multiply-adds of the pass, a whole number.

    Raises:
        ArgumentError: the model fails on these inputs.

    Example:
        >>> count_macs(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 5, 5))
        5400
        >>> 8 * 3 * 3 * 3 * 5 * 5
        5400
    """
    given = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    inputs = tuple(x.detach().clone().cpu() if isinstance(x, Tensor) else x for x in given)
    replica = copy.deepcopy(model).cpu().eval()
    counter = FlopCounterMode(display=False)
    correction = _CorrectReductions(replica, counter)
    try:
        with torch.no_grad(), _countable_kernels(), counter:
            replica(*inputs)
    except Exception as error:
        shapes = ", ".join(str(list(x.shape)) for x in inputs if isinstance(x, Tensor))
        raise ArgumentError(
            f"count_macs: {type(model).__name__} fails on inputs of shape {shapes} "
            f"({' '.join(str(error).split())}); give inputs that its forward takes"
        ) from error
    return counter.get_total_flops() // 2 + correction.macs


class _CorrectReductions:
    """Watch the reductions of a model; ``macs`` is what must be added to the counter's total."""

    def __init__(self, model: nn.Module, counter: FlopCounterMode) -> None:
        self.macs = 0
        self._counter = counter
        self._seen_before: list[int] = []
        for module in model.modules():
            if isinstance(getattr(module, "macs_per_position", None), int):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._seen_before.append(self._counter.get_total_flops())

    def _leave(self, module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        seen = (self._counter.get_total_flops() - self._seen_before.pop()) // 2
        positions = inputs[0].numel() // module.in_channels
        self.macs += module.macs_per_position * positions - seen


@contextlib.contextmanager
def _countable_kernels() -> Iterator[None]:
    """Switch off the fused kernels that the counter takes for no work at all.

    On the CPU these are oneDNN's LSTM, the fast path of nn.TransformerEncoderLayer and flash
    attention; the plain kernels in their place are matrix products, which are counted.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        with warnings.catch_warnings():
            # flags() reads and writes a TF32 switch too, which warns on machines without it.
            warnings.simplefilter("ignore")
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
