"""What a model must be to be captured, exported or measured; what is not is refused by name."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lean_fx.errors import ArgumentError

_OBSERVING = ("torch.ao.quantization.fake_quantize", "torch.ao.quantization.observer")


def check_plain(model: nn.Module) -> None:
    """Check that a model is the model itself, and not what was made of it to run.

    Raises:
        ArgumentError: it is of TorchScript, compiled, or wrapped for several devices.

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
    elif "_orig_mod" in model._modules:
        found = "compiled; give the model itself, its _orig_mod"
    elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        found = "a wrapper; give the model itself, its module"
    if found:
        raise ArgumentError(f"model={type(model).__name__} object is {found}")


def check_shapes(model: nn.Module, subject: str = "model") -> None:
    """Check that no layer waits for a batch to know its shape.

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


def quantized_by_torch(module: nn.Module) -> bool:
    """Whether a module computes in integers, or pretends to: of torch.ao.quantization.

    Example:
        >>> from torch.ao.quantization import FakeQuantize
        >>> quantized_by_torch(FakeQuantize()), quantized_by_torch(nn.Linear(4, 2))
        (True, False)
    """
    homes = [base.__module__ for base in type(module).__mro__]
    own = homes[0].startswith("torch.ao.nn.") and "quantized" in homes[0].split(".")
    return own or any(home in _OBSERVING for home in homes)


def is_quantized_layer(module: nn.Module) -> bool:
    """Whether a module is a conv, linear or recurrent layer with quantised weights.

    Example:
        >>> from torch.ao.quantization import FakeQuantize
        >>> is_quantized_layer(FakeQuantize())
        False
    """
    widths = ("in_features", "in_channels", "input_size")
    return quantized_by_torch(module) and any(hasattr(module, width) for width in widths)
