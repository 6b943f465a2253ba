"""Copies of modules to run without a trace left, and tensors to run them on."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from lean_fx.graph.calls import BACKWARD_HOOKS
from lean_fx.graph.patching import patching, without_caches
from lean_fx.layers.input_hooks import stop_reducing


def shallow(module: nn.Module) -> nn.Module:
    """A copy to run without a trace: no hooks but ours, and what forward sets is not kept."""
    if next(module.children(), None) is not None:
        copied = clone_sharing_state(module)
        for each in copied.modules():
            ours = {key: hook for key, hook in each._forward_hooks.items() if hook is stop_reducing}
            each._forward_hooks = OrderedDict(ours)
            for hooks in BACKWARD_HOOKS:
                setattr(each, hooks, OrderedDict())
        return copied
    copied = object.__new__(type(module))  # copy.copy refuses parametrized modules
    copied.__dict__.update(module.__dict__)
    for hooks in ("_forward_hooks", *BACKWARD_HOOKS):
        setattr(copied, hooks, OrderedDict())
    return copied


def run_on(
    module: nn.Module, tensor: Callable[[Tensor], Tensor], args: Any, kwargs: Any = None
) -> Any:
    """Call a module without a trace left, on what ``tensor`` gives for its parameters and buffers.

    With its own it would write to buffers, as batch norm does.
    """
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    replaced = {name: tensor(each) for name, each in state.items()}
    with patching(without_caches(module)):
        return torch.func.functional_call(shallow(module), replaced, args, kwargs)


def clone_sharing_state(
    module: nn.Module, tensor: Callable[[Tensor], Tensor] = lambda each: each
) -> nn.Module:
    """A deep copy to run or trace without a trace left, with the same parameters and buffers.

    Args:
        module: what to copy.
        tensor: gives what takes the place of a parameter or buffer.
    """
    state = [*module.parameters(), *module.buffers()]
    replaced = {id(each): tensor(each) for each in state}
    with unset_fake_temporarily():  # which cannot copy other tensors
        return copy.deepcopy(module, replaced)


def fake_of(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A tensor of the same shape without numbers; on the CPU, if it is on the meta device.

    What is on the meta device has no numbers either, and is to be put on some device yet.
    """
    if not tensor.is_meta:
        return mode.from_tensor(tensor)
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
