"""The default walk by the compiled library, for tensors on the CPU: one pass over x, and back.

``x`` and the seed are all that is kept for the backward pass, which walks again. A compiler calls
the library by the operators ``lean_fx::walk`` and ``lean_fx::walk_gradient``; eager code takes a
torch.autograd.Function, whose calls cost a third as much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lean_fx.reduction.library import run_gradient, run_walk
from lean_fx.reduction.options import Walk
from lean_fx.reduction.reference import gradient_with_a_graph, reference_walk, scaled


def compiled_walk(x: Tensor, seed: Tensor, axis: int, walk: Walk) -> Tensor:
    """Reduce the channels of ``x`` along an axis; the library takes it.

    Memory in which the channels of a position stand side by side, such as channels_last, is walked
    as it is, and the output has that layout; other memory that is not contiguous is copied.

    Shape:
        - x: ``[..., C, ...]``
        - seed: ``[C']``
        - output: ``[..., C', ...]``

    Example:
        >>> from lean_fx.reduction.library import takes
        >>> x, seed = torch.rand(2, 6, 3), torch.tensor([1.0, 2.0])
        >>> walk = Walk(nonnegative=True, scale="mean")
        >>> wanted = scaled(reference_walk(x, seed, 1, walk), x, 1, walk)
        >>> not takes(x) or torch.allclose(compiled_walk(x, seed, 1, walk), wanted)
        True
    """
    last = x.movedim(axis, -1)
    aside = last.is_contiguous() and not x.is_contiguous()
    moved, place = (last, x.dim() - 1) if aside else (x.contiguous(), axis)
    before, behind = moved.shape[:place], moved.shape[place + 1 :]
    flat = moved.reshape(before.numel(), moved.shape[place], behind.numel())
    eager: Any = _CompiledWalk  # apply is typed from torch 2.14 on
    out: Tensor
    if torch.compiler.is_compiling():
        options = (walk.scale, walk.layout, walk.damping, walk.norm_floor)
        out = walk_operator(flat, seed, walk.nonnegative, *options)
    else:
        out = eager.apply(flat, seed, walk)
    out = out.reshape(*before, len(seed), *behind)
    return out.movedim(-1, axis) if aside else out


@torch.library.custom_op("lean_fx::walk", mutates_args=())
def walk_operator(
    x: Tensor,
    seed: Tensor,
    nonnegative: bool,
    scale: str,
    layout: str,
    damping: float,
    norm_floor: float,
) -> Tensor:
    """:func:`~lean_fx.reduction.library.run_walk` as an operator of torch, with a gradient."""
    return run_walk(x, seed, _walk(nonnegative, scale, layout, damping, norm_floor))


@torch.library.custom_op("lean_fx::walk_gradient", mutates_args=())
def gradient_operator(
    x: Tensor,
    seed: Tensor,
    grad: Tensor,
    nonnegative: bool,
    scale: str,
    layout: str,
    damping: float,
    norm_floor: float,
) -> tuple[Tensor, Tensor]:
    """:func:`~lean_fx.reduction.library.run_gradient` as an operator of torch."""
    walk = _walk(nonnegative, scale, layout, damping, norm_floor)
    return run_gradient(x, seed, grad, walk)


def _walk(nonnegative: bool, scale: Any, layout: Any, damping: float, norm_floor: float) -> Walk:
    return Walk(nonnegative, scale=scale, layout=layout, damping=damping, norm_floor=norm_floor)


@walk_operator.register_fake
def _(x: Tensor, seed: Tensor, *options: Any) -> Tensor:
    return x.new_empty(x.shape[0], seed.shape[0], x.shape[2])


@gradient_operator.register_fake
def _(x: Tensor, seed: Tensor, grad: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), seed.new_empty(seed.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, seed, *ctx.options = inputs
    ctx.save_for_backward(x, seed)


def _back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, seed = ctx.saved_tensors
    return *gradient_operator(x, seed, grad, *ctx.options), *[None] * len(ctx.options)


walk_operator.register_autograd(_back, setup_context=_keep)


class _CompiledWalk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, walk: Walk) -> Tensor:
        ctx.save_for_backward(x, seed)
        ctx.walk = walk
        return run_walk(x, seed, walk)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, seed = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted
            out = scaled(reference_walk(x, seed, 1, ctx.walk), x, 1, ctx.walk)
            return *gradient_with_a_graph(out, (x, seed), grad, ctx.needs_input_grad), None
        return *run_gradient(x, seed, grad, ctx.walk), None
