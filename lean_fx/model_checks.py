"""Checks of models; each error names the part that is wrong."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lean_fx.errors import ArgumentError


def check_plain(model: nn.Module) -> None:
    """Check that neither a model nor a part of it is compiled, scripted or a parallel wrapper.

    Raises:
        ArgumentError: one is; names it.

    Example:
        >>> check_plain(nn.DataParallel(nn.Linear(4, 2)))
        Traceback (most recent call last):
        ...
        lean_fx.errors.ArgumentError: model=DataParallel object is a wrapper; give the model \
itself, its module
    """
    found = ""
    if isinstance(model, torch.jit.ScriptModule):
        found = "of TorchScript; give the model that it was made from"
    elif inner := _wrapped_by(model):
        kind = "compiled" if inner == "_orig_mod" else "a wrapper"
        found = f"{kind}; give the model itself, its {inner}"
    if found:
        raise ArgumentError(f"model={type(model).__name__} object is {found}")
    for name, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ArgumentError(
                f"model: its part {name!r} is of TorchScript; put the module that it was made from "
                "in its place"
            )
        if inner := _wrapped_by(part):
            raise ArgumentError(
                f"model: its part {name!r} is a {type(part).__name__}, which wraps a module to run "
                f"it; put that module in its place: its {inner}"
            )


def _wrapped_by(module: nn.Module) -> str:
    """The attribute of a wrapper that holds the module which it runs; empty for other modules."""
    if "_orig_mod" in module._modules:
        return "_orig_mod"
    parallel = isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel)
    return "module" if parallel else ""


def check_shapes(model: nn.Module, subject: str = "model") -> None:
    """Check that no layer is lazy, waiting for a batch to know its shape.

    Raises:
        ArgumentError: one does; names it.

    Example:
        >>> check_shapes(nn.Sequential(nn.Linear(4, 2), nn.LazyLinear(2)))
        Traceback (most recent call last):
        ...
        lean_fx.errors.ArgumentError: model: layer '1' (LazyLinear) has no shape yet; call the \
model once on a batch first
    """
    for name, module in model.named_modules():
        held = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(map(is_lazy, held)):
            kind = type(module).__name__
            raise ArgumentError(
                f"{subject}: {f'layer {name!r} ({kind})' if name else kind} has no shape yet; call "
                "the model once on a batch first"
            )


def check_values(model: nn.Module, subject: str = "model") -> None:
    """Check that every parameter and buffer has values.

    Raises:
        ArgumentError: one is on the meta device; names it.

    Example:
        >>> check_values(nn.Linear(4, 2, device="meta"))
        Traceback (most recent call last):
        ...
        lean_fx.errors.ArgumentError: model: 'weight' is on the meta device and has no values; \
give it some first, with to_empty() and load_state_dict()
    """
    name = first_without_values(model)
    if name:
        raise ArgumentError(
            f"{subject}: {name!r} is on the meta device and has no values; give it some first, "
            "with to_empty() and load_state_dict()"
        )


def first_without_values(model: nn.Module) -> str:
    """The first parameter or buffer on the meta device, by name; empty if there is none.

    Example:
        >>> first_without_values(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2, device="meta")))
        '1.weight'
    """
    named = (*model.named_parameters(), *model.named_buffers())
    return next((name for name, tensor in named if tensor.is_meta), "")
