"""Forms of LEAN for deep nets, where the literal form amplifies small changes of its input.

Both weigh the reducible channels by products ``X^T V``, as LEAN does; channel ``i C'' + k`` is
``X[i, k]``. Neither divides by a sum that is small where one preserved channel is small, nor, for
values of 0 or more, by one that cancels. Scaling the input scales the output. A position of zeros
gives zeros, and never a NaN, forward and backward. Half-precision values are reduced in float32.
"""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor, nn

from lean_fx.reduction.base import Reduction
from lean_fx.reduction.onnx_nodes import are_onnx_nodes, onnx_node
from lean_fx.reduction.reference import without_zeros

# torch.fx's own tracer meets one call, not what is inside: it depends on the rank of x.
torch.fx.wrap("_simplex")
torch.fx.wrap("_gated")


class SimplexReduction(Reduction):
    """Average each group by weights that the position itself gives: C' parameters.

    ::

        v    = softmax(logits)                              C' values
        t[k] = sum_i v[i] X[i, k]
        a[k] = t[k] / sum_k |t[k]|
        y[i] = sum_k X[i, k] a[k]

    That is ``y = X X^T v``, one step of LEAN's walk, divided by the l1 norm of ``X^T v`` in place
    of those of the columns of ``X X^T``. Use it in deep nets, where ``"lean"`` amplifies noise; it
    has as few parameters. If no value is below 0, ``y[i]`` is a weighted mean of ``X[i, :]`` and
    nothing cancels; values of both signs may cancel in ``t``.

    The logits start at 0, so ``v`` is uniform.

    Args:
        in_channels: the channels ``C_in`` of the input, 1 or more.
        out_channels: the channels ``C'`` of the output, a divisor of ``in_channels``.
        dim: the axis of the channels.

    Shape:
        - input: ``[..., C_in, ...]``, ``C_in`` along ``dim``
        - output: ``[..., C', ...]``

    Example:
        >>> SimplexReduction(4, 2)(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).detach()
        tensor([[1.6000, 3.6000]])
    """

    def __init__(self, in_channels: int, out_channels: int, dim: int = 1) -> None:
        super().__init__(in_channels, out_channels, dim)
        self.logits = nn.Parameter(torch.zeros(self.out_channels))

    @property
    def macs_per_position(self) -> int:
        """Multiply-adds of one position: ``C_in`` for ``t``, ``C_in`` for ``y``."""
        return 2 * self.in_channels

    def reduce(self, x: Tensor) -> Tensor:
        """Reduce values that have ``in_channels`` along ``dim``."""
        return _simplex(x, self.logits, self.dim)


class GatedReduction(Reduction):
    """A learned sum of each group, gated by the position: 2 C_in parameters.

    ::

        u[k] = sum_j V[j, k] X[j, k]
        m    = mean |X|
        y[i] = sum_k W[i, k] X[i, k] (1 + tanh(u[k] / m))

    The products ``u``, which LEAN's walk takes too, raise or lower the weight of a channel at each
    position. Use it in deep nets, where ``"lean"`` amplifies noise, if twice the parameters of
    ``"grouped_sum"`` are few enough.

    ``W`` is drawn from a normal of variance ``1 / C''`` and ``V`` starts at 0, so it begins as
    :class:`~lean_fx.reduction.controls.GroupedSumReduction`.

    Args:
        in_channels: the channels ``C_in`` of the input, 1 or more.
        out_channels: the channels ``C'`` of the output, a divisor of ``in_channels``.
        dim: the axis of the channels.

    Shape:
        - input: ``[..., C_in, ...]``, ``C_in`` along ``dim``
        - output: ``[..., C', ...]``

    Example:
        >>> GatedReduction(50, 10)(torch.rand(2, 50, 8, 8)).shape
        torch.Size([2, 10, 8, 8])
    """

    def __init__(self, in_channels: int, out_channels: int, dim: int = 1) -> None:
        super().__init__(in_channels, out_channels, dim)
        matrix = (self.out_channels, self.in_channels // self.out_channels)
        self.weight = nn.Parameter(torch.empty(matrix))
        self.gate = nn.Parameter(torch.zeros(matrix))
        nn.init.normal_(self.weight, std=matrix[1] ** -0.5)

    @property
    def macs_per_position(self) -> int:
        """Multiply-adds of one position: ``C_in`` for ``u``, for ``m`` and twice for ``y``."""
        return 4 * self.in_channels

    def reduce(self, x: Tensor) -> Tensor:
        """Reduce values that have ``in_channels`` along ``dim``."""
        return _gated(x, self.weight, self.gate, self.dim)


def _simplex(x: Tensor, logits: Tensor, dim: int) -> Tensor:
    if are_onnx_nodes():
        return onnx_node("LEANSimplex", x, (logits,), dim % x.dim())
    matrix, i, k = _matrix(x, logits.shape[0], dim)
    v = _along(logits.to(matrix.dtype).softmax(0), matrix, i)
    t = (matrix * v).sum(i, keepdim=True)
    a = t / without_zeros(t.abs().sum(k, keepdim=True))
    return (matrix * a).sum(k).to(x.dtype)


def _gated(x: Tensor, weight: Tensor, gate: Tensor, dim: int) -> Tensor:
    if are_onnx_nodes():
        return onnx_node("LEANGated", x, (weight, gate), dim % x.dim())
    matrix, i, k = _matrix(x, weight.shape[0], dim)
    weight, gate = (_along(value.to(matrix.dtype), matrix, i) for value in (weight, gate))
    u = (matrix * gate).sum(i, keepdim=True)
    m = without_zeros(matrix.abs().mean((i, k), keepdim=True))
    return (matrix * weight * (1 + torch.tanh(u / m))).sum(k).to(x.dtype)


def _matrix(x: Tensor, preserved: int, dim: int) -> tuple[Tensor, int, int]:
    """``X`` in float32 or float64, its channels split where they stand, and the axes i and k."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    i = dim % x.dim()
    return torch.unflatten(wide, i, (preserved, -1)), i, i + 1


def _along(values: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """``values`` of ``[C']`` or ``[C', C'']``, shaped to multiply ``matrix`` from ``axis`` on."""
    behind = [1] * (matrix.dim() - axis - values.dim())
    return values.reshape(*values.shape, *behind)
