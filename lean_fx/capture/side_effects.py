"""Effects of a forward that a graph does not record. A module that has one is not traced.

torch.fx records calls on values. It does not see that a forward

1. computes a value without a gradient (``torch.no_grad()``), or gives it another one by a
   ``torch.autograd.Function``, or recomputes it for the backward (gradient checkpointing);
2. turns autocast on or off around a call, or asks whether it or gradients are on;
3. draws random numbers in Python, or in torch for something other than a value of the graph: the
   graph would keep the numbers of the trace;
4. keeps state for later calls (:mod:`lean_fx.capture.state`).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._functorch import utils
from torch.fx import Node, Proxy
from torch.fx.proxy import TraceError
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

_SIZES = ("shape", "dtype", "device", "ndim", "size", "dim", "numel")
_QUESTIONS = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled")


class SideEffect(TraceError):  # noqa: N818
    """A forward does what a graph would lose."""


def autocasting() -> tuple[Any, ...]:
    """What autocast does now."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)


def has_gradient(
    node: Node, root: nn.Module, parameters: Mapping[str, nn.Parameter], known: set[Node]
) -> bool:
    """Whether parameters that learn have a part in a value.

    Args:
        node: what gives it.
        root: the model that is traced.
        parameters: those of the model, by name.
        known: the nodes before it of which this holds.
    """
    if node.op == "get_attr":
        parameter = parameters.get(str(node.target))
        return parameter is not None and parameter.requires_grad
    if node.op == "call_module":
        held = root.get_submodule(str(node.target)).parameters()
        if any(each.requires_grad for each in held):
            return True
    asked = node.args[1] if node.target is getattr else node.target
    return asked not in _SIZES and any(source in known for source in node.all_input_nodes)


@contextmanager
def refusing_functions() -> Iterator[None]:
    """Refuse, while a model is traced, the functions of torch whose effect a graph would lose.

    - A torch.autograd.Function on a proxy: its own gradient would be lost. (All of them unwrap
      their arguments first by one function of torch, even if a model calls ``apply`` by another
      name.)
    - Gradient checkpointing: the values that it drops would be kept.
    - Questions about gradients, inference mode and autocast: the answers would be frozen.

    Raises:
        SideEffect: a model's code calls one of them.
    """
    unwrap = utils.unwrap_dead_wrappers

    def refuse(args: tuple[Any, ...]) -> Any:
        if any(issubclass(type(each), Proxy) for each in args):
            raise SideEffect("a torch.autograd.Function has a gradient of its own")
        return unwrap(args)

    def checkpointing(*_: Any, **__: Any) -> Any:
        raise SideEffect("gradient checkpointing would be lost")

    def refused(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.partition(".")[0] not in ("torch", "lean_fx"):
                raise SideEffect(f"forward asks torch.{name}")
            return function(*args, **kwargs)

        return asked

    patches: list[tuple[Any, str, Any]] = [
        (utils, "unwrap_dead_wrappers", refuse),
        (checkpoint, "_checkpoint_without_reentrant_generator", checkpointing),
        *((torch, name, refused(name, getattr(torch, name))) for name in _QUESTIONS),
    ]
    before = [getattr(home, name) for home, name, _ in patches]
    try:
        for home, name, patched in patches:
            setattr(home, name, patched)
        yield
    finally:
        for (home, name, _), original in zip(patches, before, strict=True):
            setattr(home, name, original)


class KeepsData(Proxy):
    """A proxy to whose ``data`` nothing can be assigned."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            raise SideEffect(f"the data of {self.node.name} is assigned in forward")
        super().__setattr__(name, value)


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the random numbers that torch draws in this thread, but not those of its values.

    The state of torch's generator would tell of other threads, too.
    """

    count = 0

    def __init__(self, computing: Callable[[], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._computing = computing

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not self._computing():
            self.count += 1
        return func(*args, **(kwargs or {}))


def rng_states() -> Any:
    """The states of Python's and NumPy's generators of random numbers."""
    numpy = sys.modules.get("numpy")
    state, place = numpy.random.get_state()[1:3] if numpy else (None, 0)
    return random.getstate(), None if state is None else state.tobytes(), place


@contextmanager
def keeping_rng_state() -> Iterator[None]:
    """Within it, random numbers may be drawn: their generators are put back in the end."""
    state, ours = torch.default_generator.get_state(), random.getstate()
    numpy = sys.modules.get("numpy")
    theirs = numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
        random.setstate(ours)
        if numpy:
            numpy.random.set_state(theirs)
