"""The GraphModule of a captured model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule

from lean_fx.cloning import rebind_functions
from lean_fx.graph.calls import BACKWARD_HOOKS, CALL_HOOKS, modules_by_name
from lean_fx.graph.parts import Part, StandIn, check_frozen, missing, reorder, stand_for
from lean_fx.layers.kinds import has_own_kind

# The hooks of calls of a model, and of gradients that reach it.
_ROOT_HOOKS = (
    *CALL_HOOKS,
    *BACKWARD_HOOKS,
    *("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks_with_kwargs",
)
_STATE_HOOKS = (
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
_HELD = ("_modules", "_parameters", "_buffers")
#: For each module of a tree, the names of what it holds, in order.
_Order = dict[str, list[list[str]]]
_RECORD = "lean_fx.record"


class CapturedModule(GraphModule):
    """A GraphModule that keeps what torch's own loses.

    1. Copies keep the hooks of the model itself.
    2. Buffers that the model leaves out of its state_dict stay out of it in copies and pickles.
    3. Copies and pickles keep the order of parameters, on which the state of optimizers depends.
    4. A number or function that forward reads is part of the graph. Assigning another one raises:
       it would change nothing.
    5. ``half()`` and the like leave constants of the graph in their dtype, as they leave a
       ``torch.tensor([0.5])`` in forward.
    6. A module that was traced into leaves a stand-in that shows what it was
       (:mod:`lean_fx.graph.parts`).

    Example:
        >>> import torch
        >>> class Scaled(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.factor = 2.0
        ...     def forward(self, x):
        ...         return self.factor * x
        >>> from lean_fx.capture.capturing import capture
        >>> capture(Scaled()).factor = 3.0
        Traceback (most recent call last):
        ...
        lean_fx.errors.CaptureError: factor was 2.0 when the model was captured, and is part of \
its graph; set it on the model, and capture that again
    """

    def __setattr__(self, name: str, value: Any) -> None:
        graph = vars(self).get("_graph")
        if graph is not None and name not in self._modules:
            read = record_of(graph).frozen.get("", {})
            if name in read:
                check_frozen(name, read[name], value)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            graph = vars(self).get("_graph")
            part = record_of(graph).parts.get("") if graph is not None else None
            raise missing(part, name, error) from None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        buffers = self._buffers.items()
        constants = {name: each for name, each in buffers if name.startswith("_tensor_constant")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in constants.items():
            after = self._buffers[name]
            if before is not None and after is not None and before.dtype != after.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphModule:
        copied = super().__deepcopy__(memo)
        memo[id(self)] = copied
        for hooks in _ROOT_HOOKS:
            setattr(copied, hooks, copy.deepcopy(getattr(self, hooks), memo))
        rebind_functions(copied, memo)
        keep_unsaved(copied, self)
        guard_parts(copied)
        _sort(copied, _order(self))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        unsaved = {
            name: sorted(module._non_persistent_buffers_set)
            for name, module in self.named_modules()
            if module._non_persistent_buffers_set
        }
        return _restored, (super().__reduce__(), unsaved, _order(self))


def _restored(reduced: tuple[Any, ...], unsaved: dict[str, list[str]], order: _Order) -> nn.Module:
    make, arguments = reduced[:2]
    made: nn.Module = make(*arguments)
    for name, buffers in unsaved.items():
        made.get_submodule(name)._non_persistent_buffers_set |= set(buffers)
    _sort(made, order)
    return made


def _order(module: nn.Module) -> _Order:
    """The order of the children, parameters and buffers of each module in a tree, by its name."""
    return {
        name: [[*vars(each)[held]] for held in _HELD]
        for name, each in module.named_modules(remove_duplicate=False)
    }


def _sort(module: nn.Module, order: _Order) -> None:
    """Sort a tree of modules in place; torch.fx makes it anew in the order of the nodes."""
    for name, each in module.named_modules(remove_duplicate=False):
        for held, names in zip(_HELD, order.get(name, ()), strict=False):
            reorder(vars(each)[held], names)


def keep_hooks(captured: GraphModule, root: nn.Module) -> None:
    """Keep the hooks of the model itself, and the state_dict hooks of its containers.

    The captured model has new containers. One with other hooks is a leaf, and keeps them.
    """
    for hooks in _ROOT_HOOKS:
        setattr(captured, hooks, getattr(root, hooks))
    modules = modules_by_name(captured)
    for name, module in root.named_modules():
        there = modules.get(name, module)
        for hooks in _STATE_HOOKS if there is not module else ():
            setattr(there, hooks, OrderedDict(getattr(module, hooks)))
        for key, hook in there._load_state_dict_pre_hooks.items():
            if hook.with_module:  # such a hook knows its module
                there._load_state_dict_pre_hooks[key] = type(hook)(hook.hook, there)


def keep_layers(captured: GraphModule, root: nn.Module) -> None:
    """Keep each layer whose parameter forward reads; torch.fx would keep only the parameter."""
    modules = modules_by_name(root)
    for node in captured.graph.nodes:
        owner = str(node.target).rpartition(".")[0]
        if node.op == "get_attr" and owner and has_own_kind(modules.get(owner)):
            captured.set_submodule(owner, modules[owner])


def keep_unsaved(graph_module: nn.Module, root: nn.Module) -> None:
    """Keep non-persistent buffers, and constants of the graph, out of state_dicts.

    torch.fx makes buffers of the constants, and every buffer that it copies persistent.
    """
    modules = dict(root.named_modules())
    constants = graph_module._buffers.keys() - root._buffers.keys()
    graph_module._non_persistent_buffers_set |= constants
    for name, there in graph_module.named_modules():
        unsaved = modules[name]._non_persistent_buffers_set if name in modules else set()
        there._non_persistent_buffers_set |= unsaved & there._buffers.keys()


@dataclass(frozen=True)
class Record:
    """What a graph keeps of its model; copies of the graph have it too.

    Attributes:
        parts: the modules of the model, by name.
        frozen: the attributes that forward has read, such as numbers and functions: their values,
            by the names of the module and the attribute.
        mode_readers: the names of the modules whose ``training`` forward has read.
    """

    parts: Mapping[str, Part] = field(default_factory=dict)
    frozen: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    mode_readers: frozenset[str] = frozenset()


def record_of(graph: Graph) -> Record:
    """The record of a graph; an empty one if there is none."""
    last = next(iter(reversed(graph.nodes)), None)
    return Record() if last is None else last.meta.get(_RECORD, Record())


def update_record(graph: Graph, **known: Any) -> None:
    """Set fields of the record of a graph."""
    next(iter(reversed(graph.nodes))).meta[_RECORD] = replace(record_of(graph), **known)


def guard_parts(graph_module: GraphModule) -> None:
    """Put stand-ins where modules were traced into, and guard the attributes that forward reads."""
    modules = dict(graph_module.named_modules())
    known = record_of(graph_module.graph)
    parts, frozen = known.parts, known.frozen
    for path, module in modules.items():
        if path and type(module) is nn.Module and (path in parts or path in frozen):
            stand_for(module, parts.get(path), frozen.get(path, {}))
    for path in {*parts, *frozen} & modules.keys():
        plain = parts[path].plain if path in parts else {}
        # A schedule may look for them; a function could not be pickled, a list changed in silence.
        read = {
            key: each
            for key, each in frozen.get(path, {}).items()
            if not (callable(each) or isinstance(each, list | dict))  # nor one that is missing
        }
        if path == "" or isinstance(modules[path], StandIn):
            names = (plain | read).keys() - dir(modules[path])
            modules[path].__dict__.update({name: (plain | read)[name] for name in names})
