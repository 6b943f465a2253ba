"""Count the multiply-adds (MACs) of the operators that run, with PyTorch's own counter.

One multiply-add is one product that is summed into a result. Biases, activations, gates,
normalisation, softmax, pooling and element-wise arithmetic count nothing. The counter is
:class:`torch.utils.flop_counter.FlopCounterMode`, with three changes:

1. It has formulas for more operators: matrix by vector, bilinear, sparse by dense.
2. The fused kernels that it cannot see are switched off.
3. A reduction counts its own ``macs_per_position`` at every position of its input, in place of the
   operators inside it: most of its products are element-wise.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lean_fx.locks import SHARED_STATE

_aten = torch.ops.aten


def _sparse_by_dense(added: Tensor, sparse: Tensor, dense: Tensor, **_: Any) -> int:
    """FLOPs: each stored element multiplies a row of the other matrix."""
    return 2 * sparse._nnz() * dense.shape[-1]


_sparse_by_dense._get_raw = True  # type: ignore[attr-defined]  # it takes tensors, not shapes

#: FLOPs of operators that FlopCounterMode has no formula for, by the shapes of their arguments.
_MORE_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten.mv: lambda matrix, vector, **_: 2 * math.prod(matrix),
    _aten.addmv: lambda added, matrix, vector, **_: 2 * math.prod(matrix),
    _aten.dot: lambda left, right, **_: 2 * math.prod(left),
    _aten.vdot: lambda left, right, **_: 2 * math.prod(left),
    _aten.addbmm: lambda added, left, right, **_: 2 * math.prod(left) * right[-1],
    _aten._trilinear: lambda left, weight, *_, **__: 2 * left[0] * math.prod(weight),
    _aten._sparse_addmm: _sparse_by_dense,
}

#: Prefixes of PyTorch's operators that multiply but have no formula.
_UNKNOWN = ("_fft", "_cdist", "cholesky", "triangular_solve", "lu_", "ormqr", "linalg_", "_linalg")


class Counter:
    """The work of the operators since counting began.

    Attributes:
        foreign: names of the operators whose products, if they do any, are not counted.
    """

    def __init__(self) -> None:
        self.flop_counter = FlopCounterMode(display=False, custom_mapping=_MORE_FORMULAS)
        self.foreign: list[str] = []
        self._correction = 0
        self._before: list[int] = []

    @property
    def macs(self) -> int:
        """Multiply-adds; two FLOPs are one."""
        return self.flop_counter.get_total_flops() // 2 + self._correction

    def watch_reductions(self, model: nn.Module) -> None:
        """Hook the reductions of a model, so that each counts by its own formula."""
        for module in model.modules():
            if has_mac_count(module):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave, with_kwargs=True)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._before.append(self.macs)

    def _leave(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        x = next(iter((*args, *kwargs.values())))
        positions = x.numel() // int(module.in_channels)
        seen = self.macs - self._before.pop()
        self._correction += int(module.macs_per_position) * positions - seen


def has_mac_count(module: nn.Module | None) -> bool:
    """Whether a module has the multiply-adds of one position as an attribute, as reductions do.

    Example:
        >>> has_mac_count(nn.Linear(3, 2))
        False
    """
    return isinstance(getattr(module, "macs_per_position", None), int)


@contextlib.contextmanager
def counting() -> Iterator[Counter]:
    """Count the multiply-adds of every operator that runs, without gradients.

    Example:
        >>> with counting() as counter:
        ...     _ = torch.ones(2, 3) @ torch.ones(3)
        >>> counter.macs
        6
    """
    counter = Counter()
    with (
        SHARED_STATE,  # the switches are the process's
        torch.no_grad(),
        _countable_kernels(),
        _Foreign(counter.foreign),
        counter.flop_counter,
    ):
        yield counter


class _Foreign(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operators that are not PyTorch's own, and those that have no formula."""

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


@contextlib.contextmanager
def _countable_kernels() -> Iterator[None]:
    """Switch off the fused kernels, which the counter counts as nothing.

    On the CPU these are oneDNN's LSTM, the fast path of nn.TransformerEncoderLayer and flash
    attention. The plain kernels in their place are matrix products, which are counted.
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
