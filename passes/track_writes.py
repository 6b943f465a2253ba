"""Analysis: which values share storage, and which calls write into it.

torch.fx shows a value as one node, but an in-place call changes the values of other nodes too: the
one that it is called on, and every view of the same storage. Later passes ask here whether the
value that they see is still what it was.

Rules; a call that is not known to be harmless counts as harmful:

1. A call makes new storage if it is a layer of torch.nn or a function of torch that computes
   (arithmetic, convolution, activation, reduction, concatenation, ...). Any other call may return
   a view of any of its arguments: it shares their storage. Dropout is among them: in eval it may
   return its input itself.
2. A call writes into its first argument if it is an in-place method or function (a trailing
   underscore), an in-place operator, sets an item, or has ``inplace=True``; into ``out`` if it
   has that; into all its arguments if it is not a call of torch's, or torch._foreach.
3. A call that writes into a value shares its storage.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, Node

from lean_fx.graph.calls import META_ATTRIBUTES, argument, called, modules_by_name
from lean_fx.graph.facts import facts
from lean_fx.graph.ops import (
    ALPHA_DROPOUT_CALLS,
    ALPHA_DROPOUTS,
    DROPOUT_CALLS,
    DROPOUTS,
)
from lean_fx.layers.modes import InMode
from lean_fx.passes.base import Pass

# Layers and functions of torch.nn that may return a view of their input, or the input itself.
_VIEWS: set[Any] = {
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(*DROPOUTS, *DROPOUT_CALLS, *ALPHA_DROPOUTS, *ALPHA_DROPOUT_CALLS),
    *(nn.Upsample, nn.Fold, nn.Unfold),
    *(F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle, F.interpolate, F.upsample, F.pad),
    *(F.fold, F.unfold, F.native_channel_shuffle),
}
# Functions and methods of torch, and operators, that compute into new storage.
_FRESH = frozenset(
    """
    abs add addmm amax amin argmax argmin baddbmm bmm cat ceil clamp clamp_max clamp_min clip clone
    concat conv1d conv2d conv3d cos cumsum div eq erf exp floor floor_divide floordiv gather ge gt
    index_select layer_norm le log log_softmax logsumexp lt masked_fill matmul max maximum mean min
    minimum mm mod mul ne neg new_zeros norm numel ones_like pow relu repeat round rsqrt sigmoid
    sin size softmax sqrt square stack std sub sum tanh true_divide truediv var where zeros_like dim
    """.split()  # noqa: SIM905 (a list of them takes seventy lines)
)
_IN_PLACE_OPERATORS: set[Any] = {
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv),
    *(operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.setitem),
}
Written = Callable[[Node, Mapping[str, nn.Module]], Iterable[Node]]
_TRUSTED = ("torch", "operator", "_operator", "builtins", "math", "einops", "lean_fx")


class TrackWrites(Pass):
    """Write ``facts(node).storage`` and ``facts(node).writes`` for every node."""

    def run(self, graph_module: GraphModule) -> bool:
        """Go through the graph once, from the inputs on, and join what shares storage."""
        modules = modules_by_name(graph_module)
        homes = shared_storage(graph_module.graph, modules)
        for node in graph_module.graph.nodes:
            facts(node).writes = any(True for _ in written_by(node, modules))
            facts(node).storage = homes[node]
        return False


def shared_storage(
    graph: Graph, modules: Mapping[str, nn.Module], written: Written | None = None
) -> dict[Node, str]:
    """What shares storage, by rules 1 and 3.

    Args:
        graph: with the calls.
        modules: those of the graph, by name.
        written: gives the arguments that a call writes into; :func:`written_by` if left out.

    Returns:
        For every node the name of the first that it shares its storage with.
    """
    joined: dict[str, str] = {}

    def home(name: str) -> str:
        while joined.get(name, name) != name:
            name = joined[name]
        return name

    order = {node.name: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op == "output":
            continue
        into = list((written or written_by)(node, modules))
        shared = into if _is_fresh(node, modules) else [*into, *node.all_input_nodes]
        for other in shared:
            first, second = sorted((home(node.name), home(other.name)), key=order.__getitem__)
            joined[second] = first
    return {node: home(node.name) for node in graph.nodes}


def _is_fresh(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    target = called(node, modules)
    if node.op == "call_module":
        return isinstance(target, type) and _within(target, "torch.nn") and target not in _VIEWS
    if node.op == "call_function" and target is getattr:
        return argument(node, 1, "name") in META_ATTRIBUTES
    if node.op == "call_function" and not _within(target, *_TRUSTED):
        return False
    if node.op == "call_function" and getattr(F, _name(node), None) is target:
        return target not in _VIEWS
    return _name(node) in _FRESH


def written_by(node: Node, modules: Mapping[str, nn.Module]) -> Iterator[Node]:
    """The arguments that a call writes into (rule 2).

    Args:
        node: the call.
        modules: those of the graph, by name.
    """
    sources = node.all_input_nodes
    if node.op == "call_module":
        module, target = modules[str(node.target)], called(node, modules)
        harmless = isinstance(target, type) and _within(target, "torch.nn", "lean_fx")
        if not harmless or target is InMode:
            yield from sources
        elif getattr(module, "inplace", False):
            yield from sources[:1]
    elif node.op in ("call_function", "call_method"):
        name = _name(node)
        if isinstance(out := node.kwargs.get("out"), Node):
            yield out
        foreign = node.op == "call_function" and not _within(node.target, *_TRUSTED)
        if foreign or (name.startswith("_foreach_") and name.endswith("_")):
            yield from sources
        elif (
            (name.endswith("_") and not name.endswith("__"))
            or name == "__setitem__"
            or (name.startswith("__i") and name != "__invert__")
            or node.target in _IN_PLACE_OPERATORS
            or _asks_in_place(node)
        ):
            yield from sources[:1]


def _asks_in_place(node: Node) -> bool:
    if node.kwargs.get("inplace") is True:
        return True
    if node.op != "call_function" or not any(each is True for each in node.args):
        return False
    try:
        names = inspect.signature(node.target).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin
        return False
    return ("inplace", True) in zip(names, node.args, strict=False)


def _name(node: Node) -> str:
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))


def _within(target: Any, *packages: str) -> bool:
    """Whether a function or type is of a package; what names no module is taken for torch's."""
    home = getattr(target, "__module__", None) or "torch"
    return any(home == package or home.startswith(f"{package}.") for package in packages)
