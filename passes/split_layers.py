"""Transformation: layers that hold layers are split, each by the pass for its kind.

Rules:

1. Names of layers of attention go to :class:`SplitAttention`, all others to
   :class:`SplitRecurrent`.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import GraphModule

from lean_fx.passes.base import Pass, Pipeline
from lean_fx.passes.split_attention import SplitAttention
from lean_fx.passes.split_recurrent import SplitRecurrent


class SplitLayers(Pass):
    """Split stacks of recurrent layers, and layers of attention.

    Args:
        layers: their qualified names.

    Raises:
        PlanError: a name is neither that of a stack nor of attention, or called not just once.
    """

    def __init__(self, layers: Iterable[str]) -> None:
        self.layers = tuple(layers)

    def requires(self, graph_module: GraphModule) -> None:
        """As the passes for each kind."""
        for each in self._passes(graph_module):
            each.requires(graph_module)

    def run(self, graph_module: GraphModule) -> bool:
        """Run the passes for each kind."""
        return Pipeline(self._passes(graph_module)).run(graph_module)

    def _passes(self, graph_module: GraphModule) -> list[Pass]:
        modules = dict(graph_module.named_modules())
        attention = [
            name
            for name in self.layers
            if SplitAttention.can_split(modules.get(name)) or SplitAttention.is_split(modules, name)
        ]
        others = [name for name in self.layers if name not in attention]
        return [SplitRecurrent(others), SplitAttention(attention)]
