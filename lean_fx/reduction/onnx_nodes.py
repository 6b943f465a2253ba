"""Reductions as nodes of an ONNX graph, for export alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

_are_written = False


@contextmanager
def as_onnx_nodes() -> Iterator[None]:
    """Within it, a reduction is one node of an ONNX graph and computes nothing: only for export."""
    global _are_written
    before, _are_written = _are_written, True
    try:
        yield
    finally:
        _are_written = before


def are_onnx_nodes() -> bool:
    """Whether reductions are nodes now.

    Example:
        >>> with as_onnx_nodes():
        ...     are_onnx_nodes()
        True
        >>> are_onnx_nodes()
        False
    """
    return _are_written


def onnx_node(
    operator: str,
    x: Tensor,
    parameters: tuple[Tensor, ...],
    axis: int,
    options: Mapping[str, str | int | float] | None = None,
) -> Tensor:
    """What stands for the output of a node.

    Args:
        operator: a name in the domain ``lean_fx``.
        x: the values to reduce.
        parameters: the other inputs; the first has C' along its first axis.
        axis: the axis of the channels, 0 or more.
        options: the node's other attributes.
    """
    first = parameters[0]
    return torch.onnx.ops.symbolic(
        f"lean_fx::{operator}",
        (x, *parameters),
        {"axis": axis, **(options or {})},
        dtype=x.dtype,
        shape=[*x.shape[:axis], first.shape[0], *x.shape[axis + 1 :]],
        version=1,
    )
