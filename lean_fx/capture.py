"""From a module to a torch.fx graph, without touching the module.

Copies of the model, torch's Transformer modules in them made plain (:mod:`lean_fx.transformers`),
are traced until it goes:

1. by torch.fx's tracer, with the leaves of :class:`~lean_fx.tracing.LeanTracer`;
2. with example inputs, by one that follows branches on sizes (:mod:`lean_fx.following`);
3. with the modules that still cannot be traced as leaves, the innermost that will do, and those
   whose branches would refuse sizes that the model takes (:mod:`lean_fx.probing`);
4. with those as leaves that give the weights of layers to a function that torch.fx.wrap made a
   node, which no pass could see into.

Then it is traced in the opposite mode, and the two graphs become one (:mod:`lean_fx.merging`).
"""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule
from torch.fx.proxy import TraceError
from torch.nn.utils import rnn

from lean_fx.checks import check_shapes
from lean_fx.copying import copied_whole
from lean_fx.errors import ArgumentError, CaptureError, LeanWarning
from lean_fx.following import FollowingTracer
from lean_fx.guards import check_branch
from lean_fx.merging import CannotMerge, merge_modes
from lean_fx.passes.base import has_hooks, is_altered, sharing_copy
from lean_fx.passes.modularize_calls import ModularizeCalls
from lean_fx.passes.modularize_weights import ModularizeWeights
from lean_fx.passes.reducing import reduces_within
from lean_fx.probing import refusing_modules
from lean_fx.rebuild import REBUILDERS
from lean_fx.tracing import LeanTracer, is_wrapped
from lean_fx.transformers import PLAIN

_STATE_HOOKS = (
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
_ROOT_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks"),
)


