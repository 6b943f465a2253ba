"""State that a forward keeps for later calls. A module that keeps some is not traced.

A forward keeps state when it assigns a buffer, a tensor or its ``data``, counts
(``self.step += 1``), or stores a value where a later call reads it: in an attribute, a list, dict
or object, an attribute of its class, a global, or a closure variable.

A value that it computes from its inputs and stores for others, such as a loss for the trainer,
counts too. A cache does not: an attribute that is None at first, and then holds what follows from
sizes and parameters alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import Node, Proxy

from lean_fx.capture.side_effects import Draws, SideEffect, rng_states
from lean_fx.graph.calls import asks_for_meta
from lean_fx.graph.reachable import NUMBERS, Reachable, reachable_from, refill

_ABSENT = object()
_ATTRIBUTE = re.compile(r"\w+")


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


def keep(module: nn.Module) -> Callable[[], None]:
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
