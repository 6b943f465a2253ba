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
summed and dropped: C' C_in more, and a matrix of C'^2 for the positions of one block alone.

The gradient, for ``g`` that arrives at ``out``::

    gy[i] = (g[i] - sign(y[i]) sum_j g[j] y[j] / s) / s
    gu[k] = sum_i gy[i] X[i,k]
    gr[i] = sum_k gu[k] X[i,k]
    gV[i] = gr[i] / d[i]                    gd[i] = -gV[i] r[i]
    gX[i,k] = gy[i] u[k] + r[i] gu[k] + (through d)
    through d, X >= 0:      gd[i] t[k] + sum_j gd[j] X[j,k]
    through d, else:        sum_j sign(G[i,j]) (gd[i] + gd[j]) X[j,k]

``x`` and sums of C' (or C'') values a position are all that is kept for it. On a CPU positions are
taken in blocks that stay in the cache, since each line above is one more pass over them.

Where ``d`` or ``s`` is zero (a channel or position of zeros) it is taken as one: the numerators are
zero there too, so the output and the gradient through it are zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bytes of x in one block, for each thread: smaller ones cost more calls than the cache gives back.
_BLOCK_BYTES = 1024 * 1024


def without_zeros(divisor: Tensor) -> Tensor:
    """A divisor of 0 or more with its zeros (and denormals, whose inverse overflows) made 1."""
    return divisor.masked_fill(divisor <= torch.finfo(divisor.dtype).tiny, 1.0)


def absolute_affinity_sums(rows: Tensor) -> Tensor:
    """``d[j] = sum_i |sum_k X[i,k] X[j,k]|`` for values of any sign.

    Shape:
        - rows: ``[..., C', C'']``
        - output: ``[..., C']``
    """
    rows = rows.contiguous()  # other strides take bmm's slow way
    return (rows @ rows.mT).abs().sum(-1)


def column_walk(x: Tensor, seed: Tensor, nonnegative: bool) -> Tensor:
    """``out`` of the module docstring, for all positions; differentiable once.

    Shape:
        - x: ``[N, C', C'', P]``, P positions for each of N; any strides
        - seed: ``[C']``
        - output: ``[N, C', 1, P]``
    """
    out: Tensor = _ColumnWalk.apply(x, seed, nonnegative)  # type: ignore[no-untyped-call]
    return out


class _ColumnWalk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, nonnegative: bool) -> Tensor:
        count, preserved, reducible, positions = x.shape
        y, d, out = (x.new_empty(count, preserved, 1, positions) for _ in range(3))
        u = x.new_empty(count, 1, reducible, positions)
        for part in _blocks(x):
            block = x[part].contiguous()
            product = torch.empty_like(block)
            if nonnegative:
                t = block.sum(1, keepdim=True)
                sums = torch.mul(block, t, out=product).sum(2, keepdim=True)
            else:
                sums = absolute_affinity_sums(block.permute(0, 3, 1, 2)).mT.unsqueeze(2)
            d[part] = without_zeros(sums)
            r = seed.view(-1, 1, 1) / d[part]
            u[part] = torch.mul(block, r, out=product).sum(1, keepdim=True)
            y[part] = torch.mul(block, u[part], out=product).sum(2, keepdim=True)
            out[part] = y[part] / _norm(y[part])
        # u is kept where all that is kept stays below 1.5 times x.
        keeps_u = 2 * preserved + reducible < preserved * reducible / 2
        ctx.save_for_backward(x, seed, y, d, u if keeps_u else None)
        ctx.nonnegative = nonnegative
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, seed, y_all, d_all, u_all = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_seed = torch.zeros_like(seed)
        for part in _blocks(x):
            block, g, y, d = x[part].contiguous(), grad[part], y_all[part], d_all[part]
            product = torch.empty_like(block)
            r = seed.view(-1, 1, 1) / d
            if u_all is None:
                u = torch.mul(block, r, out=product).sum(1, keepdim=True)
            else:
                u = u_all[part]

            s = _norm(y)
            along = (g * y).sum(1, keepdim=True).div_(s)
            gy = torch.addcmul(g, y.sign(), along, value=-1).div_(s)
            gu = torch.mul(block, gy, out=product).sum(1, keepdim=True)
            gr = torch.mul(block, gu, out=product).sum(2, keepdim=True)
            gv = gr.div_(d)
            grad_seed += gv.sum((0, 2, 3))
            gd = -gv * r

            if ctx.nonnegative:
                t = block.sum(1, keepdim=True)
                gt = torch.mul(block, gd, out=product).sum(1, keepdim=True)
                torch.addcmul(gt, gd, t, out=product)
            else:
                product = _through_absolute_sums(block, gd)
            product.addcmul_(r, gu)
            torch.addcmul(product, gy, u, out=grad_x[part])
        return grad_x, grad_seed, None


def _norm(y: Tensor) -> Tensor:
    return without_zeros(y.abs().sum(1, keepdim=True))


def _through_absolute_sums(block: Tensor, gd: Tensor) -> Tensor:
    rows, weights = block.permute(0, 3, 1, 2).contiguous(), gd.permute(0, 3, 1, 2)
    signs = (rows @ rows.mT).sign_()
    signs.mul_(weights + weights.mT)
    return (signs @ rows).permute(0, 2, 3, 1).contiguous()


def _blocks(x: Tensor) -> Iterator[tuple[slice, ...]]:
    """Slices of N, or of P where there is no more than one of N; all at once off the CPU."""
    count, _, _, positions = x.shape
    axis, length = (0, count) if count > 1 else (3, positions)
    each = max(1, x.numel() // max(1, length) * x.element_size())
    step = max(1, _BLOCK_BYTES * torch.get_num_threads() // each) if x.is_cpu else max(1, length)
    for start in range(0, length, step):
        yield (slice(None),) * axis + (slice(start, start + step),)