def capture(
    model: nn.Module, inputs: Sequence[Any] = (), *, evaluation: bool = False
) -> GraphModule:
    """Capture a model as a torch.fx graph.

    Args:
        model: a module; it is copied first and stays as it is.
        inputs: example inputs, as far as they are known. With them branches on sizes are followed,
            and a call whose sizes lead elsewhere raises a BranchError. A parameter of forward that
            is None by default and that they do not give is None in the graph, which refuses
            another value.
        evaluation: whether to capture what the model does in eval mode, and only that.

    Returns:
        A GraphModule with copies of the modules that forward calls, in the mode (train or eval)
        of each, and with all hooks; a container with hooks stays whole. What forward does in one
        mode only, it does there too (see :mod:`lean_fx.merging`), and functional dropout has become
        a module. Where the two modes cannot be joined, it keeps its own, and a LeanWarning says so.

    Raises:
        ArgumentError: ``model`` is not a module, or has lazy layers without a shape.
        CaptureError: it cannot be copied or traced.

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
    name = type(model).__name__
    root = plain_copy(model)
    if evaluation:
        root.eval()
    try:
        traced, graph = _trace(root, inputs)
        captured = GraphModule(traced, graph, name)
    except Exception as error:
        raise CaptureError(
            f"{name}: torch.fx cannot trace its forward ({_reason(error)}); move the part that "
            "depends on values out of forward, or give example_inputs: then each layer reduces its "
            "own input"
        ) from error
    for node in graph.nodes:
        if isinstance(node.type, str):  # an annotation that was not evaluated cannot be pickled
            node.type = None
    _keep_hooks(captured, root)
    _keep_layers(captured, root)
    if not evaluation:
        _follow_mode(captured, traced, root, inputs)
    ModularizeCalls()(captured)
    ModularizeWeights()(captured)
    return captured


def copied_graph(graph_module: GraphModule) -> GraphModule:
    """A deep copy of a captured model, with its class name and the hooks of the model."""
    copied = copied_whole(graph_module)
    assert isinstance(copied, GraphModule)
    named = GraphModule(copied, copied.graph, type(graph_module).__name__)
    _keep_hooks(named, graph_module)
    return named


def plain_copy(model: nn.Module) -> nn.Module:
    """A deep copy of a model, torch's Transformer modules in it plain (lean_fx.transformers).

    Those with hooks stay, unless the model is one: to trace what is inside would lose these.

    Raises:
        CaptureError: it cannot be copied.
    """
    copied = copied_whole(model)
    for module in copied.modules():
        kept = is_altered(module) or any(getattr(module, hooks) for hooks in _ROOT_HOOKS)
        if type(module) in PLAIN and (module is copied or not kept):
            module.__class__ = PLAIN[type(module)]
    return copied


def as_inputs(example_inputs: Any) -> tuple[Any, ...]:
    """Example inputs as the tuple of a model's positional inputs; packed sequences are one.

    Raises:
        ArgumentError: they are neither a tensor nor a tuple or list, or packed sequences without a
            step.

    Example:
        >>> [each.shape for each in as_inputs(torch.rand(2, 3))]
        [torch.Size([2, 3])]
    """
    if isinstance(example_inputs, torch.Tensor | rnn.PackedSequence):
        inputs: tuple[Any, ...] = (example_inputs,)
    elif isinstance(example_inputs, tuple | list):
        inputs = tuple(example_inputs)
    else:
        raise ArgumentError(
            f"example_inputs={type(example_inputs).__name__} object is neither a tensor nor a "
            "tuple; give one tensor, or a tuple of the positional inputs"
        )
    if any(isinstance(each, rnn.PackedSequence) and not len(each.batch_sizes) for each in inputs):
        raise ArgumentError("example_inputs: packed sequences without a step; give one or more")
    return inputs


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"model={type(model).__name__} object is not a torch.nn.Module; give the model itself"
        )
    check_shapes(model)
    names = {*dir(GraphModule), "meta"}
    taken = [name for name, _ in model.named_children() if name in names]
    if taken and not isinstance(model, GraphModule):
        raise CaptureError(
            f"{type(model).__name__}: its submodule {taken[0]!r} has the name of an attribute of "
            "torch.fx.GraphModule; rename it"
        )


def _absent(root: nn.Module, inputs: Sequence[Any]) -> dict[str, Any]:
    """The parameters of forward that are None: given so, or by default."""
    parameters = list(inspect.signature(root.forward).parameters.values())
    given = dict(zip((each.name for each in parameters), inputs, strict=False))
    return {each.name: None for each in parameters if given.get(each.name, each.default) is None}


def _trace(root: nn.Module, inputs: Sequence[Any]) -> tuple[nn.Module, Graph]:
    """Trace copies of a module until it goes; the copy that went, and its graph."""
    opaque = frozenset(
        name
        for name, each in root.named_modules()
        if name and (reduces_within(each) or has_hooks(each))
    )
    copied, graph = _trace_around(root, inputs, opaque)
    hiding = _hiding_weights(copied, graph)
    if hiding:
        try:
            return _trace_around(root, inputs, opaque | hiding)
        except Exception:  # what is around them asks more of their outputs than to be passed on
            pass
    return copied, graph


def _trace_around(
    root: nn.Module, inputs: Sequence[Any], opaque: frozenset[str]
) -> tuple[nn.Module, Graph]:
    """As :func:`_trace`, with these leaves, and more if need be."""
    copied = sharing_copy(root)
    absent = _absent(root, inputs)
    try:
        return copied, LeanTracer(opaque).trace(copied, absent)
    except Exception:  # the model's own code may raise anything on proxies
        copied, graph, leaves = _trace_in_parts(root, inputs, absent, opaque)
    if leaves > opaque and not _layers_called(copied, graph):
        names = ", ".join(sorted(leaves - opaque))
        raise TraceError(f"{names} cannot be traced, and no layer is elsewhere")
    return _without_refusals(root, inputs, absent, copied, graph, leaves)


def _trace_in_parts(
    root: nn.Module, inputs: Sequence[Any], absent: dict[str, Any], opaque: frozenset[str]
) -> tuple[nn.Module, Graph, frozenset[str]]:
    """Trace copies of a module, with ever more leaves, until it goes."""
    while True:
        copied = sharing_copy(root)
        tracer = (
            FollowingTracer(inputs, opaque, give_up=True)
            if inputs
            else LeanTracer(opaque, give_up=True)
        )
        graph = tracer.trace(copied, absent)
        if tracer.opaque == opaque:
            return copied, graph, opaque
        opaque = tracer.opaque


def _without_refusals(
    root: nn.Module,
    inputs: Sequence[Any],
    absent: dict[str, Any],
    copied: nn.Module,
    graph: Graph,
    opaque: frozenset[str],
) -> tuple[nn.Module, Graph]:
    """The same with modules as leaves whose branches would refuse sizes that the model takes."""
    names = {name for name, _ in root.named_modules() if name}
    while any(node.target is check_branch for node in graph.nodes):
        refusing = refusing_modules(root, GraphModule(copied, graph), inputs) & names
        if refusing <= opaque:
            break
        other, parts, opaque = _trace_in_parts(root, inputs, absent, opaque | refusing)
        if not _layers_called(other, parts):
            break
        copied, graph = other, parts
    return copied, graph


def _hiding_weights(root: nn.Module, graph: Graph) -> frozenset[str]:
    """The modules that give weights of layers to functions that torch.fx.wrap made nodes."""
    found = set()
    for node in graph.nodes:
        if node.op == "call_function" and is_wrapped(node.target):
            read = [str(each.target) for each in node.all_input_nodes if each.op == "get_attr"]
            owners = (name.removesuffix(".weight") for name in read if name.endswith(".weight"))
            around = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
            if around and any(type(root.get_submodule(each)) in REBUILDERS for each in owners):
                found.add(around[-1])
    return frozenset(found)


def _layers_called(root: nn.Module, graph: Graph) -> bool:
    targets = (str(node.target) for node in graph.nodes if node.op == "call_module")
    return any(isinstance(root.get_submodule(target), tuple(REBUILDERS)) for target in targets)


def _follow_mode(
    captured: GraphModule, traced: nn.Module, root: nn.Module, inputs: Sequence[Any]
) -> None:
    """Make a captured model do in the opposite mode what the model does there."""
    modules = list(root.modules())
    for module in modules:
        module.training = not module.training
    try:
        other, opposite = _trace(root, inputs)
    except Exception as error:
        reason = _reason(error)
    else:
        try:
            merge_modes(captured, traced, opposite, other)
            return
        except CannotMerge as error:
            reason = str(error)
    finally:
        for module in modules:
            module.training = not module.training
    mode = "train" if root.training else "eval"
    warnings.warn(
        f"{type(root).__name__}: does what it does in {mode} mode after train() and eval() alike, "
        f"since its graph in the other mode cannot be joined to it ({reason}); capture it in the "
        "mode that you need",
        LeanWarning,
        stacklevel=5,
    )


def _keep_hooks(captured: GraphModule, root: nn.Module) -> None:
    """Keep the hooks of the model itself, and those of state_dicts of its containers.

    The captured model has containers of its own. Other hooks of a container keep it whole.
    """
    for hooks in _ROOT_HOOKS:
        setattr(captured, hooks, getattr(root, hooks))
    modules = dict(captured.named_modules())
    for name, module in root.named_modules():
        there = modules.get(name, module)
        for hooks in _STATE_HOOKS if there is not module else ():
            setattr(there, hooks, OrderedDict(getattr(module, hooks)))
        for key, hook in there._load_state_dict_pre_hooks.items():
            if hook.with_module:  # such a hook knows its module
                there._load_state_dict_pre_hooks[key] = type(hook)(hook.hook, there)


def _keep_layers(captured: GraphModule, root: nn.Module) -> None:
    """Keep layers whole of which forward reads a parameter: torch.fx would keep that alone."""
    modules = dict(root.named_modules())
    for node in captured.graph.nodes:
        owner = str(node.target).rpartition(".")[0]
        if node.op == "get_attr" and owner and type(modules.get(owner)) in REBUILDERS:
            captured.set_submodule(owner, modules[owner])


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}".removesuffix(".")
