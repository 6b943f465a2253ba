"""From a module to a torch.fx graph, without touching the module."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Tracer
from torch.nn.parameter import is_lazy
from torch.nn.utils import rnn

from lean_fx.attention import AttentionHeads
from lean_fx.errors import ArgumentError, CaptureError, LeanWarning
from lean_fx.packed import SequenceDropout
from lean_fx.passes.base import facts
from lean_fx.passes.modularize_calls import ModularizeCalls, can_follow_mode
from lean_fx.rebuild import REBUILDERS
from lean_fx.registry import is_reduction

_ROOT_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks"),
)


_SEQUENCE_FUNCTIONS = (
    *(rnn.pack_padded_sequence, rnn.pad_packed_sequence, rnn.pack_sequence, rnn.pad_sequence),
    *(rnn.unpack_sequence, rnn.unpad_sequence),
)


class LeanTracer(Tracer):
    """torch.fx's tracer, with three differences.

    Subclasses of conv, linear and recurrent layers are leaves too: they would otherwise dissolve
    into functional calls; as leaves they are seen, and left alone with a reason. Buffers are values
    of the graph, so that what forward computes of them is computed at every call, not once. The
    functions that pack and pad sequences are nodes, since they cannot run without lengths.
    """

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__(autowrap_functions=_SEQUENCE_FUNCTIONS)
        self._autowrap_search.append(rnn)  # for calls by the module's name

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> Graph:
        """As torch.fx's, but for a mark that makes its generated code wrap ``torch.nn...``."""
        graph = super().trace(root, concrete_args)
        for node in graph.nodes:
            if node.target in _SEQUENCE_FUNCTIONS:
                node.meta.pop("is_wrapped", None)  # no later trace would find it: a KeyError
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a call of ``m`` becomes one node."""
        leaf = isinstance(m, (*REBUILDERS, SequenceDropout, AttentionHeads)) or is_reduction(m)
        return leaf or super().is_leaf_module(m, module_qualified_name)


def capture(
    model: nn.Module, inputs: Sequence[Any] = (), *, evaluation: bool = False
) -> GraphModule:
    """Capture a model as a torch.fx graph.

    Args:
        model: a module that torch.fx can trace; it is copied first and stays as it is.
        inputs: example inputs, as far as they are known. A parameter of forward that is None by
            default and that they do not give is None in the graph, which refuses another value.
        evaluation: whether to capture what the model does in eval mode, and only that.

    Returns:
        A GraphModule with copies of the modules that forward calls, in the mode (train or eval)
        of each, and of the hooks of the model itself. Functional dropout that follows the mode has
        become a module; any other call that follows it keeps the mode that it was captured in, and
        a LeanWarning names it.

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
    name = type(model).__name__
    root = copied_whole(model)
    if evaluation:
        root.eval()
    try:
        absent = _absent(root, inputs)
        graph = LeanTracer().trace(root, absent)
        _mark_mode(graph, root, absent)
        captured = GraphModule(root, graph, name)
    except Exception as error:
        raise CaptureError(
            f"{name}: torch.fx cannot trace its forward ({_reason(error)}); move the part that "
            "depends on values out of forward, or give example_inputs: then each layer reduces its "
            "own input"
        ) from error
    for node in graph.nodes:
        if isinstance(node.type, str):  # an annotation that was not evaluated cannot be pickled
            node.type = None
    for hooks in _ROOT_HOOKS:
        setattr(captured, hooks, getattr(root, hooks))
    stuck = [n for n in graph.nodes if facts(n).follows_mode and not can_follow_mode(n)]
    if stuck and not evaluation:
        names = ", ".join(node.name for node in stuck)
        warnings.warn(
            f"{name}: {names} read self.training and keep the mode that they were captured in; "
            "use modules (such as torch.nn.BatchNorm2d) in their place",
            LeanWarning,
            stacklevel=4,
        )
    _keep_layers(captured, root)
    ModularizeCalls()(captured)
    return captured


def copied_whole(model: nn.Module) -> nn.Module:
    """A deep copy of a model.

    Raises:
        CaptureError: it cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__}: cannot be copied ({_reason(error)}); give a model that "
            "copy.deepcopy can copy"
        ) from error


def as_inputs(example_inputs: Any) -> tuple[Any, ...]:
    """Example inputs as the tuple of a model's positional inputs; packed sequences are one.

    Raises:
        ArgumentError: they are neither a tensor nor a tuple or list.

    Example:
        >>> [each.shape for each in as_inputs(torch.rand(2, 3))]
        [torch.Size([2, 3])]
    """
    if isinstance(example_inputs, torch.Tensor | rnn.PackedSequence):
        return (example_inputs,)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs)
    raise ArgumentError(
        f"example_inputs={type(example_inputs).__name__} object is neither a tensor nor a tuple; "
        "give one tensor, or a tuple of the positional inputs"
    )


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"model={type(model).__name__} object is not a torch.nn.Module; give the model itself"
        )
    for name, module in model.named_modules():
        if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
            raise ArgumentError(
                f"model: layer {name!r} ({type(module).__name__}) has no shape yet; call the model "
                "once on a batch first"
            )
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


def _mark_mode(graph: Graph, root: nn.Module, absent: dict[str, Any]) -> None:
    """Write ``facts(node).follows_mode``: traced in the opposite mode, its arguments differ."""
    if not any(_holds_flag(node.args) or _holds_flag(node.kwargs) for node in graph.nodes):
        return
    modules = list(root.modules())
    for module in modules:
        module.training = not module.training
    try:
        opposite = LeanTracer().trace(root, absent)
    finally:
        for module in modules:
            module.training = not module.training
    if [node.name for node in graph.nodes] != [node.name for node in opposite.nodes]:
        return
    for node, other in zip(graph.nodes, opposite.nodes, strict=True):
        same = str(node.args) == str(other.args) and str(node.kwargs) == str(other.kwargs)
        facts(node).follows_mode = not same


def _keep_layers(captured: GraphModule, root: nn.Module) -> None:
    """Keep layers whole of which forward reads a parameter: torch.fx would keep that alone."""
    for node in captured.graph.nodes:
        owner = str(node.target).rpartition(".")[0]
        if node.op == "get_attr" and owner and type(root.get_submodule(owner)) in REBUILDERS:
            captured.set_submodule(owner, root.get_submodule(owner))


def _holds_flag(arguments: object) -> bool:
    if isinstance(arguments, dict):
        arguments = tuple(value for name, value in arguments.items() if name != "inplace")
    if isinstance(arguments, tuple | list):
        return any(_holds_flag(each) for each in arguments)
    return isinstance(arguments, bool)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}".removesuffix(".")
