"""Transformation: functional dropout that follows train() and eval() becomes a module.

Tracing freezes ``self.training``: a graph captured in training mode would drop out for ever::

    dropout = torch.nn.functional.dropout(x, p = 0.5, training = True)      # before
    dropout = self.calls.dropout(x)                                         # after, nn.Dropout

Rules:

1. It acts on calls that capture found to follow the mode (``facts(node).follows_mode``).
   ``F.dropout(x, training=True)``, which always drops out, stays.
2. It acts on F.dropout, dropout1d, dropout2d, dropout3d, alpha_dropout and feature_alpha_dropout.
3. The module starts in the mode that the call was captured in.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from lean_fx.passes.base import Pass, add_module, facts

_MODULES: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}


#: Functions that it makes modules of.
FUNCTIONS = frozenset(_MODULES)


class ModularizeCalls(Pass):
    """Give functional dropout that follows the mode a module of its own."""

    def run(self, graph_module: GraphModule) -> bool:
        """Replace such calls one by one."""
        found = [node for node in graph_module.graph.nodes if can_follow_mode(node)]
        for node in found:
            arguments = _arguments(node)
            module = _MODULES[node.target](p=arguments["p"], inplace=arguments["inplace"])
            module.train(arguments["training"])
            target = add_module(graph_module, "calls", node.name, module)
            with graph_module.graph.inserting_before(node):
                call = graph_module.graph.call_module(target, (arguments["input"],))
            node.replace_all_uses_with(call)
            graph_module.graph.erase_node(node)
        return bool(found)


def can_follow_mode(node: Node) -> bool:
    """Whether a call that follows the mode is one that this pass can make a module of."""
    if not facts(node).follows_mode or node.target not in _MODULES:
        return False
    return not isinstance(_arguments(node)["p"], Node)


def _arguments(node: Node) -> dict[str, Any]:
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    bound.apply_defaults()
    return bound.arguments
