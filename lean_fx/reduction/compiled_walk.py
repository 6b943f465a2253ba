"""The default walk by the compiled library, for tensors on the CPU: one pass over x, and back.

``x`` and the seed are all that is kept for the backward pass, which walks again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lean_fx.kernel import eager
from lean_fx.reduction.options import Layout
from lean_fx.reduction.reference import reference_walk


def compiled_walk(x: Tensor, seed: Tensor, axis: int, options: eager.Options) -> Tensor:
    """Reduce the channels of ``x`` along an axis; :func:`lean_fx.kernel.eager.takes` it.

    Memory in which the channels of a position stand side by side, such as channels_last, is walked
    as it is, and the output has that layout; other memory that is not contiguous is copied.

    Shape:
        - x: ``[..., C, ...]``
        - seed: ``[C']``
        - output: ``[..., C', ...]``

    Example:
        >>> from lean_fx.reduction.reference import reference_walk
        >>> x, seed = torch.rand(2, 6, 3), torch.tensor([1.0, 2.0])
        >>> wanted = reference_walk(x, seed, 1, True, "column", "contiguous", 1, None, 0.0, 0.0)
        >>> options = eager.Options(True, False, 0.0, 0.0)
        >>> not eager.takes(x) or torch.allclose(compiled_walk(x, seed, 1, options), wanted)
        True
    """
    last = x.movedim(axis, -1)
    aside = last.is_contiguous() and not x.is_contiguous()
    moved, place = (last, x.dim() - 1) if aside else (x.contiguous(), axis)
    before, behind = moved.shape[:place], moved.shape[place + 1 :]
    flat = moved.reshape(before.numel(), moved.shape[place], behind.numel())
    out: Tensor = _CompiledWalk.apply(flat, seed, options)  # type: ignore[no-untyped-call]
    out = out.reshape(*before, len(seed), *behind)
    return out.movedim(-1, axis) if aside else out


class _CompiledWalk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, options: eager.Options) -> Tensor:
        ctx.save_for_backward(x, seed)
        ctx.options = options
        return eager.walk(x, seed, options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, seed = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted
            return *_differentiable(x, seed, grad, ctx.needs_input_grad[:2], ctx.options), None
        return *eager.gradient(x, seed, grad, ctx.options), None


def _differentiable(
    x: Tensor, seed: Tensor, grad: Tensor, needed: tuple[bool, bool], options: eager.Options
) -> tuple[Tensor | None, ...]:
    """The gradient by way of plain operations, which have gradients of their own."""
    layout: Layout = "interleaved" if options.interleaved else "contiguous"
    walk = (options.nonnegative, "column", layout, 1, None)
    out = reference_walk(x, seed, 1, *walk, options.damping, options.norm_floor)
    wanted = [value for value, need in zip((x, seed), needed, strict=True) if need]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return tuple(next(found) if need else None for need in needed)
