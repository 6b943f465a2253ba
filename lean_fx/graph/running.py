"""Run modules without changing them: on copies, on other tensors, without gradients."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx import GraphModule

from lean_fx.cloning import rebind_functions
from lean_fx.errors import quiet_loggers
from lean_fx.graph.calls import BACKWARD_HOOKS
from lean_fx.graph.patching import patching, without_caches
from lean_fx.layers.input_hooks import stop_reducing

_T = TypeVar("_T")


def runnable(module: nn.Module, tensor: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy that can run without changing the module: it has other parameters and buffers.

    With the module's own buffers a run would write to them, as batch norm does. The copy has none
    of the user's hooks, except those before a forward, since some compute a weight.

    Args:
        module: what to copy.
        tensor: gives what takes the place of a parameter or buffer.
    """
    copied = clone_sharing_state(module, tensor)
    for each in copied.modules():
        ours = {key: hook for key, hook in each._forward_hooks.items() if hook is stop_reducing}
        each._forward_hooks = OrderedDict(ours)
        for hooks in BACKWARD_HOOKS:
            setattr(each, hooks, OrderedDict())
    return copied


def runnable_parts(graph_module: GraphModule, tensor: Callable[[Tensor], Tensor]) -> nn.Module:
    """What the nodes of a graph call and read, as :func:`runnable`: an Interpreter runs on it."""
    parts = nn.Module()
    for held in ("_modules", "_parameters", "_buffers"):
        vars(parts)[held] = vars(graph_module)[held]
    parts = runnable(parts, tensor)
    read = {node.target for node in graph_module.graph.find_nodes(op="get_attr")}
    objects = {name: each for name, each in vars(graph_module).items() if name in read}
    vars(parts).update(objects)  # such as a generator of random numbers
    return parts


def run_on(module: nn.Module, tensor: Callable[[Tensor], Tensor], args: Any, kwargs: Any) -> Any:
    """Call a module as :func:`runnable`, and without the caches of its code."""
    with patching(without_caches(module)):
        return runnable(module, tensor)(*args, **kwargs)


def without_gradients(call: Callable[[], _T]) -> _T:
    """Call a function without gradients, or with them if it fails without.

    A forward may compute gradients itself, as for forces, which are the gradient of an energy, and
    in networks that solve differential equations.

    Args:
        call: runs a model; it may be called twice.

    Example:
        >>> def slope():
        ...     x = torch.tensor(3.0, requires_grad=True)
        ...     return torch.autograd.grad(x**2, x)[0]
        >>> without_gradients(slope)
        tensor(6.)
    """
    try:
        with torch.no_grad():
            return call()
    except Exception as error:  # the model's own code
        if "grad" not in str(error):
            raise
    with torch.enable_grad():
        return call()


def clone_sharing_state(
    module: nn.Module, tensor: Callable[[Tensor], Tensor] = lambda each: each
) -> nn.Module:
    """A deep copy to run or trace instead of a module, with the same parameters and buffers.

    Args:
        module: what to copy.
        tensor: gives what takes the place of a parameter or buffer.
    """
    state = [*module.parameters(), *module.buffers()]
    replaced: dict[int, Any] = {id(each): tensor(each) for each in state}
    with unset_fake_temporarily():  # which cannot copy other tensors
        copied = copy.deepcopy(module, replaced)
    rebind_functions(copied, replaced)
    return copied


def fake_errors_unlogged() -> AbstractContextManager[None]:
    """Silence torch's log of what fails on fake tensors: it is raised, and told in one line."""
    return quiet_loggers("torch._subclasses.fake_tensor")


def fake_of(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake tensor of the same shape; on the CPU if the tensor is on the meta device.

    A model on the meta device has no numbers yet, and will be moved to some device.
    """
    if not tensor.is_meta:
        return mode.from_tensor(tensor)
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
