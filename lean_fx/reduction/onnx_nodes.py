"""Reductions as nodes of an ONNX graph, for export alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class _Export(threading.local):
    """Whether this thread exports; others may run models meanwhile."""

    runs = False


_export = _Export()


@contextmanager
def as_onnx_nodes() -> Iterator[None]:
    """Within it, this thread's reductions are nodes of an ONNX graph and compute nothing."""
    before, _export.runs = _export.runs, True
    try:
        yield
    finally:
        _export.runs = before


def are_onnx_nodes() -> bool:
    """Whether this thread's reductions are nodes now.

    Example:
        >>> with as_onnx_nodes():
        ...     are_onnx_nodes()
        True
        >>> are_onnx_nodes()
        False
    """
    return _export.runs


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
        parameters: the other inputs, which get the type of ``x``; the first has C' along its first
            axis.
        axis: the axis of the channels, 0 or more.
        options: the node's other attributes.
    """
    first = parameters[0]
    return torch.onnx.ops.symbolic(
        f"lean_fx::{operator}",
        (x, *(parameter.to(x.dtype) for parameter in parameters)),
        {"axis": axis, **(options or {})},
        dtype=x.dtype,
        shape=[*x.shape[:axis], first.shape[0], *x.shape[axis + 1 :]],
        version=1,
    )
