"""Every walk of LEAN in plain operations: what compiles, exports and vmaps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lean_fx.reduction.options import Walk


def without_zeros(divisor: Tensor) -> Tensor:
    """A divisor of 0 or more with its zeros (and denormals, whose inverse overflows) made 1."""
    positive: Tensor = torch.threshold(divisor, torch.finfo(divisor.dtype).tiny, 1.0)
    return positive


def damped(sums: Tensor, axis: int, damping: float) -> Tensor:
    """``sums + damping * mean(sums)``, the mean taken over ``axis``."""
    return sums + damping * sums.mean(axis, keepdim=True) if damping else sums


def absolute_affinity_sums(rows: Tensor) -> Tensor:
    """``d[j] = sum_i |sum_k X[i,k] X[j,k]|`` for values of any sign.

    Shape:
        - rows: ``[..., C', C'']``
        - output: ``[..., C']``
    """
    rows = rows.contiguous()  # other strides take bmm's slow way
    return (rows @ rows.mT).abs().sum(-1)


def reference_walk(x: Tensor, seed: Tensor, axis: int, walk: Walk) -> Tensor:
    """The walk along ``axis`` of ``x``, with ``scale="sum"``; differentiable any number of times.

    Shape:
        - x: ``[..., C_in, ...]``
        - seed: ``[C']`` or ``[C', C'']``
        - output: ``[..., C', ...]``
    """
    preserved = seed.shape[0]
    rest = [1] * (x.dim() - axis - 1)
    # i is the axis of the preserved channels, k that of the reducible ones.
    if walk.layout == "contiguous":
        i, k = axis, axis + 1
        matrix = torch.unflatten(x, axis, (preserved, -1))
        v = seed.reshape(preserved, -1, *rest)
    else:
        i, k = axis + 1, axis
        matrix = torch.unflatten(x, axis, (-1, preserved))
        v = seed.reshape(preserved, -1).mT.reshape(-1, preserved, *rest)
    if walk.normalize == "none":
        d = torch.ones_like(matrix.narrow(k, 0, 1))
    elif walk.nonnegative:
        d = (matrix * matrix.sum(i, keepdim=True)).sum(k, keepdim=True)
    else:
        sums = absolute_affinity_sums(matrix.movedim((i, k), (-2, -1)))
        d = sums.movedim(-1, axis).unsqueeze(k)
    d = without_zeros(damped(d, i, walk.damping))
    for _ in range(walk.iterations):
        weights = v / d if walk.normalize == "column" else v
        u = (matrix * weights).sum(i, keepdim=True)
        y = (matrix * u).sum(k, keepdim=True)
        if walk.normalize == "row":
            y = y / d
        norm = y.abs().sum(i, keepdim=True)
        before, v = v, y / without_zeros(norm + walk.norm_floor if walk.norm_floor else norm)
        if walk.tol is not None and bool((v - before).detach().abs().lt(walk.tol).all()):
            break
    return v.squeeze(k)


def scaled(out: Tensor, x: Tensor, axis: int, walk: Walk) -> Tensor:
    """What a walk with ``scale="sum"`` gave for ``x``, at the scale that is asked for."""
    if walk.scale != "sum":
        out = out * out.shape[axis]
    if walk.scale == "magnitude":
        out = out * x.abs().mean(axis, keepdim=True)
    return out


def gradient_with_a_graph(
    out: Tensor, inputs: Sequence[Tensor], grad: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of what plain operations have computed, which have gradients of their own.

    Args:
        out: what was computed.
        inputs: the tensors that it was computed from.
        grad: of ``out``.
        needed: whether each input needs its gradient; there may be more.
    """
    wanted = [value for value, need in zip(inputs, needed, strict=False) if need]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return [next(found) if need else None for _, need in zip(inputs, needed, strict=False)]
