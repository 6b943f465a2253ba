"""Trace a model; retry with another tracer and with more leaves until an attempt succeeds.

The attempts, in turn:

1. :class:`~lean_fx.capture.tracing.LeanTracer`, torch.fx's tracer with more leaves;
2. given example inputs, the tracer that follows branches on sizes
   (:mod:`lean_fx.capture.value_tracing`);
3. the same tracer, treating as leaves the innermost modules that cannot be traced, and the modules
   whose size guards reject inputs that the model accepts (:mod:`lean_fx.capture.size_guards`);
4. the same tracer, treating as leaves the modules that pass a layer's weight to a function that
   torch.fx.wrap made a node, since no pass can see into such a function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, _symbolic_trace
from torch.fx.proxy import TraceError
from torch.nn.utils.rnn import PackedSequence

from lean_fx.capture.arguments import absent_arguments
from lean_fx.capture.fed_by_hooks import fed_by_hooks
from lean_fx.capture.guards import check_absent, check_branch, check_given
from lean_fx.capture.own_code import Purpose, lost_in_a_graph, own_call
from lean_fx.capture.size_guards import refusing_modules
from lean_fx.capture.tracing import LeanTracer, is_leaf
from lean_fx.capture.value_tracing import ValueTracer
from lean_fx.graph.calls import called_modules, has_hooks
from lean_fx.graph.model_code import is_users_code
from lean_fx.graph.running import clone_sharing_state
from lean_fx.layers.input_hooks import reduces_within
from lean_fx.layers.kinds import has_own_kind, kind_of


def trace_copy(
    root: nn.Module,
    inputs: Sequence[Any],
    leaves: frozenset[str] = frozenset(),
    *,
    purpose: Purpose = "graph",
) -> tuple[nn.Module, Graph]:
    """Trace copies of a module until an attempt succeeds.

    Args:
        root: the module.
        inputs: example inputs, if there are any.
        leaves: names of modules that are leaves in any case.
        purpose: of the graph.

    Returns:
        The copy that was traced, and its graph.

    Raises:
        TraceError: the module cannot be traced. Its own code may raise other exceptions.
    """
    fed = fed_by_hooks(root)
    reason = own_call(root) or lost_in_a_graph(root, purpose, is_part=False)
    if "" in fed:
        reason = reason or "reads what hooks of other modules store"
    if reason:
        raise TraceError(f"{type(root).__name__} {reason}")
    leaves |= fed
    for name, each in root.named_modules():
        if not name or is_leaf(each):
            continue
        if lost_in_a_graph(each, purpose) or reduces_within(each) or has_hooks(each):
            leaves |= {name}
    copied, graph = _trace_showing_weights(root, inputs, leaves)
    for guard in [node for node in graph.nodes if node.target is check_given]:
        is_input = isinstance(guard.args[0], Node) and guard.args[0].op == "placeholder"
        if is_input and _same_without(guard.args[0], graph, root, inputs, leaves):
            graph.erase_node(guard)
    return copied, graph


def _same_without(
    placeholder: Any, graph: Graph, root: nn.Module, inputs: Sequence[Any], leaves: frozenset[str]
) -> bool:
    """Whether forward makes the same calls with None in the place of an input."""
    place = graph.find_nodes(op="placeholder").index(placeholder)
    try:
        given = [*inputs[:place], None, *inputs[place + 1 :]]
        _, other = _trace_showing_weights(root, given, leaves)
    except Exception:  # the model's own code
        return False
    nodes, others = _without_guards(graph), _without_guards(other)
    if len(nodes) != len(others):
        return False
    twins: dict[Node, Any] = {}
    for node, twin in zip(nodes, others, strict=True):
        arguments = torch.fx.map_arg(
            (node.args, node.kwargs), lambda each: None if each is placeholder else twins[each]
        )
        alike = (node.op, node.target) == (twin.op, twin.target)
        if not alike or (node.op != "placeholder" and arguments != (twin.args, twin.kwargs)):
            return False
        twins[node] = twin
    return True


def _without_guards(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.target not in (check_given, check_absent)]


def untraced_modules(root: nn.Module, graph: Graph) -> frozenset[str]:
    """The modules that became leaves because they could not be traced.

    Args:
        root: the copy that was traced.
        graph: its graph.
    """
    called = called_modules(graph)
    return frozenset(name for name in called if not is_leaf(root.get_submodule(name)))


def _trace_showing_weights(
    root: nn.Module, inputs: Sequence[Any], leaves: frozenset[str]
) -> tuple[nn.Module, Graph]:
    """Trace with given leaves; then also with those as leaves that hide the weights of layers."""
    copied, graph = _trace_with_leaves(root, inputs, leaves)
    hiding = _hiding_weights(copied, graph)
    if hiding:
        try:
            return _trace_with_leaves(root, inputs, leaves | hiding)
        except Exception:  # the code around them branches on their outputs
            pass
    return copied, graph


def _trace_with_leaves(
    root: nn.Module, inputs: Sequence[Any], leaves: frozenset[str]
) -> tuple[nn.Module, Graph]:
    """Trace with given leaves, and with more if that fails."""
    try:
        if not all(each is None or _holds_no_none(each) for each in inputs):
            raise TraceError("what is in a container may be None")
        copied = clone_sharing_state(root)
        return copied, LeanTracer(leaves).trace(copied, absent_arguments(root, inputs))
    except Exception:  # the model's own code may raise anything on proxies
        copied, graph, needed = _trace_adding_leaves(root, inputs, leaves)
    if needed > leaves and not _calls_a_layer(copied, graph):
        names = ", ".join(sorted(needed - leaves))
        raise TraceError(f"{names} cannot be traced, and no layer is elsewhere")
    return _retrace_without_refusals(root, inputs, copied, graph, needed)


def _holds_no_none(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_holds_no_none, value))
    return isinstance(value, Tensor | int | float | str | PackedSequence)


def _trace_adding_leaves(
    root: nn.Module, inputs: Sequence[Any], leaves: frozenset[str]
) -> tuple[nn.Module, Graph, frozenset[str]]:
    """Trace copies of a module, with more leaves each time, until an attempt succeeds."""
    absent = absent_arguments(root, inputs)
    while True:
        copied = clone_sharing_state(root)
        tracer = (
            ValueTracer(inputs, leaves, leaf_on_failure=True)
            if inputs
            else LeanTracer(leaves, leaf_on_failure=True)
        )
        graph = tracer.trace(copied, absent)
        if tracer.leaves == leaves:
            return copied, graph, leaves
        leaves = tracer.leaves


def _retrace_without_refusals(
    root: nn.Module,
    inputs: Sequence[Any],
    copied: nn.Module,
    graph: Graph,
    leaves: frozenset[str],
) -> tuple[nn.Module, Graph]:
    """Retrace with leaves for modules whose branches reject sizes that the model accepts."""
    names = {name for name, _ in root.named_modules() if name}
    while any(node.target is check_branch for node in graph.nodes):
        refusing = refusing_modules(root, GraphModule(copied, graph), inputs).keys() & names
        if refusing <= leaves:
            break
        other, parts, leaves = _trace_adding_leaves(root, inputs, leaves | refusing)
        if not _calls_a_layer(other, parts):
            break
        copied, graph = other, parts
    return copied, graph


def _hiding_weights(root: nn.Module, graph: Graph) -> frozenset[str]:
    """The modules that pass weights of layers to functions that torch.fx.wrap made nodes."""
    found = set()
    for node in graph.nodes:
        if node.op == "call_function" and _is_wrapped(node.target):
            read = [str(each.target) for each in node.all_input_nodes if each.op == "get_attr"]
            owners = (name.removesuffix(".weight") for name in read if name.endswith(".weight"))
            around = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
            if around and any(has_own_kind(root.get_submodule(each)) for each in owners):
                found.add(around[-1])
    return frozenset(found)


def _is_wrapped(function: Any) -> bool:
    """Whether torch.fx.wrap has made a function of the model's own code a node.

    Example:
        >>> _is_wrapped(len)
        False
    """
    name, module = getattr(function, "__name__", ""), getattr(function, "__globals__", {})
    users = is_users_code(str(module.get("__name__")))
    return users and (id(module), name) in _symbolic_trace._wrapped_fns_to_patch


def _calls_a_layer(root: nn.Module, graph: Graph) -> bool:
    return any(kind_of(root.get_submodule(name)) for name in called_modules(graph))
