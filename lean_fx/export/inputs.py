"""The inputs of an export: which axes may have any size, and the sizes to check."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lean_fx.errors import ArgumentError

#: For each input, the names of the axes that may have any size.
Axes = tuple[dict[int, str], ...]


def batch_axes(inputs: Sequence[Any], dynamic: bool) -> Axes:
    """Axis 0 of every input that has axes, or none of them.

    Raises:
        ArgumentError: an input is not a tensor, or has no rows, or the batches differ.

    Example:
        >>> batch_axes((torch.rand(2, 3),), True)
        ({0: 'batch'},)
    """
    if not all(isinstance(value, Tensor) for value in inputs):
        raise ArgumentError("example_inputs: an input is not a tensor; give tensors, batch first")
    batches = [value.shape[0] for value in inputs if value.dim()]
    if 0 in batches:
        raise ArgumentError("export_onnx: example_inputs have no rows; give one or more")
    if not dynamic:
        return tuple({} for _ in inputs)
    if len({*batches}) > 1:
        sizes = ", ".join(map(str, batches))
        raise ArgumentError(
            f"example_inputs: batches of {sizes} differ; give one batch size, or dynamic_shapes"
        )
    return tuple({0: "batch"} if value.dim() else {} for value in inputs)


def check_axes(inputs: Sequence[Any], shapes: Any) -> Axes:
    """The axes that a user named, for tensors that have them.

    Raises:
        ArgumentError: they do not fit the inputs, or one name has two sizes.

    Example:
        >>> check_axes((torch.rand(2, 7, 3),), ({0: "batch", -2: "length"},))
        ({0: 'batch', 1: 'length'},)
    """
    if not isinstance(shapes, tuple | list) or len(shapes) != len(inputs):
        raise ArgumentError(
            f"export_onnx: dynamic_shapes is not a sequence of a mapping for each of {len(inputs)} "
            "inputs; give such as ({0: 'batch', 1: 'length'},)"
        )
    sizes: dict[str, int] = {}
    found = []
    for place, (value, named) in enumerate(zip(inputs, shapes, strict=True)):
        if not isinstance(value, Tensor):
            raise ArgumentError(f"example_inputs: input {place} is not a tensor; give tensors")
        if named is not None and not isinstance(named, Mapping):
            raise ArgumentError(
                f"export_onnx: dynamic_shapes: {named!r} is not a mapping for input {place}; give "
                "such as {0: 'batch', 1: 'length'}, or {}"
            )
        axes: dict[int, str] = {}
        for axis, name in (named or {}).items():
            _check_axis(value, place, axis, name)
            _check_size(name, value.shape[axis], sizes)
            axes[axis % value.dim()] = name
        found.append(axes)
    return tuple(found)


def _check_axis(value: Tensor, place: int, axis: Any, name: Any) -> None:
    if type(axis) is not int or not -value.dim() <= axis < value.dim():
        raise ArgumentError(
            f"export_onnx: dynamic_shapes: {axis!r} is not an axis of input {place}, which has "
            f"{value.dim()}; give one of those"
        )
    if not isinstance(name, str) or not name.isidentifier():
        raise ArgumentError(
            f"export_onnx: dynamic_shapes: {name!r} is not a name of a size; give a word"
        )


def _check_size(name: str, size: int, sizes: dict[str, int]) -> None:
    """Check a size beside those by name that are known, and add it to them."""
    if sizes.setdefault(name, size) != size:
        raise ArgumentError(
            f"export_onnx: dynamic_shapes: {name!r} is {sizes[name]} and {size} in the example "
            "inputs; give it one size, or two names"
        )
    if size == 0:
        raise ArgumentError(f"export_onnx: {name!r} is 0 in the example inputs; give 1 or more")


def without_ones(inputs: Sequence[Tensor], axes: Axes) -> tuple[Tensor, ...]:
    """The inputs with axes of any size at 2 where they are 1, which the exporter would freeze."""
    ones = {
        name: 2
        for value, of in zip(inputs, axes, strict=True)
        for axis, name in of.items()
        if value.shape[axis] == 1
    }
    return with_sizes(inputs, axes, ones)


def sizes_to_check(inputs: Sequence[Tensor], axes: Axes) -> Iterator[dict[str, int]]:
    """The sizes at which a file is compared with its model.

    Example:
        >>> list(sizes_to_check((torch.rand(2, 8),), ({0: "batch", 1: "length"},)))
        [{'batch': 1, 'length': 4}, {'batch': 2, 'length': 8}, {'batch': 5, 'length': 16}]
    """
    given = {
        name: value.shape[axis]
        for value, of in zip(inputs, axes, strict=True)
        for axis, name in of.items()
    }
    if not given:
        yield {}
        return
    for batch, factor in ((1, 0.5), (2, 1), (5, 2)):
        yield {
            name: batch if name == "batch" else max(1, int(size * factor))
            for name, size in given.items()
        }


def with_sizes(
    inputs: Sequence[Tensor], axes: Axes, sizes: Mapping[str, int]
) -> tuple[Tensor, ...]:
    """The inputs with named axes resized; their values repeat."""
    made = []
    for value, of in zip(inputs, axes, strict=True):
        for axis, name in of.items():
            value = resized(value, sizes.get(name), axis)
        made.append(value)
    return tuple(made)


def resized(value: Tensor, size: int | None, axis: int = 0) -> Tensor:
    """An input with ``size`` rows, which repeat its own; unchanged without a size or an axis.

    Example:
        >>> resized(torch.tensor([7, 8]), 3)
        tensor([7, 8, 7])
    """
    if size is None or not value.dim():
        return value
    return value.index_select(axis, torch.arange(size, device=value.device) % value.shape[axis])
