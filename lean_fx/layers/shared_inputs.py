"""A hook that computes a reduction once for all the layers that read the same value.

In a graph, several layers can read one node. In a model that keeps its class, each layer has a
forward pre-hook. The layers of a site have the same hook object, which keeps the last result until
all of them have read it::

    q, k, v = self.q(x), self.k(x), self.v(x)       q.reduction is k.reduction is v.reduction

Rules:

1. A layer gets the kept result only if it has not read it before, and only for the same tensor
   object, unchanged, in the same thread, with the reduction's parameters unchanged, and in the same
   train, grad and autocast modes. Otherwise it computes its own, which is slower but always right.
2. A result never leaves a region of activation checkpointing: the recomputation there must save the
   same tensors as the first run.
3. While torch.compile traces, each layer computes its own; the compiler merges equal results.
4. A copy of the model shares results among its own layers.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lean_fx.layers.input_hooks import Args, Kwargs, reduced, with_first


@dataclass
class _Result:
    value: weakref.ref[Tensor]
    state: tuple[Any, ...]
    reduced: Any
    readers: set[int] = field(default_factory=set)


class ReduceOnce:
    """The forward pre-hook of layers that hold one ``reduction`` and may read one value.

    Args:
        readers: how many layers there are.

    Example:
        >>> calls = []
        >>> reduction = nn.Identity()
        >>> _ = reduction.register_forward_hook(lambda *_: calls.append(1))
        >>> layers, hook = [nn.Linear(4, 2), nn.Linear(4, 3)], ReduceOnce(2)
        >>> for layer in layers:
        ...     layer.reduction = reduction
        ...     _ = layer.register_forward_pre_hook(hook, with_kwargs=True)
        >>> x = torch.rand(1, 4)
        >>> _ = [layer(x) for layer in layers]
        >>> len(calls)
        1
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self._thread = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles hold no result
        return ReduceOnce, (self.readers,)

    def __call__(
        self, layer: nn.Module, args: Args, kwargs: Kwargs | None = None
    ) -> tuple[Args, Kwargs]:
        """The layer's arguments, the first of them reduced."""
        return with_first(layer, args, kwargs, lambda value: self._reduced(layer, value))

    def _reduced(self, layer: nn.Module, value: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return reduced(layer, value)
        data = value.data if isinstance(value, PackedSequence) else value
        if not isinstance(data, Tensor):  # torch.fx traces
            return reduced(layer, value)
        last: _Result | None = getattr(self._thread, "last", None)
        state = _state(layer, data)
        if (
            last is None
            or last.value() is not data
            or last.state != state
            or id(layer) in last.readers
        ):
            last = _Result(weakref.ref(data), state, reduced(layer, value))
        last.readers.add(id(layer))
        self._thread.last = last if len(last.readers) < self.readers else None
        return last.reduced


def _state(layer: Any, value: Tensor) -> tuple[Any, ...]:
    """Everything that a reduction's result depends on besides the numbers of the value."""
    kind = value.device.type
    tensors = [value, *layer.reduction.parameters(), *layer.reduction.buffers()]
    return (
        layer.reduction.training,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch._C._autograd._top_saved_tensors_default_hooks(True),  # rule 2
        *((id(each), 0 if each.is_inference() else each._version) for each in tensors),
    )
