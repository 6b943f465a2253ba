"""Find layers that the graph of a model does not show: never called, or inside a leaf module."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.fx import GraphModule

from lean_fx.capture.tracing import is_leaf
from lean_fx.graph.calls import called_modules, has_hooks, modules_by_name
from lean_fx.layers.kinds import has_own_kind, kind_of
from lean_fx.skip_reason import LeftAlone, SkipReason

WEIGHT_READ = SkipReason("weight_read_in_forward", "forward reads its weight itself")


def uncalled_layers(
    model: nn.Module, graph_module: GraphModule, called: set[str]
) -> list[LeftAlone]:
    """Why layers that no node calls are left alone.

    Args:
        model: the model itself.
        graph_module: its graph.
        called: the names of what the graph calls.
    """
    modules = dict(model.named_modules())
    read = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    owners = {name.rpartition(".")[0] for name in read}
    left: list[LeftAlone] = []
    for name, layer in modules.items():
        if not _is_layer(layer) or not name or name in called:
            continue
        holder = _holder(name, called)
        if holder and _answers_for_inside(graph_module.get_submodule(holder)):
            continue  # part of a leaf layer, which has a record of its own
        reason = SkipReason("not_called", "not called in forward")
        if name in owners:
            reason = WEIGHT_READ
        if name in read:
            text = "called in training only, or in evaluation only"
            reason = SkipReason("one_mode_only", text)
        if holder:
            state = "has hooks" if has_hooks(modules[holder]) else "is not traced"
            reason = SkipReason("inside_leaf", f"inside {holder}, which {state}")
        left.append(LeftAlone(name, type(layer).__name__, reason))
    return left


def layers_inside_leaves(graph_module: nn.Module) -> frozenset[str]:
    """The layers inside modules that are not traced, by name.

    Args:
        graph_module: a GraphModule.
    """
    assert isinstance(graph_module, GraphModule)
    called = called_modules(graph_module.graph)
    modules = dict(graph_module.named_modules())
    return frozenset(
        name
        for name, layer in modules.items()
        if _is_layer(layer)
        and (holder := _holder(name, called))
        and not _answers_for_inside(modules[holder])
    )


def has_weights_inside_leaves(graph_module: GraphModule) -> bool:
    """Whether a module that is not traced holds parameters that may multiply values."""
    modules = modules_by_name(graph_module)
    return any(
        not _answers_for_inside(modules[name])
        and any(parameter.dim() > 1 for parameter in modules[name].parameters())
        for name in called_modules(graph_module.graph)
    )


def _answers_for_inside(module: nn.Module) -> bool:
    """Whether the record of a leaf covers what the leaf holds; that of a subclass does not."""
    subclass = kind_of(module) is not None and not has_own_kind(module)
    return not subclass and is_leaf(module)


def _is_layer(module: nn.Module) -> bool:
    return has_own_kind(module) or type(module) is nn.MultiheadAttention


def _holder(name: str, called: set[str]) -> str:
    """The module that is called and has the layer inside, or an empty string."""
    return next((each for each in holders_of(name) if each in called), "")


def holders_of(name: str) -> list[str]:
    """The names of what a module is in, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def part_names(model: nn.Module) -> list[str]:
    """What the layers of stacks and of attention that are not split would be called."""
    names: list[str] = []
    for name, module in model.named_modules():
        parts: Iterable[object] = ()
        if isinstance(module, nn.RNNBase) and module.num_layers > 1:
            parts = range(module.num_layers)
        elif isinstance(module, nn.MultiheadAttention):
            parts = ("in_proj", "q_proj", "k_proj", "v_proj", "out_proj")
        names += [f"{name}.{part}" for part in parts]
    return names
