"""Transformation: a layer that holds layers is split into these.

A stack of recurrent layers becomes its single layers (:mod:`lean_fx.graph.split_recurrent`), a
MultiheadAttention its projections and what lies between them
(:mod:`lean_fx.graph.split_attention`), so that each can get a reduction of its own.

Rules:

1. It acts on the layers that it is given by name. Each is of a kind that one of the splitters
   takes. It is called once; or it is inside a module that the graph calls as a whole, where a
   module that calls its parts takes its place (:func:`split_modules`).
2. A layer that is split already is left alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import ModuleType

from torch import nn
from torch.fx import GraphModule

from lean_fx.errors import PlanError
from lean_fx.graph import split_attention, split_recurrent
from lean_fx.graph.calls import modules_by_name
from lean_fx.graph.facts import forget_facts
from lean_fx.graph.rewriting import become
from lean_fx.passes.base import Pass

_SPLITTERS: tuple[ModuleType, ...] = (split_recurrent, split_attention)


class SplitLayers(Pass):
    """Split stacks of recurrent layers, and layers of attention.

    Args:
        layers: their qualified names.
        planned: the names of all layers in the plan, for layers that no node calls.

    Raises:
        PlanError: a name is neither that of a stack nor of attention, or called more than once.
    """

    def __init__(self, layers: Iterable[str], planned: Collection[str] = ()) -> None:
        self.layers = tuple(layers)
        self.planned = planned

    def requires(self, graph_module: GraphModule) -> None:
        """Every layer is split already, or can be; it is called once, or inside of a leaf."""
        calls = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"]
        modules = modules_by_name(graph_module)
        for name in self._unsplit(modules):
            inside = any(name.startswith(f"{each}.") for each in calls)
            once = calls.count(name) == (0 if inside else 1)
            if not once or splitter_of(modules.get(name)) is None:
                raise _not_split(name)

    def run(self, graph_module: GraphModule) -> bool:
        """Split them one by one."""
        modules = modules_by_name(graph_module)
        unsplit = self._unsplit(modules)
        calls = [node for node in graph_module.graph.nodes if node.op == "call_module"]
        called = {str(node.target): node for node in calls}
        split_modules(graph_module, [name for name in unsplit if name not in called], self.planned)
        for name in unsplit:
            splitter = splitter_of(modules[name])
            if name in called and splitter is not None:
                splitter.split(graph_module, called[name])
        if unsplit:
            forget_facts(graph_module)
        return bool(unsplit)

    def _unsplit(self, modules: Mapping[str, nn.Module]) -> list[str]:
        def is_split(name: str) -> bool:
            return any(splitter.is_split(modules, name) for splitter in _SPLITTERS)

        return [name for name in self.layers if not is_split(name)]


def splitter_of(layer: nn.Module | None) -> ModuleType | None:
    """The module that can split a layer, or None."""
    return next((each for each in _SPLITTERS if each.can_split(layer)), None)


def split_modules(model: nn.Module, layers: Iterable[str], planned: Collection[str]) -> None:
    """Put modules that call their parts in the places of layers, as :class:`SplitLayers` does.

    Args:
        model: changed in place.
        layers: the names of the layers to split.
        planned: the names of the layers that a plan speaks of, those inside of them too.

    Raises:
        PlanError: a name is neither that of a stack nor of attention.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LSTM(8, 8, num_layers=2))
        >>> split_modules(model, ["1"], ["1.0", "1.1"])
        >>> model[1]
        SplitStack(
          (0): LSTM(8, 8)
          (1): LSTM(8, 8)
        )
    """
    modules = modules_by_name(model)
    for name in layers:
        layer = modules.get(name)
        splitter = splitter_of(layer)
        if splitter is None:
            raise _not_split(name)
        become(modules[name], splitter.split_module(layer, name, planned))


def _not_split(name: str) -> PlanError:
    return PlanError(
        f"plan: layer {name!r} is neither a stack of recurrent layers nor a MultiheadAttention "
        "that is called once in this model; make the plan anew from this model"
    )
