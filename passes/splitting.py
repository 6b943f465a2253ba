"""What the passes share that split a layer, called once, into layers of its own."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping

from torch import nn
from torch.fx import GraphModule, Node

from lean_fx.errors import PlanError
from lean_fx.passes.base import Pass
from lean_fx.passes.node_facts import forget_facts


class Splitting(Pass):
    """Split layers that are given by name.

    Args:
        layers: their qualified names.

    Raises:
        PlanError: a name is not that of a layer that can be split and is called once.
    """

    kind = ""

    def __init__(self, layers: Iterable[str]) -> None:
        self.layers = tuple(layers)

    @staticmethod
    @abc.abstractmethod
    def can_split(layer: nn.Module | None) -> bool:
        """Whether a module is of the kind that is split."""

    @staticmethod
    @abc.abstractmethod
    def is_split(modules: Mapping[str, nn.Module], name: str) -> bool:
        """Whether ``name`` was such a layer, which is split already."""

    @abc.abstractmethod
    def split(self, graph_module: GraphModule, node: Node) -> None:
        """Split the layer that a node calls."""

    def requires(self, graph_module: GraphModule) -> None:
        """Every layer is one that is called once, or is split already."""
        calls = [node.target for node in graph_module.graph.nodes if node.op == "call_module"]
        modules = dict(graph_module.named_modules())
        for name in self._open(modules):
            if not self.can_split(modules.get(name)) or calls.count(name) != 1:
                raise PlanError(
                    f"plan: layer {name!r} is no {self.kind} that is called once in this model; "
                    "make the plan anew from this model"
                )

    def run(self, graph_module: GraphModule) -> bool:
        """Split them one by one."""
        todo = self._open(dict(graph_module.named_modules()))
        for node in list(graph_module.graph.nodes):
            if node.op == "call_module" and node.target in todo:
                self.split(graph_module, node)
        if todo:
            forget_facts(graph_module)
        return bool(todo)

    def _open(self, modules: Mapping[str, nn.Module]) -> list[str]:
        return [name for name in self.layers if not self.is_split(modules, name)]
