"""What a call reads from memory, and what it writes there."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_LOOK_UPS = (F.embedding, F.embedding_bag)


def moved_tensors(
    called: Any, given: list[Tensor], changed: list[Tensor], output: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that a call reads, and those that it writes; none if it only returns a view.

    Args:
        called: a module, a function, or the name of a method.
        given: the tensors among its arguments.
        changed: those of them that it changes in place.
        output: what it returns.

    Example:
        >>> x = torch.zeros(2, 3)
        >>> [len(moved) for moved in moved_tensors(torch.neg, [x], [], -x)]
        [1, 1]
        >>> moved_tensors(torch.t, [x], [], x.t())
        ([], [])
    """
    known = {storage_of(each) for each in given}
    fresh = [each for each in _distinct(strided_tensors(output)) if storage_of(each) not in known]
    written = fresh + _written_in_place(changed, output)
    if not written:
        return [], []
    state = [*called.parameters(), *called.buffers()] if isinstance(called, nn.Module) else []
    return _distinct(given + state), written


def _written_in_place(changed: list[Tensor], output: Any) -> list[Tensor]:
    """The changed tensors; of several views of one storage, only those that are returned.

    Views of one storage share one version, so the call may have written to any of them. An
    assignment returns nothing, and writes to its first argument.
    """
    returned = {_part(each) for each in strided_tensors(output)}
    views_of: dict[int, list[Tensor]] = {}
    for each in _distinct(changed):
        views_of.setdefault(storage_of(each), []).append(each)
    written = []
    for views in views_of.values():
        written += [view for view in views if _part(view) in returned] or views[:1]
    return written


def read_bytes(called: Any, read: list[Tensor]) -> int:
    """The bytes of the tensors that a call reads; of a table only the rows that it looks up."""
    total = sum(map(bytes_in_memory, read))
    if isinstance(called, nn.Embedding | nn.EmbeddingBag) or called in _LOOK_UPS:
        indices, table = read[0], read[-1] if isinstance(called, nn.Module) else read[1]
        total += indices.numel() * table[0].nbytes - table.nbytes
    return total


def bytes_in_memory(tensor: Tensor) -> int:
    """The bytes that the elements of a tensor take: an expanded axis holds one.

    Example:
        >>> bytes_in_memory(torch.zeros(2, 1)), bytes_in_memory(torch.zeros(2, 1).expand(2, 5))
        (8, 8)
    """
    axes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(min(n, 1) if step == 0 else n for n, step in axes)


def strided_tensors(values: Any) -> list[Tensor]:
    """The tensors in nested values, without sparse ones, which have no storage."""
    leaves = pytree.tree_leaves(values)
    return [x for x in leaves if isinstance(x, Tensor) and x.layout is torch.strided]


def storage_of(tensor: Tensor) -> int:
    """A number that tensors of one storage share."""
    return int(tensor.untyped_storage()._cdata)


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    """Each part of a storage once."""
    return list({_part(x): x for x in tensors}.values())


def _part(tensor: Tensor) -> tuple[Any, ...]:
    return storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()
