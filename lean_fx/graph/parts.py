"""Stand-ins for the modules that capture has traced into.

The graph calls their layers itself. torch.fx would leave an empty module that holds the layers. A
stand-in shows what the module was:

1. A Sequential, ModuleList or ModuleDict keeps its class, order, indexing and length.
2. Numbers, strings and the like can be read. Assigning another value to one that forward has read
   raises: it would change nothing.
3. Its hooks never run, its forward cannot be called, and its other attributes are missing; an
   error or a warning says so.
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lean_fx.cloning import MODULE_ATTRIBUTES
from lean_fx.errors import CaptureError, warn

#: Stands for an attribute that forward asks for and a module does not have.
NO_ATTRIBUTE = inspect.Parameter.empty  # it is the same in another process
#: Stands for an object of the user's own that forward reads.
OBJECT = object
_KNOWN = {NO_ATTRIBUTE: "missing", OBJECT: "another object"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_OF_ANY = frozenset(dir(nn.Module))
_REMEDY = "leanify(model, inputs, form='module') keeps the class"


@dataclass(frozen=True)
class Part:
    """What a module was before capture traced into it.

    Attributes:
        kind: the name of its class.
        container: its class, if that is one of torch's containers.
        names: the methods, attributes and children that it had beyond those of nn.Module.
        plain: its attributes that are numbers, strings, None, or tuples of these.
        children: the names of its children, in order.
    """

    kind: str
    container: type[nn.Module] | None
    names: frozenset[str]
    plain: dict[str, Any]
    children: tuple[str, ...]


def part_of(module: nn.Module) -> Part:
    """What a module is."""
    own = {name: each for name, each in vars(module).items() if name not in MODULE_ATTRIBUTES}
    return Part(
        type(module).__name__,
        type(module) if type(module) in _STAND_INS else None,
        frozenset((*dir(type(module)), *own, *module._modules)) - _OF_ANY,
        {name: each for name, each in own.items() if _is_plain(each)},
        tuple(module._modules),
    )


def _is_plain(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return type(value) in _PLAIN


def missing(part: Part | None, name: str, error: AttributeError) -> AttributeError:
    """The error for a missing attribute; it gives the remedy if the module had it before."""
    if part is None or name not in part.names:
        return error
    return AttributeError(
        f"{part.kind}.{name} is not in the graph, which holds what forward calls; {_REMEDY}"
    )


def check_frozen(name: str, before: Any, value: Any) -> None:
    """Refuse another value for an attribute that forward has read.

    Raises:
        CaptureError: the value is not the one that forward has read.
    """
    same = value is before or (type(value) is type(before) and value == before)
    if not same:
        known = _KNOWN.get(before) if callable(before) else None
        known = known or reprlib.repr(before)
        raise CaptureError(
            f"{name} was {known} when the model was captured, and is part of its graph",
            "set it on the model, and capture that again",
        )


def stand_for(place: nn.Module, part: Part | None, frozen: Mapping[str, Any]) -> None:
    """Turn an empty module into a stand-in.

    Args:
        place: the empty module; changed in place.
        part: what was there, if that is known.
        frozen: the attributes of it that forward has read.
    """
    place.__class__ = _STAND_INS.get(part.container, StandIn) if part else StandIn
    place.__dict__.update(_part=part, _frozen=frozen)
    if part:
        reorder(place._modules, part.children)


def reorder(held: dict[str, Any], names: Sequence[str]) -> None:
    """Sort a dict in place: the given names come first, in their order; others stay behind."""
    place = {name: index for index, name in enumerate(names)}
    items = sorted(held.items(), key=lambda item: place.get(item[0], len(place)))
    if [name for name, _ in items] != [*held]:
        held.clear()
        held.update(items)


class StandIn(nn.Module):
    """Stands in a graph for a module that was traced into."""

    def __setattr__(self, name: str, value: Any) -> None:
        read = vars(self).get("_frozen", {})
        if name in read and name not in self._modules:
            check_frozen(name, read[name], value)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise missing(vars(self).get("_part"), name, error) from None

    def _get_name(self) -> str:
        part = vars(self).get("_part")
        return part.kind if part else "Module"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the graph calls the layers inside, perhaps with reductions between them.

        Raises:
            CaptureError: always.
        """
        raise CaptureError(
            f"{self._get_name()}: is part of a graph, which calls its layers itself", _REMEDY
        )

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's, with a LeanWarning: the hook will not run."""
        return self._registered(super().register_forward_hook, args, kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's, with a LeanWarning: the hook will not run."""
        return self._registered(super().register_forward_pre_hook, args, kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's, with a LeanWarning: the hook will not run."""
        return self._registered(super().register_full_backward_hook, args, kwargs)

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's, with a LeanWarning: the hook will not run."""
        return self._registered(super().register_full_backward_pre_hook, args, kwargs)

    def _registered(self, register: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        warn(
            f"{self._get_name()}: a hook on it never runs, as the graph calls its layers itself; "
            f"hook these, or {_REMEDY}"
        )
        return register(*args, **kwargs)


class _SequentialStandIn(StandIn, nn.Sequential):
    pass


class _ListStandIn(StandIn, nn.ModuleList):
    pass


class _DictStandIn(StandIn, nn.ModuleDict):
    pass


_STAND_INS: dict[type[nn.Module] | None, type[StandIn]] = {
    nn.Sequential: _SequentialStandIn,
    nn.ModuleList: _ListStandIn,
    nn.ModuleDict: _DictStandIn,
}
