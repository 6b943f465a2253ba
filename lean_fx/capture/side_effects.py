"""Effects of a forward that torch.fx does not record. A module that has one is not traced.

torch.fx records calls on values. It does not see that a forward

1. computes a value without a gradient (``torch.no_grad()``), defines another gradient with a
   ``torch.autograd.Function``, or recomputes the value during backward (checkpointing);
2. turns autocast on or off around a call, turns gradients on, or asks for either setting;
3. sets a seed, or draws random numbers that are not values of the graph: the graph would repeat
   the numbers drawn during the trace;
4. keeps state for later calls: it assigns a buffer, a tensor or its ``data``, counts
   (``self.step += 1``), or stores a value where a later call reads it: in an attribute, a list,
   dict or object, an attribute of its class, a global, or a closure variable.

A value that it computes from its inputs and stores for others, such as a loss for the trainer, is
state too. A cache is not: an attribute that is None at first, and then holds what follows only from
sizes and parameters.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, get_autocast_dtype, is_autocast_enabled, nn
from torch.fx import Node, Proxy
from torch.fx.proxy import TraceError
from torch.utils._python_dispatch import TorchDispatchMode

from lean_fx.graph.calls import META_ATTRIBUTES, META_METHODS, asks_for_meta
from lean_fx.graph.containers import refill
from lean_fx.graph.reachable import NUMBERS, Reachable, reachable_from

_ABSENT = object()
_ATTRIBUTE = re.compile(r"\w+")

# Attributes and methods whose result carries no gradient.
_WITHOUT_GRADIENT = (
    META_ATTRIBUTES
    | META_METHODS
    | {"detach", "argmax", "argmin", "isnan", "isinf", "isfinite", "bool", "long"}
    | {"eq", "ne", "lt", "le", "gt", "ge"}
)


class SideEffect(TraceError):  # noqa: N818
    """A forward has an effect that its graph would lose."""


def autocasting() -> tuple[Any, ...]:
    """The kinds of device for which autocast is on, each with its dtype."""
    kinds = [kind for kind in ("cpu", "cuda") if is_autocast_enabled(kind)]
    return tuple((kind, get_autocast_dtype(kind)) for kind in kinds)


def may_have_gradient(node: Node, root: nn.Module, known: set[Node]) -> bool:
    """Whether a gradient may flow from a node to an input or a parameter of the model.

    Args:
        node: the node.
        root: the model that is traced.
        known: the earlier nodes for which this is true.
    """
    if node.op == "placeholder":
        return True
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        return name in root.get_submodule(owner)._parameters
    reads = any(each in known for each in node.all_input_nodes)
    if node.op == "call_module":
        held = root.get_submodule(str(node.target)).parameters()
        return reads or next(held, None) is not None
    asked = node.args[1] if node.target is getattr else node.target
    name = asked if isinstance(asked, str) else getattr(asked, "__name__", "")
    return reads and name not in _WITHOUT_GRADIENT


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the calls in this thread with which torch draws random numbers.

    Calls that only compute the value of a node do not count. The state of torch's generator would
    not do: other threads change it too.
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
    """Restore the random generators of torch, Python and NumPy on exit."""
    state, ours = torch.default_generator.get_state(), random.getstate()
    initialised: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if initialised else []
    numpy = sys.modules.get("numpy")
    theirs = numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
        torch.cuda.set_rng_state_all(cuda)
        random.setstate(ours)
        if numpy:
            numpy.random.set_state(theirs)


@dataclass(frozen=True)
class StateSnapshot:
    """What a forward may change, recorded before it runs.

    Attributes:
        before: what the module can reach.
        draws: counts the random numbers that torch draws; None if an outer snapshot checks them.
        rng: the count before, and the states of the other generators.
    """

    before: Reachable
    draws: Draws | None
    rng: Any

    @classmethod
    def of(cls, module: nn.Module, draws: Draws | None) -> StateSnapshot:
        """Record what a module can reach."""
        return cls(Reachable.of(module), draws, (draws.count, rng_states()) if draws else None)

    def check(self) -> None:
        """Check, after the forward, that the module has stored nothing.

        Raises:
            SideEffect: it has.
        """
        after = Reachable.of(self.before.module)
        name, now = type(self.before.module).__name__, after.held
        for path, value in now.items():
            before = self.before.held.get(path, _ABSENT)
            if before is value and after.versions[path] == self.before.versions[path]:
                continue
            if before is value:
                raise SideEffect(f"{name} changes {path!r} in forward")
            attribute = _ATTRIBUTE.match(path)
            own = attribute is not None and attribute.end() == len(path)
            if before is _ABSENT and own:
                before = getattr(type(self.before.module), path, _ABSENT)
            if issubclass(type(value), Proxy):
                if isinstance(before, Tensor) or _depends_on_values(value.node):
                    raise SideEffect(f"{name} assigns {path!r} in forward")
            elif before is _ABSENT and own:  # every call stores the same
                continue
            elif before is _ABSENT or (type(before) in NUMBERS and before != value):
                raise SideEffect(f"{name} changes {path!r} in forward")
        for path in self.before.held.keys() - now.keys():
            if not any(each.startswith((f"{path}.", f"{path}[")) for each in now):
                raise SideEffect(f"{name} changes {path!r} in forward")
        if self.draws and self.rng != (self.draws.count, rng_states()):
            raise SideEffect(f"{name} draws random numbers that are not values of the graph")


def backup_state(module: nn.Module) -> Callable[[], None]:
    """Record what a module and its parts hold before a forward on proxies.

    Returns:
        A function that restores it.
    """
    kept = reachable_from(module)
    dicts = [held for each in module.modules() for held in (vars(each), each._modules)]
    copies = [(held, dict(held)) for held in dicts]

    def restore() -> None:
        for held, contents in copies:
            refill(held, contents)
        for each in kept:
            each.restore()

    return restore


def _depends_on_values(node: Node) -> bool:
    """Whether a node depends on the numbers of an input, not just on its size or type."""
    todo, seen = [node], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder":
            return True
        if not asks_for_meta(node):
            todo += node.all_input_nodes
    return False
