"""Cost that does not depend on a machine: parameters and multiply-adds (MACs)."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lean_fx.checks import check_shapes
from lean_fx.copying import copied_whole
from lean_fx.errors import ArgumentError, one_line

_Model = TypeVar("_Model", bound=nn.Module)
_aten = torch.ops.aten

#: FLOPs of products that FlopCounterMode takes for none, by the shapes of their arguments.
_MORE_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten.mv: lambda matrix, vector, **_: 2 * math.prod(matrix),
    _aten.addmv: lambda added, matrix, vector, **_: 2 * math.prod(matrix),
    _aten.dot: lambda left, right, **_: 2 * math.prod(left),
    _aten.vdot: lambda left, right, **_: 2 * math.prod(left),
    _aten.addbmm: lambda added, left, right, **_: 2 * math.prod(left) * right[-1],
    _aten._trilinear: lambda left, weight, *_, **__: 2 * left[0] * math.prod(weight),
}

#: How the names begin of PyTorch's own operators whose products have no formula here.
_UNKNOWN = ("_fft", "_cdist", "cholesky", "triangular_solve", "lu_", "ormqr", "linalg_", "_linalg")


def count_parameters(model: nn.Module) -> int:
    """Count the elements of all parameters, trained or frozen; a shared one counts once.

    Example:
        >>> count_parameters(nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example_inputs: Tensor | tuple[Any, ...]) -> int:
    """Count the multiply-adds of one forward pass, in eval mode and without gradients.

    Convolutions, linear and recurrent layers, matrix products and attention are counted operator
    by operator, so that any model that runs can be counted; where torch.fx can capture it,
    :func:`lean_fx.costs_of` gives the same total by the formulas of its layers. Biases,
    activations, normalisation and pooling count nothing. A reduction, that is a submodule with
    an integer attribute ``macs_per_position``, counts ``macs_per_position`` for every position
    of its input in place of whatever the counter saw inside it, since most of its products are
    element-wise and invisible to the counter.

    The pass runs on a copy on the CPU (or on the meta device, if the model or an input is there):
    the model, its mode and its statistics stay as they are.

    Args:
        model: any module that ``copy.deepcopy`` can copy.
        example_inputs: the input, or the tuple of positional inputs. The count is of the whole
            batch and is not divided by anything: give a batch of 1 for the MACs of one sample.

    Returns:
        The multiply-adds of the pass, a whole number.

    Raises:
        ArgumentError: the model fails on these inputs, or has lazy layers without a shape.
        CaptureError: it cannot be copied.

    Example:
        >>> count_macs(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 5, 5))
        5400
        >>> 8 * 3 * 3 * 3 * 5 * 5
        5400
    """
    given = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    check_shapes(model)
    device = counting_device(model, given)
    inputs = tuple(x.detach().clone().to(device) if isinstance(x, Tensor) else x for x in given)
    replica = without_gradients(copied_whole(model)).to(device).eval()
    try:
        with counting() as counter:
            correction = _CorrectReductions(replica, counter)
            replica(*inputs)
    except Exception as error:
        shapes = ", ".join(str(list(x.shape)) for x in inputs if isinstance(x, Tensor))
        raise ArgumentError(
            f"count_macs: {type(model).__name__} fails on inputs of shape {shapes} "
            f"({one_line(error)}); give inputs that its forward takes"
        ) from error
    return counter.macs + correction.macs


def counting_device(model: nn.Module, inputs: Iterable[Any]) -> str:
    """Where a model is to run to be counted: the meta device, if a part of it is there already.

    Example:
        >>> counting_device(nn.Linear(3, 2), [torch.zeros(3, device="meta")])
        'meta'
    """
    given = (x for x in inputs if isinstance(x, Tensor))
    tensors = (*model.parameters(), *model.buffers(), *given)
    return "meta" if any(x.is_meta for x in tensors) else "cpu"


def without_gradients(model: _Model) -> _Model:
    """A model to be counted, whose parameters ask for no gradient from now on.

    FlopCounterMode hooks the gradient of every input of a module that asks for one, and fails on
    views of parameters, which ask for one but have none while gradients are off.

    Example:
        >>> without_gradients(nn.Linear(3, 2)).weight.requires_grad
        False
    """
    return model.requires_grad_(False)


class Counter:
    """What operators did since counting began.

    Attributes:
        foreign: names of the operators that may do products, of which nothing is known.
    """

    def __init__(self) -> None:
        self.flop_counter = FlopCounterMode(display=False, custom_mapping=_MORE_FORMULAS)
        self.foreign: list[str] = []

    @property
    def macs(self) -> int:
        """Multiply-adds; two FLOPs are one."""
        return self.flop_counter.get_total_flops() // 2


@contextlib.contextmanager
def counting() -> Iterator[Counter]:
    """Count the multiply-adds of every operator that runs, without gradients.

    This is :class:`torch.utils.flop_counter.FlopCounterMode`, with formulas for the products that
    it has none for (matrix by vector, bilinear), and without the fused kernels that it cannot see.

    Example:
        >>> with counting() as counter:
        ...     _ = torch.ones(2, 3) @ torch.ones(3)
        >>> counter.macs
        6
    """
    counter = Counter()
    with torch.no_grad(), _countable_kernels(), _Foreign(counter.foreign), counter.flop_counter:
        yield counter


class _Foreign(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operators that are not PyTorch's own, and those whose products have no formula."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = names

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.name().partition("::")[2]
        unknown = name.startswith(_UNKNOWN) and not name.startswith("linalg_vector_norm")
        if func.namespace not in ("aten", "prim") or unknown:
            self._names.append(func.name())
        return func(*args, **(kwargs or {}))


class _CorrectReductions:
    """Watch the reductions of a model; ``macs`` is what must be added to the counter's total."""

    def __init__(self, model: nn.Module, counter: Counter) -> None:
        self.macs = 0
        self._counter = counter
        self._seen_before: list[int] = []
        for module in model.modules():
            if isinstance(getattr(module, "macs_per_position", None), int):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._seen_before.append(self._counter.macs)

    def _leave(self, module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        seen = self._counter.macs - self._seen_before.pop()
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
