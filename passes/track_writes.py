"""Analysis: which values share storage, and which calls write into it.

torch.fx shows a value as one node, but an in-place call changes the values of other nodes too: the
one that it is called on, and every view of the same storage. Later passes ask here whether the
value that they see is still what it was.

Rules:

1. A call writes if it is an in-place method or function (a trailing underscore), an in-place
   operator, sets an item, or has ``inplace=True`` or ``out=``.
2. A call that writes, and a call that may return a view, share storage with their first argument.
   Dropout is among them: in eval it may return its input itself.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from lean_fx.passes.base import Pass, called, facts

_VIEWS: set[Any] = {
    *(nn.Identity, nn.Flatten, nn.Unflatten, torch.flatten, torch.reshape, torch.permute),
    *(torch.transpose, torch.squeeze, torch.unsqueeze, torch.movedim, torch.chunk, torch.split),
    *(torch.narrow, torch.select, torch.detach, torch.t, torch.unbind, torch.swapaxes),
    *(torch.swapdims, torch.unflatten, torch.diagonal, torch.real, operator.getitem, getattr),
    *("flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "contiguous"),
    *("chunk", "split", "narrow", "expand", "movedim", "detach", "float", "t", "to", "unflatten"),
    *("swapaxes", "swapdims", "view_as", "expand_as", "reshape_as", "select", "unbind"),
    *("diagonal", "unfold", "type", "half", "double", "moveaxis", "tensor_split", "as_strided"),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
}
_IN_PLACE_OPERATORS: set[Any] = {
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv),
    *(operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.setitem),
}


class TrackWrites(Pass):
    """Write ``facts(node).storage`` and ``facts(node).writes`` for every node."""

    def run(self, graph_module: GraphModule) -> bool:
        """Go through the graph once, from the inputs on."""
        modules = dict(graph_module.named_modules())
        for node in graph_module.graph.nodes:
            known = facts(node)
            known.writes = _writes(node, modules)
            shares = node.all_input_nodes and (known.writes or called(node, modules) in _VIEWS)
            known.storage = facts(node.all_input_nodes[0]).storage if shares else node.name
        return False


def _writes(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    return (
        (name.endswith("_") and not name.endswith("__"))
        or name == "__setitem__"
        or (name.startswith("__i") and name != "__invert__")
        or node.target in _IN_PLACE_OPERATORS
        or node.kwargs.get("inplace") is True
        or "out" in node.kwargs
    )
