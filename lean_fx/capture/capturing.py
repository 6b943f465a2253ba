"""Capture a module as a torch.fx graph, without touching the module.

1. Copy it, and replace torch's Transformer modules in the copy by unfused ones
   (:mod:`lean_fx.layers.transformers`).
2. Trace it in its own mode and in the other; retry with more leaves until it succeeds
   (:mod:`lean_fx.capture.retries`).
3. Merge the two graphs (:mod:`lean_fx.capture.merging`).
4. Compare the graph with the model (:mod:`lean_fx.capture.agreement`).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from lean_fx.capture.agreement import disagreement
from lean_fx.capture.merging import CannotMerge, merge_modes
from lean_fx.capture.own_code import Purpose, own_loading
from lean_fx.capture.retries import trace_copy, untraced_modules
from lean_fx.capture.side_effects import SideEffect, keeping_rng_state
from lean_fx.cloning import clone
from lean_fx.errors import ArgumentError, CaptureError, one_line_with_type, warn
from lean_fx.graph.calls import has_hooks, is_altered
from lean_fx.graph.captured import (
    CapturedModule,
    guard_parts,
    keep_hooks,
    keep_layers,
    keep_unsaved,
    update_record,
)
from lean_fx.graph.parts import part_of
from lean_fx.graph.running import clone_sharing_state
from lean_fx.layers.transformers import UNFUSED
from lean_fx.locks import SHARED_STATE
from lean_fx.model_checks import check_plain, check_shapes, first_without_values
from lean_fx.passes.modularize_calls import ModularizeCalls


def capture(
    model: nn.Module, inputs: Sequence[Any] = (), *, purpose: Purpose = "graph"
) -> GraphModule:
    """Capture a model as a torch.fx graph.

    Args:
        model: a module; it is copied first and stays as it is.
        inputs: example inputs, if there are any. Branches on sizes go the way that they take, and
            a later call whose sizes take another raises a BranchError. A parameter of forward
            that they leave at its default None is None in the graph; a later call that gives it
            raises a BranchError too.
        purpose: ``"evaluation"`` captures only what the model does in eval mode; ``"facts"``
            captures a model although its graph could not replace it.

    Returns:
        A GraphModule with copies of the modules that forward calls, each in its mode, and with all
        hooks; a container with hooks stays whole. It follows train() and eval() as the model does
        (:mod:`lean_fx.capture.merging`), and functional dropout has become a module. If the graphs
        of the two modes cannot be merged, it keeps to the model's mode, and a LeanWarning says so.

    Raises:
        ArgumentError: ``model`` is not a module, or wraps one, or has lazy layers without a shape.
        CaptureError: it cannot be copied or traced, or a graph would lose some of its behaviour.

    Example:
        >>> print(capture(nn.Sequential(nn.Linear(4, 2), nn.ReLU())).code.strip())
        def forward(self, input):
            input_1 = input
            _0 = getattr(self, "0")(input_1);  input_1 = None
            _1 = getattr(self, "1")(_0);  _0 = None
            return _1
    """
    _check(model)
    if isinstance(model, nn.RNNBase):
        raise ArgumentError(
            f"model={type(model).__name__} is a single layer; wrap it in torch.nn.Sequential"
        )
    with SHARED_STATE, keeping_rng_state():  # forward may draw numbers while it is traced
        root = unfused_clone(model)
        if purpose == "evaluation":
            root.eval()
        captured = _captured_with(root, inputs, frozenset(), purpose)
        if purpose == "graph" and (own := own_loading(root)):
            warn(
                f"{type(root).__name__}: its graph is without its {own}; give it state_dicts of "
                "the model's present version"
            )
        if not inputs or first_without_values(root):
            return captured
        reason = disagreement(root, captured, inputs)
        if not reason:
            return captured
        for leaves in _parts_by_class(captured, root):
            try:
                other = _captured_with(root, inputs, leaves, purpose)
            except CaptureError:  # there is no layer elsewhere
                continue
            if not disagreement(root, other, inputs):
                return other
        name = type(root).__name__
        raise CaptureError(f"{name}: a graph would not do what it does ({reason})")


def _parts_by_class(captured: GraphModule, root: nn.Module) -> list[frozenset[str]]:
    """The modules that were traced into, grouped by class, the innermost first."""
    parts: dict[type, list[str]] = {}
    inside = dict(captured.named_modules())
    for name, module in root.named_modules():
        if name and type(inside.get(name)) is not type(module):
            parts.setdefault(type(module), []).append(name)
    depths = {kind: max(name.count(".") for name in names) for kind, names in parts.items()}
    return [frozenset(parts[kind]) for kind in sorted(parts, key=lambda each: -depths[each])]


def _captured_with(
    root: nn.Module, inputs: Sequence[Any], leaves: frozenset[str], purpose: Purpose
) -> GraphModule:
    """Capture a model with some modules as leaves, and more if its other mode needs them."""
    while True:
        try:
            captured = _captured_in_both_modes(root, inputs, leaves, purpose)
            break
        except CannotMerge as error:
            leaves |= error.leaves
    ModularizeCalls()(captured)
    _name_items(captured)
    keep_unsaved(captured, root)
    parts = {name: part_of(module) for name, module in root.named_modules()}
    update_record(captured.graph, parts=parts)
    guard_parts(captured)
    return captured


def _name_items(captured: GraphModule) -> None:
    """Name the items of a module's result after its call, and merge equal ones.

    torch.fx numbers such nodes over the whole graph: one more layer would rename them all.
    """
    items: dict[tuple[Node, Any], Node] = {}
    for node in list(captured.graph.nodes):
        if node.target is not operator.getitem or not isinstance(node.args[0], Node):
            continue
        source, index = node.args
        if source.op != "call_module" or not isinstance(index, int):
            continue
        first = items.setdefault((source, index), node)
        if first is not node:
            node.replace_all_uses_with(first)
            captured.graph.erase_node(node)
        elif node.name.startswith("getitem"):
            node._rename(f"{source.name}_item_{index}")
    if items:
        captured.recompile()


def _captured_in_both_modes(
    root: nn.Module, inputs: Sequence[Any], leaves: frozenset[str], purpose: Purpose
) -> GraphModule:
    name = type(root).__name__
    try:
        traced, graph = trace_copy(root, inputs, leaves, purpose=purpose)
        captured = CapturedModule(traced, graph, name)
    except Exception as error:
        raise _untraced(name, error, inputs) from error
    for node in graph.nodes:
        if isinstance(node.type, str):  # an annotation that was not evaluated cannot be pickled
            node.type = None
    keep_hooks(captured, root)
    keep_layers(captured, root)
    if purpose != "evaluation":
        _follow_mode(captured, traced, root, inputs, leaves, purpose)
    return captured


def clone_graph(graph_module: GraphModule) -> GraphModule:
    """A copy of a captured model that shares its tensors, with its class name and its hooks."""
    copied = clone_sharing_state(graph_module)
    assert isinstance(copied, GraphModule)
    named = CapturedModule(copied, copied.graph, type(graph_module).__name__)
    keep_hooks(named, graph_module)
    keep_layers(named, copied)
    keep_unsaved(named, graph_module)
    guard_parts(named)
    return named


def unfused_clone(model: nn.Module) -> nn.Module:
    """A deep copy of a model whose Transformer modules are the unfused ones.

    Those with hooks stay as they are, unless the model is one: tracing into them loses the hooks.

    Raises:
        CaptureError: it cannot be copied.
    """
    copied = clone(model)
    for module in copied.modules():
        kept = is_altered(module) or has_hooks(module)
        if type(module) in UNFUSED and (module is copied or not kept):
            module.__class__ = UNFUSED[type(module)]
    return copied


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"model={type(model).__name__} object is not a torch.nn.Module; give the model itself"
        )
    check_plain(model)
    check_shapes(model)
    names = {*dir(GraphModule), "meta"}
    taken = [name for name, _ in model.named_children() if name in names]
    if taken and not isinstance(model, GraphModule):
        raise CaptureError(
            f"{type(model).__name__}: its submodule {taken[0]!r} has the name of an attribute of "
            "torch.fx.GraphModule",
            "rename it",
        )


def _follow_mode(
    captured: GraphModule,
    traced: nn.Module,
    root: nn.Module,
    inputs: Sequence[Any],
    leaves: frozenset[str],
    purpose: Purpose,
) -> None:
    """Make a captured model behave as the model does in the opposite mode too.

    Raises:
        CannotMerge: more modules must be leaves for that.
    """
    modules = list(root.modules())
    for module in modules:
        module.training = not module.training
    try:
        other, opposite = trace_copy(root, inputs, leaves, purpose=purpose)
    except SideEffect as error:
        raise _untraced(type(root).__name__, error, inputs) from error
    except Exception as error:
        reason = _reason(error)
    else:
        more = untraced_modules(other, opposite) - untraced_modules(traced, captured.graph)
        if more:
            raise CannotMerge("more modules are leaves in the other mode", more)
        try:
            merge_modes(captured, traced, opposite, other)
            return
        except CannotMerge as error:
            if error.leaves:
                raise
            reason = str(error)
    finally:
        for module in modules:
            module.training = not module.training
    mode = "train" if root.training else "eval"
    warn(
        f"{type(root).__name__}: its graph acts as in {mode} mode, whatever train() and eval() "
        f"set, because the graphs of the two modes cannot be merged ({reason}); capture it in the "
        "mode that you need"
    )


def _untraced(name: str, error: Exception, inputs: Sequence[Any]) -> CaptureError:
    remedy = "move the part that depends on values out of forward"
    if not inputs:
        remedy += (
            ", or give example_inputs: branches on sizes are followed by them, else each layer "
            "reduces its own input"
        )
    return CaptureError(f"{name}: torch.fx cannot trace its forward ({_reason(error)})", remedy)


def _reason(error: Exception) -> str:
    return one_line_with_type(error, 200).removesuffix(".")
