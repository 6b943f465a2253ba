"""Effects of a forward that torch.fx does not record. A module that has one is not traced.

torch.fx records calls on values. It does not see that a forward

1. computes a value without a gradient (``torch.no_grad()``), defines another gradient with a
   ``torch.autograd.Function``, or recomputes the value during backward (checkpointing);
2. turns autocast on or off around a call, turns gradients on, or asks for either setting;
3. sets a seed, or draws random numbers that are not values of the graph: the graph would repeat
   the numbers drawn during the trace;
4. keeps state for later calls (:mod:`lean_fx.capture.state`).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import Node, Proxy
from torch.fx.proxy import Attribute, TraceError
from torch.utils._python_dispatch import TorchDispatchMode

from lean_fx.capture.in_place import AugmentedAssignments
from lean_fx.graph.calls import META_ATTRIBUTES, META_METHODS

# Attributes and methods whose result carries no gradient.
_WITHOUT_GRADIENT = (
    META_ATTRIBUTES
    | META_METHODS
    | {"detach", "argmax", "argmin", "isnan", "isinf", "isfinite", "bool", "long"}
    | {"eq", "ne", "lt", "le", "gt", "ge"}
)
#: Attributes that tell whether a value has a gradient.
LEARNING = frozenset(("requires_grad", "is_leaf", "grad_fn"))


class SideEffect(TraceError):  # noqa: N818
    """A forward has an effect that its graph would lose."""


def autocasting() -> tuple[Any, ...]:
    """The kinds of device for which autocast is on, each with its dtype."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)


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


class UnknownKeyError(TraceError, TypeError):
    """A dictionary or set is asked for a value that the trace does not know."""


class KeepsData(AugmentedAssignments):
    """A proxy that refuses an assignment to ``data`` and questions about its gradient."""

    def __getattr__(self, k: str) -> Any:
        if k in LEARNING:
            raise SideEffect(f"forward asks for {k} of {self.node.name}")
        return KeyedAttribute(self, k)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            raise SideEffect(f"the data of {self.node.name} is assigned in forward")
        super().__setattr__(name, value)

    def __hash__(self) -> int:
        return _hash(self)

    def __str__(self) -> str:
        return _text(self)

    def __format__(self, spec: str) -> str:  # torch._assert formats messages that no one reads
        return super().__format__(spec) if spec else repr(self)


class KeyedAttribute(AugmentedAssignments, Attribute):
    """An attribute of a proxy, which may be a view, and refuses to be a key as the proxy does."""

    __hash__ = KeepsData.__hash__
    __str__ = KeepsData.__str__
    __format__ = KeepsData.__format__


def asked_by_model(depth: int) -> bool:
    """Whether a function was called by a model's code rather than by torch or this package.

    Args:
        depth: how many frames the call is above the caller of this function.
    """
    caller = sys._getframe(depth + 1).f_globals.get("__name__", "")
    return str(caller).partition(".")[0] not in ("torch", "lean_fx")


def _hash(proxy: Proxy) -> int:
    if not asked_by_model(2):
        return object.__hash__(proxy)
    raise UnknownKeyError(f"{proxy.node.name} is looked up, which example_inputs would allow")


def _text(proxy: Proxy) -> str:
    if not asked_by_model(2):
        return repr(proxy)
    raise TraceError(f"{proxy.node.name} is made a string, which example_inputs would allow")


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
