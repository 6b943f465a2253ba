"""Wrap a model that takes lists, dicts, dataclasses or None, so that all its inputs are tensors."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lean_fx.capture.example_inputs import call, call_arguments


class OfTensors(nn.Module):
    """Calls a model with its example inputs, in which it replaces the tensors.

    Args:
        model: the model.
        inputs: its positional example inputs.

    Example:
        >>> class Summed(nn.Module):
        ...     def forward(self, values, scale=None):
        ...         return values["a"] + values["b"]
        >>> import torch
        >>> one = torch.ones(2)
        >>> OfTensors(Summed(), ({"a": one, "b": one}, None))(one, 2 * one)
        tensor([3., 3.])
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        names = ", ".join(f"x{place}" for place, _ in enumerate(tensors_in(inputs)))
        # torch.fx and torch's exporter read the number of inputs from the code of forward.
        forward = eval(f"lambda self, {names}: self.call({names})")
        self.__class__ = type(type(model).__name__, (type(self),), {"forward": forward})
        self.training = model.training  # train() would change the modes of its parts

    def call(self, *tensors: Tensor) -> Any:
        """Call the model."""
        return call(self.model, _with(self.inputs, iter(tensors)))


def of_tensors(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
    """A model that takes only tensors, by position, and these; the model itself if it does so."""
    found = tuple(tensors_in(inputs))
    named = call_arguments(model, inputs)[1]
    plain = len(found) == len(inputs) and all(map(_is_tensor, inputs)) and not named
    return (model, inputs) if plain or not found else (OfTensors(model, inputs), found)


def tensors_in(value: Any) -> Iterator[Any]:
    """The tensors in lists, tuples, dicts and dataclasses, in their order."""
    if _is_tensor(value):
        yield value
    for each in _parts(value):
        yield from tensors_in(each)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor | PackedSequence)


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _parts(value: Any) -> list[Any]:
    if _is_tensor(value):
        return []
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, dict):
        return list(value.values())
    if _is_dataclass(value):
        return [getattr(value, each.name) for each in dataclasses.fields(value)]
    return []


def _with(value: Any, tensors: Iterator[Any]) -> Any:
    """The value with its tensors replaced, in order."""
    if _is_tensor(value):
        return next(tensors)
    parts = [_with(each, tensors) for each in _parts(value)]
    if isinstance(value, dict):
        made = copy.copy(value)
        made.update(zip(value, parts, strict=True))
        return made
    if _is_dataclass(value):
        made = copy.copy(value)
        for each, part in zip(dataclasses.fields(value), parts, strict=True):
            object.__setattr__(made, each.name, part)
        return made
    if isinstance(value, list | tuple):
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
