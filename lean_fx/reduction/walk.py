r"""One step of LEAN's random walk and its gradient in closed form, without a C' x C' matrix.

Notation, for one position: ``X`` is C' x C'', ``V`` the seed, ``G = X X^T``; sums run over i, j in
C' and k in C''. Column mode reads ``y = G D^-1 V`` with ``d[j] = sum_i |G[i,j]|``, so::

    r[i] = V[i] / d[i]
    u[k] = sum_i r[i] X[i,k]
    y[i] = sum_k X[i,k] u[k]
    out  = y / s,   s = sum_i |y[i]|

Only ``d`` depends on the signs. If ``X >= 0``, ``|G| = G`` factors::

    t[k] = sum_i X[i,k]
    d[i] = sum_k X[i,k] t[k]

so a position costs about 4 C_in multiply-adds. If not, ``G`` is formed for a block of positions,
summed and dropped: C' C_in more, and a matrix of C'^2 for only the positions of one block.

Damping ``lam`` replaces ``d[i]`` by ``d[i] + lam mean_j d[j]``, and in the gradient below ``gd[i]``
by ``gd[i] + lam mean_j gd[j]``. A norm floor ``f`` replaces ``s`` by ``s + f``.

The gradient, for ``g`` that arrives at ``out``::

    gy[i] = (g[i] - sign(y[i]) sum_j g[j] y[j] / s) / s
    gu[k] = sum_i gy[i] X[i,k]
    gr[i] = sum_k gu[k] X[i,k]
    gV[i] = gr[i] / d[i]                    gd[i] = -gV[i] r[i]
    gX[i,k] = gy[i] u[k] + r[i] gu[k] + (through d)
    through d, X >= 0:      gd[i] t[k] + sum_j gd[j] X[j,k]
    through d, else:        sum_j sign(G[i,j]) (gd[i] + gd[j]) X[j,k]

``x`` and sums of C' (or C'') values a position are all that is kept for it. On a CPU positions are
taken in blocks that stay in the cache, since each line above is one more pass over them; under
``torch.compile`` they are taken at once, and the compiler fuses the lines.

Where ``d`` or ``s`` is zero (a channel or position of zeros) it is taken as one: the numerators are
zero there too, so the output and the gradient through it are zero.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lean_fx.reduction.options import Walk
from lean_fx.reduction.reference import (
    absolute_affinity_sums,
    damped,
    gradient_with_a_graph,
    reference_walk,
    without_zeros,
)

# Bytes of X (and of G, where it is formed) in one block, for each thread: smaller blocks cost more
# calls than the cache gives back.
_BLOCK_BYTES = 2 * 1024 * 1024


def without_zeros_(divisor: Tensor) -> Tensor:
    """As :func:`lean_fx.reduction.reference.without_zeros`, in place."""
    positive: Tensor = torch.threshold_(divisor, torch.finfo(divisor.dtype).tiny, 1.0)
    return positive


def column_walk(x: Tensor, seed: Tensor, walk: Walk) -> Tensor:
    """``out`` of the module docstring, for all positions; a gradient of its gradient is plain.

    Shape:
        - x: ``[N, C', C'', P]``, P positions for each of N; any strides
        - seed: ``[C']``
        - output: ``[N, C', 1, P]``
    """
    fusible: Any = _FusibleWalk  # apply is typed from torch 2.14 on
    blocked: Any = _BlockedWalk
    if torch.compiler.is_compiling():
        out = fusible.apply(x, seed, walk.nonnegative, walk.damping, walk.norm_floor)
    else:
        out = blocked.apply(x, seed, walk)
    return out  # type: ignore[no-any-return]


class _FusibleWalk(torch.autograd.Function):
    """The formulas one by one, for a compiler."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, seed: Tensor, nonnegative: bool, damping: float, norm_floor: float
    ) -> Tensor:
        t = x.sum(1, keepdim=True) if nonnegative else None
        if t is not None:
            d = (x * t).sum(2, keepdim=True)
        else:
            d = absolute_affinity_sums(x.permute(0, 3, 1, 2)).mT.unsqueeze(2)
        d = without_zeros(damped(d, 1, damping))
        u = (x * (seed.view(-1, 1, 1) / d)).sum(1, keepdim=True)
        y = (x * u).sum(2, keepdim=True)
        s = y.abs().sum(1, keepdim=True)
        s = without_zeros(s + norm_floor if norm_floor else s)
        ctx.damping = damping
        ctx.save_for_backward(x, seed, t, d, u, y, s)
        return y / s

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, seed, t, d, u, y, s = ctx.saved_tensors
        r = seed.view(-1, 1, 1) / d
        gy = (grad - y.sign() * (grad * y).sum(1, keepdim=True) / s) / s
        gu = (x * gy).sum(1, keepdim=True)
        gv = (x * gu).sum(2, keepdim=True) / d
        gd = damped(-gv * r, 1, ctx.damping)
        if t is not None:
            through_d = gd * t + (x * gd).sum(1, keepdim=True)
        else:
            through_d = _through_absolute_sums(x, gd)
        return gy * u + r * gu + through_d, gv.sum((0, 2, 3)), None, None, None


class _BlockedWalk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, walk: Walk) -> Tensor:
        count, preserved, reducible, positions = x.shape
        d, y, out = (x.new_empty(count, preserved, 1, positions) for _ in range(3))
        s = x.new_empty(count, 1, 1, positions)
        # t and u are kept where all that is kept stays below 1.5 times x.
        room = preserved * reducible // 2 - 2 * preserved - 1
        t_all = x.new_empty(count, 1, reducible, positions) if 2 * reducible < room else None
        u_all = x.new_empty(count, 1, reducible, positions) if reducible < room else None
        parts = _blocks(x, walk.nonnegative)
        scratch = x.new_empty(x[parts[0]].numel())
        for part in parts:
            block = x[part].contiguous()
            if walk.nonnegative:
                t = torch.sum(block, 1, keepdim=True, out=_at(t_all, part))
                d_part = _sum_of_products(block, t, 2, scratch, d[part])
            else:
                sums = absolute_affinity_sums(block.permute(0, 3, 1, 2))
                d_part = d[part].copy_(sums.mT.unsqueeze(2))
            if walk.damping:
                d_part += walk.damping * d_part.mean(1, keepdim=True)
            without_zeros_(d_part)
            r = seed.view(-1, 1, 1) / d_part
            u = _sum_of_products(block, r, 1, scratch, _at(u_all, part))
            y_part = _sum_of_products(block, u, 2, scratch, y[part])
            s_part = torch.sum(y_part.abs(), 1, keepdim=True, out=s[part])
            if walk.norm_floor:
                s_part += walk.norm_floor
            torch.div(y_part, without_zeros_(s_part), out=out[part])
        # y is kept and not out, which the caller may change in place.
        ctx.save_for_backward(x, seed, y, d, s, t_all if walk.nonnegative else None, u_all)
        ctx.walk = replace(walk, layout="contiguous")  # as the axes of x are
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, seed, y_all, d_all, s_all, t_all, u_all = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted
            out = reference_walk(x.flatten(1, 2), seed, 1, ctx.walk).unsqueeze(2)
            return *gradient_with_a_graph(out, (x, seed), grad, ctx.needs_input_grad), None
        grad_x = torch.empty_like(x)
        grad_seed = torch.zeros_like(seed)
        parts = _blocks(x, ctx.walk.nonnegative)
        scratch = x.new_empty(x[parts[0]].numel())
        for part in parts:
            block, g = x[part].contiguous(), grad[part]
            y, d, s = y_all[part], d_all[part], s_all[part]
            r = seed.view(-1, 1, 1) / d
            u = _sum_of_products(block, r, 1, scratch) if u_all is None else u_all[part]

            along = (g * y).sum(1, keepdim=True).div_(s)
            gy = torch.addcmul(g, y.sign(), along, value=-1).div_(s)
            gu = _sum_of_products(block, gy, 1, scratch)
            gv = _sum_of_products(block, gu, 2, scratch).div_(d)
            grad_seed += gv.sum((0, 2, 3))
            gd = damped(gv.mul_(r).neg_(), 1, ctx.walk.damping)

            gx = grad_x[part]
            if ctx.walk.nonnegative:
                t = block.sum(1, keepdim=True) if t_all is None else t_all[part]
                gt = _sum_of_products(block, gd, 1, scratch)
                torch.addcmul(gt, gd, t, out=gx)
            else:
                gx.copy_(_through_absolute_sums(block, gd))
            gx.addcmul_(r, gu).addcmul_(gy, u)
        return grad_x, grad_seed, None


def _sum_of_products(
    block: Tensor, weights: Tensor, axis: int, scratch: Tensor, out: Tensor | None = None
) -> Tensor:
    """``(block * weights).sum(axis, keepdim=True)``, the products laid out in ``scratch``.

    They lie with ``axis`` outside the other of axes 1 and 2: whole planes are added fastest.
    """
    count, preserved, reducible, positions = block.shape
    products = scratch[: block.numel()]
    if axis == 1:
        products = products.view(block.shape)
    else:
        products = products.view(count, reducible, preserved, positions).transpose(1, 2)
    return torch.sum(torch.mul(block, weights, out=products), axis, keepdim=True, out=out)


def _at(values: Tensor | None, part: tuple[slice, ...]) -> Tensor | None:
    return None if values is None else values[part]


def _through_absolute_sums(block: Tensor, gd: Tensor) -> Tensor:
    rows, weights = block.permute(0, 3, 1, 2).contiguous(), gd.permute(0, 3, 1, 2)
    signs = (rows @ rows.mT).sign_()
    signs.mul_(weights + weights.mT)
    return (signs @ rows).permute(0, 2, 3, 1)


def _blocks(x: Tensor, nonnegative: bool) -> list[tuple[slice, ...]]:
    """Slices of N, or of P if N is 1; a single slice for everything if not on the CPU."""
    count, preserved, reducible, positions = x.shape
    axis, length, others = (0, count, positions) if count > 1 else (3, positions, count)
    each = others * preserved * (reducible if nonnegative else reducible + preserved)
    step = length
    if x.is_cpu:
        step = _BLOCK_BYTES * torch.get_num_threads() // max(1, each * x.element_size())
    step = max(1, step)
    whole = (slice(None),) * axis
    return [(*whole, slice(start, start + step)) for start in range(0, max(1, length), step)]
