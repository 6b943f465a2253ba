"""Hooks that reduce the input of a layer, in a model that keeps its class.

A layer that is called gets a forward pre-hook. But a forward may also apply the weight of a layer
that it never calls::

    F.linear(x, self.qkv.weight, bias)                          before
    F.linear(self.qkv.reduction(x), self.qkv.weight, bias)      after

Then the module with that forward gets hooks. While it runs, they turn on a TorchFunctionMode, which
reduces the input of every call that gets this weight.

Rules:

1. The calls are F.linear and F.conv1d, conv2d, conv3d. The weight is recognised by identity; a copy
   (``weight.half()``) is not.
2. The mode belongs to the thread that runs the module. It ends with the forward, also if that
   raises. After a KeyboardInterrupt it stays on; since it acts on these weights only, no number
   changes.
3. A module that calls itself reduces once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from lean_fx.errors import PlanError
from lean_fx.layers.kinds import LAYER_OF_CALL, channel_axis, groups_of
from lean_fx.reduction.packed import with_data

Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]


def with_first(
    layer: nn.Module, args: Args, kwargs: Kwargs | None, change: Callable[[Any], Any]
) -> tuple[Args, Kwargs]:
    """The arguments of a layer's call, with the first one changed.

    Raises:
        PlanError: ``kwargs`` is None: other code has registered the hook anew, on another layer.
    """
    if kwargs is None:
        raise PlanError(
            f"{type(layer).__name__}: it took the place of a layer that reduces its input, and has "
            "not the reduction (torch.ao.quantization fuses and swaps layers so); quantise the "
            "exported file by export_onnx(quantize=...), or a model of form='graph'"
        )
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": change(kwargs["input"])}


def reduce_first(layer: Any, args: Args, kwargs: Kwargs | None = None) -> tuple[Args, Kwargs]:
    """The forward pre-hook of a layer that is called; it reduces the first argument."""
    return with_first(layer, args, kwargs, lambda value: reduced(layer, value))


class ReduceFlattened:
    """The forward pre-hook of a linear layer that reads the flattened channels of a value.

    Args:
        sizes: the sizes of the flattened axes: channels and positions, or positions and channels.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2 * 9, 4)
        >>> layer.reduction = lambda x: x[:, :2]
        >>> _ = layer.register_forward_pre_hook(ReduceFlattened((8, 9)), with_kwargs=True)
        >>> layer(torch.rand(3, 8, 3, 3).flatten(1)).shape
        torch.Size([3, 4])
    """

    def __init__(self, sizes: tuple[int, int]) -> None:
        self.sizes = sizes

    def __call__(self, layer: Any, args: Args, kwargs: Kwargs | None = None) -> tuple[Args, Kwargs]:
        """The layer's arguments, the first of them reduced."""

        def change(value: Any) -> Any:
            return layer.reduction(value.unflatten(-1, self.sizes)).flatten(-2)

        return with_first(layer, args, kwargs, change)


def reduced(layer: Any, value: Any) -> Any:
    """Reduce a value by the ``reduction`` that a layer holds, group by group if it has groups."""
    if isinstance(value, PackedSequence):
        return with_data(value, layer.reduction(value.data))
    if groups_of(layer) > 1:
        axis = channel_axis(layer, value.shape)
        parts = layer.reduction(value.unflatten(axis, (groups_of(layer), -1)))
        return parts.flatten(axis, axis + 1)
    return layer.reduction(value)


def reduce_within(module: nn.Module, layer: str) -> None:
    """Let a module reduce the inputs to which its forward applies the weight of a layer.

    Args:
        module: gets the hooks.
        layer: the name, within ``module``, of a layer that holds a ``reduction``.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.proj = nn.Linear(2, 4)
        ...     def forward(self, x):
        ...         return F.linear(x, self.proj.weight)
        >>> net = Net()
        >>> net.proj.reduction = lambda x: x[..., :2]
        >>> reduce_within(net, "proj")
        >>> net(torch.rand(3, 8)).shape
        torch.Size([3, 4])
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, StartReducing):
            hook.layers.append(layer)
            return
    module.register_forward_pre_hook(StartReducing([layer]), prepend=True)
    module.register_forward_hook(stop_reducing, always_call=True)


def reduces_within(module: nn.Module) -> bool:
    """Whether a module has the hooks of :func:`reduce_within`."""
    return any(isinstance(hook, StartReducing) for hook in module._forward_pre_hooks.values())


class StartReducing:
    """The forward pre-hook of a module that applies the weights of layers.

    Args:
        layers: their names within the module.
    """

    def __init__(self, layers: list[str]) -> None:
        self.layers = layers

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Turn the mode on; if it is on already, push one that does nothing (rule 3)."""
        stack = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        on = any(isinstance(mode, _Reducing) and mode.module is module for mode in stack)
        layers = () if on else [module.get_submodule(name) for name in self.layers]
        _Reducing(module, layers).__enter__()  # type: ignore[no-untyped-call]


def stop_reducing(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """The forward hook of a module that applies the weights of layers; it turns the mode off."""
    stack = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    mode = stack[-1] if stack else None
    if isinstance(mode, _Reducing) and mode.module is module:
        # Otherwise a hook before ours has raised, and the mode was never turned on.
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]


class _Reducing(TorchFunctionMode):
    """Reduces the input of a call that gets the weight of one of some layers."""

    def __init__(self, module: nn.Module, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.module = module
        self.layers = layers

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in LAYER_OF_CALL:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            for layer in self.layers:
                if layer.weight is weight:
                    args, kwargs = reduce_first(layer, args, kwargs)
        return func(*args, **kwargs)
