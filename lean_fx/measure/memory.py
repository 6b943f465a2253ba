"""Measure the peak memory of work in PyTorch, by counting tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def peak_bytes(work: Callable[[], object], held: Iterable[torch.Tensor] = ()) -> int:
    """The most bytes of tensors that are alive at once while ``work`` runs.

    A storage counts from when an operator returns it until it is freed; ``held`` tensors, such as
    parameters, always count. Scratch memory within an operator does not, so the figure does not
    depend on the machine.

    Example:
        >>> peak_bytes(lambda: torch.zeros(250) + 1)
        2000
    """
    counter = _Counter()
    for tensor in held:
        counter.add(tensor)
    with counter:
        work()
    return counter.peak


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.live:
            self.live[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return result
