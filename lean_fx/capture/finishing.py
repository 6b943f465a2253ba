"""Give a traced graph what torch.fx leaves out: hooks, whole layers, stable names."""

from __future__ import annotations

import operator
from collections import OrderedDict
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from lean_fx.graph.calls import modules_by_name
from lean_fx.graph.captured import ROOT_HOOKS
from lean_fx.layers.kinds import KINDS

_STATE_HOOKS = (
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


def name_items(captured: GraphModule) -> None:
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


def keep_hooks(captured: GraphModule, root: nn.Module) -> None:
    """Keep the hooks of the model itself, and the state_dict hooks of its containers.

    The captured model has new containers. One with other hooks is a leaf, and keeps them.
    """
    for hooks in ROOT_HOOKS:
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
    """Keep each layer of which forward reads a parameter; torch.fx would keep only the latter."""
    modules = modules_by_name(root)
    for node in captured.graph.nodes:
        owner = str(node.target).rpartition(".")[0]
        if node.op == "get_attr" and owner and type(modules.get(owner)) in KINDS:
            captured.set_submodule(owner, modules[owner])
