"""What stands in a graph for the modules that it has looked into.

A graph calls their layers itself, and torch.fx keeps of them no more than a place to hold these.
The place shows what the module was:

1. A Sequential, ModuleList or ModuleDict keeps its class, order, indexing and length.
2. Numbers, strings and the like can be read. Assigning another one where forward has read it is an
   error: it would change nothing.
3. A hook on it never runs, and its forward cannot be called; both are told, as is what is missing.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Graph

from lean_fx.errors import CaptureError, LeanWarning

_PARTS = "lean_fx.parts"
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_INTERNALS = frozenset(vars(nn.Module()))
_OF_ANY = frozenset(dir(nn.Module))
_REMEDY = "leanify(model, inputs, form='module') keeps the class"


@dataclass(frozen=True)
class Part:
    """A module as it was.

    Attributes:
        kind: the name of its class.
        container: the class of torch's containers that it is, if any.
        names: of the methods, attributes and modules that it had beyond a plain module's.
        plain: its attributes that are numbers, strings, None, or tuples of these.
        children: the names of its own modules, in order.
    """

    kind: str
    container: type[nn.Module] | None
    names: frozenset[str]
    plain: dict[str, Any]
    children: tuple[str, ...]


def note_parts(graph: Graph, root: nn.Module) -> None:
    """Note what the modules of a model are; copies of the graph know it too.

    Args:
        graph: of the model.
        root: the model.
    """
    parts = {name: _part(module) for name, module in root.named_modules()}
    next(reversed(graph.nodes)).meta[_PARTS] = parts


def parts_of(graph: Graph) -> dict[str, Part]:
    """What :func:`note_parts` has noted."""
    last = next(iter(reversed(graph.nodes)), None)
    return {} if last is None else last.meta.get(_PARTS, {})


def _part(module: nn.Module) -> Part:
    own = {name: each for name, each in vars(module).items() if name not in _INTERNALS}
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
    """The error for an attribute that a graph has not: by name, if the model had it."""
    if part is None or name not in part.names:
        return error
    return AttributeError(
        f"{part.kind}.{name} is not in the graph, which holds what forward calls; {_REMEDY}"
    )


def check_frozen(values: Mapping[str, Any], name: str, value: Any) -> None:
    """Refuse to assign another value to an attribute that forward has read.

    Raises:
        CaptureError: the value is another one.
    """
    before = values.get(name)
    same = value is before or (type(value) is type(before) and value == before)
    if name in values and not same:
        raise CaptureError(
            f"{name} was {before!r} when the model was captured, and is part of its graph; "
            "set it on the model, and capture that again"
        )


def stand_for(place: nn.Module, part: Part | None, frozen: Mapping[str, Any]) -> None:
    """Make a place in a graph show the module that was there.

    Args:
        place: a plain module; changed in place.
        part: what was there, if that is known.
        frozen: its attributes that forward has read.
    """
    place.__class__ = _STAND_INS.get(part.container, StandIn) if part else StandIn
    place.__dict__.update(_part=part, _frozen=frozen)
    if part:
        order = {name: index for index, name in enumerate(part.children)}
        held = sorted(place._modules.items(), key=lambda item: order.get(item[0], len(order)))
        place._modules.clear()
        place._modules.update(held)


class StandIn(nn.Module):
    """What stands in a graph for a module whose forward it has looked into."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in vars(self).get("_modules", {}):
            check_frozen(vars(self).get("_frozen", {}), name, value)
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
            f"{self._get_name()}: is part of a graph, which calls its layers itself; {_REMEDY}"
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
        warnings.warn(
            f"{self._get_name()}: a hook on it never runs, as the graph calls its layers itself; "
            f"hook these, or {_REMEDY}",
            LeanWarning,
            stacklevel=3,
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
