"""What a forward does that no graph records, so that it is not traced but kept as it is.

torch.fx records calls on values. It does not see

1. that a value with a gradient is computed without one (``torch.no_grad()``), or that a
   ``torch.autograd.Function`` gives it another;
2. that autocast is turned on or off around a call;
3. random numbers that Python draws, or that torch draws for no value of the graph: the graph would
   hold those of the trace for ever;
4. that forward assigns its buffers or other tensors, or the ``data`` of one, or changes its numbers
   (``self.step += 1``), for later calls. What was None before is taken for a cache.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import utils
from torch.fx import Node, Proxy
from torch.fx.proxy import TraceError

_SIZES = ("shape", "dtype", "device", "ndim", "size", "dim")


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
    """Within it, no torch.autograd.Function takes a proxy: its own gradient would be lost.

    It would crash, too: torch takes what says that it is a tensor for one. All of them unwrap their
    arguments first, by this function of torch, even where a model holds a Function's ``apply``.

    Raises:
        SideEffect: one was about to.
    """
    unwrap = utils.unwrap_dead_wrappers

    def refuse(args: tuple[Any, ...]) -> Any:
        if any(issubclass(type(each), Proxy) for each in args):
            raise SideEffect("a torch.autograd.Function has a gradient of its own")
        return unwrap(args)

    utils.unwrap_dead_wrappers = refuse
    try:
        yield
    finally:
        utils.unwrap_dead_wrappers = unwrap


class KeepsData(Proxy):
    """A proxy to whose ``data`` nothing can be assigned."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            raise SideEffect(f"the data of {self.node.name} is assigned in forward")
        super().__setattr__(name, value)


@dataclass(frozen=True)
class StateSnapshot:
    """What a forward may change that no graph records, before it runs.

    Attributes:
        numbers: those that the module holds.
        tensors: the names of those that are neither its buffers nor its parameters.
        rng_states: of torch's generator of random numbers, and of Python's; or None, where the code
            around the module looks at them.
    """

    numbers: dict[str, Any]
    tensors: frozenset[str]
    rng_states: tuple[Tensor, Any] | None

    @classmethod
    def of(cls, module: nn.Module, *, rng_states: bool = True) -> StateSnapshot:
        """That of a module."""
        tensors = frozenset(key for key, held in vars(module).items() if isinstance(held, Tensor))
        return cls(_numbers(module), tensors, _rng_states() if rng_states else None)

    def check(self, module: nn.Module) -> None:
        """Check, after its forward, that it left all as it was.

        Raises:
            SideEffect: it did not.
        """
        name = type(module).__name__
        plain = ((key, vars(module)[key]) for key in self.tensors & vars(module).keys())
        for key, value in (*module._buffers.items(), *module._parameters.items(), *plain):
            if issubclass(type(value), Proxy):
                raise SideEffect(f"{name} assigns {key!r} in forward")
        now = _numbers(module)
        for key in self.numbers.keys() & now.keys():
            if self.numbers[key] != now[key]:
                raise SideEffect(f"{name} changes {key!r} in forward")
        if self.rng_states is None:
            return
        (drawn, others), (state, rest) = self.rng_states, _rng_states()
        with torch._C.DisableTorchFunction():
            same = torch.equal(drawn, state)
        if not same or others != rest:
            raise SideEffect(f"{name} draws random numbers that are no values of the graph")


def keep(module: nn.Module) -> Callable[[], None]:
    """Note what a module, and those in it, hold before a forward on proxies.

    Returns:
        What puts it back.
    """
    dicts = [
        held
        for each in module.modules()
        for held in (vars(each), each._buffers, each._parameters, each._modules)
    ]
    kept = [(held, dict(held)) for held in dicts]

    def restore() -> None:
        for held, before in kept:
            held.clear()
            held.update(before)

    return restore


def _numbers(module: nn.Module) -> dict[str, Any]:
    return {key: held for key, held in vars(module).items() if type(held) in (bool, int, float)}


def _rng_states() -> tuple[Tensor, Any]:
    numpy = sys.modules.get("numpy")
    state, place = numpy.random.get_state()[1:3] if numpy else (None, 0)
    drawn = None if state is None else state.tobytes()
    return torch.default_generator.get_state(), (random.getstate(), drawn, place)


@contextmanager
def keeping_rng_state() -> Iterator[None]:
    """Within it, random numbers may be drawn: their generators are put back in the end."""
    (state, _), ours = _rng_states(), random.getstate()
    numpy = sys.modules.get("numpy")
    theirs = numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
        random.setstate(ours)
        if numpy:
            numpy.random.set_state(theirs)
