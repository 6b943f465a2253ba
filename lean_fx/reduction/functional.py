r"""The LEAN reduction as a function: Algorithm 2 of the paper, one matrix per position.

The ``C_in`` channels of a position (a pixel, a time step, a sample) are viewed as a matrix ``X`` of
``C'`` *preserved* by ``C''`` *reducible* channels, ``C_in = C' C''``. A *seed* ``V`` of ``C'``
values is learned and shared by all positions::

    G      = X X^T                          affinity, C' x C'
    d[j]   = sum_i |G[i,j]|
    y      = G (V / d)                      normalize="column": Algorithm 2
    y      = (G V) / d                      normalize="row":    Algorithm 1 (PIE), G is symmetric
    y      = G V                            normalize="none"
    out    = y / sum_i |y[i]|               scale="sum": C' channels in place of C_in
    out    = C' y / sum_i |y[i]|            scale="mean"
    out    = m C' y / sum_i |y[i]|          scale="magnitude", m = mean |X|

Both divisions amplify small changes of ``x``: the one by ``d[j]``, because an almost dead channel
counts as much as a strong one; the one by ``sum |y|``, where values of both signs cancel. Two
options add to the divisors::

    d[j]    + damping mean_j d[j]           mean over the C' preserved channels of the position
    sum |y| + norm_floor                    in every step

``iterations`` repeats the walk with ``V := y / sum |y|``, until no value changes by ``tol`` or
more if that is given. ``seed="matrix"`` gives every channel a value of its own: ``G V`` becomes
``X u`` with ``u[k] = sum_j X[j,k] V[j,k]``. With ``layout="contiguous"`` channel ``i C'' + k`` is
``X[i,k]``, with ``layout="interleaved"`` channel ``k C' + i`` is.

None of these forms G where it need not: ``G V = X (X^T V)``, and for ``X >= 0``, which a flag
promises, ``d = X t`` with ``t[k] = sum_i X[i,k]``. A position then costs about ``4 C_in``
multiply-adds; with values of any sign, ``d`` costs ``C' C_in`` more. On the CPU the default walk is
one pass over x in a compiled library (:mod:`lean_fx.reduction.compiled_walk`), which keeps x and
the seed for its gradient. Where the library is not built, and for all else, operations of torch
run, which hold ``G`` for a block of positions (for all of them where it is compiled or exported).

``examples/results/bench_reduction.md`` has the speed of forward and backward against Algorithm 2 as
it is written: 9.9 times for values of 0 or more and 6.7 times for values of any sign (geometric
means of four shapes, AMD EPYC with AVX2, 1 thread, torch 2.13). Compiled code calls the same
library; where it is not built, torch.compile fuses the operations.

A channel or a position whose values are all zero (frequent after ReLU) gives zeros, forward and
backward, never NaN. Half-precision values are reduced in float32.

References:
    Huang, Shah, Evans, Yoo: Less-Energy-Usage Network with Batch Power Iteration, ICML 2023
    workshop on Neural Compression, Algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lean_fx.checks import check_int
from lean_fx.errors import ArgumentError, LeanError
from lean_fx.reduction.compiled_walk import compiled_walk
from lean_fx.reduction.library import takes
from lean_fx.reduction.onnx_nodes import are_onnx_nodes, onnx_node
from lean_fx.reduction.options import Layout, Normalize, Scale, Walk, check_floating
from lean_fx.reduction.reference import reference_walk, scaled
from lean_fx.reduction.walk import column_walk

_checks_signs = False


@contextmanager
def checking_signs() -> Iterator[None]:
    """Within it, a reduction that was promised values of 0 or more checks them: for debugging.

    Raises:
        LeanError: a promise was wrong, at the time of the call.

    Example:
        >>> with checking_signs():
        ...     lean_reduction(torch.tensor([[-1.0, 2.0]]), torch.ones(2), nonnegative=True)
        Traceback (most recent call last):
        ...
        lean_fx.errors.LeanError: lean_reduction: nonnegative=True, but the least value is -1; \
leave nonnegative out
    """
    global _checks_signs
    before, _checks_signs = _checks_signs, True
    try:
        yield
    finally:
        _checks_signs = before


def lean_reduction(
    x: Tensor,
    seed: Tensor,
    dim: int = 1,
    *,
    nonnegative: bool = False,
    normalize: Normalize = "column",
    scale: Scale = "sum",
    layout: Layout = "contiguous",
    iterations: int = 1,
    tol: float | None = None,
    damping: float = 0.0,
    norm_floor: float = 0.0,
) -> Tensor:
    """Reduce the channels of every position of ``x`` from C_in to C'.

    Args:
        x: values with their channels along ``dim``; floating point.
        seed: the seed ``V``; its length ``C'`` divides the channels of ``x``.
        dim: the axis of the channels.
        nonnegative: promises that no value of ``x`` is below 0, which makes it cheaper; a wrong
            promise gives wrong numbers (see :func:`checking_signs`).
        normalize: the walk: ``"column"``, ``"row"`` or ``"none"``.
        scale: of the output: ``"sum"``, ``"mean"`` or ``"magnitude"``.
        layout: of the channels into preserved by reducible: ``"contiguous"`` or ``"interleaved"``.
        iterations: steps of the walk, 1 or more; the most of them if ``tol`` is given.
        tol: stop once no value of ``V`` changes by this much or more, above 0; compiled and
            exported code takes all steps.
        damping: how many times the mean of ``d`` is added to every ``d[j]``; 0 or more, and 0 with
            ``normalize="none"``.
        norm_floor: what is added to ``sum |y|`` in every step; 0 or more.

    Shape:
        - x: ``[..., C_in, ...]``, ``C_in`` along ``dim``
        - seed: ``[C']`` or ``[C', C'']``
        - output: as ``x``, with ``C'`` along ``dim``; with ``scale="sum"`` its absolute values
          sum to 1 (or are 0) there, to less than 1 with a ``norm_floor``

    Values are squared on the way, so in float32 (and what is reduced in it) their magnitudes must
    lie between 1e-18 and 1e18; smaller ones count as zeros.

    Raises:
        ArgumentError: an argument is out of its range, or the shapes do not fit.
        LeanError: within :func:`checking_signs`, a value is below 0 though ``nonnegative``.

    Example:
        >>> x = torch.rand(2, 50, 8, 8)
        >>> y = lean_reduction(x, torch.randn(10))
        >>> y.shape
        torch.Size([2, 10, 8, 8])
        >>> bool(torch.allclose(y.abs().sum(1), torch.ones(2, 8, 8)))
        True

    References:
        Huang et al. (2023), Algorithm 2.
    """
    _check_values(x, seed, dim)
    walk = Walk(nonnegative, normalize, scale, layout, iterations, tol, damping, norm_floor)
    walk.check("lean_reduction")
    axis = int(dim) % x.dim()
    if _checks_signs and nonnegative:
        _check_signs(x)
    if are_onnx_nodes():
        return _onnx_node(x, seed, axis, walk)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _reduced(x, seed, axis, walk)
    return _reduced(x, seed, axis, walk)


def _check_values(x: Tensor, seed: Tensor, dim: int) -> None:
    check_floating("lean_reduction", x=x, seed=seed)
    if not -x.dim() <= check_int("lean_reduction: dim", dim) < x.dim():
        raise ArgumentError(
            f"lean_reduction: dim={dim!r} is not an axis of x, which has {x.dim()}; give the axis "
            "of its channels"
        )
    channels, sizes = x.shape[dim], list(seed.shape)
    vector = seed.dim() == 1 and sizes[0] > 0 and channels % sizes[0] == 0
    if not vector and not (seed.dim() == 2 and 0 not in sizes and channels == seed.numel()):
        raise ArgumentError(
            f"lean_reduction: seed {sizes} does not fit the {channels} channels of x; give [C'] "
            "with a C' that divides them, or [C', C''] with as many values"
        )


def _check_signs(x: Tensor) -> None:
    below = x.detach()[x < 0]
    if below.numel():
        raise LeanError(
            f"lean_reduction: nonnegative=True, but the least value is {float(below.amin()):g}; "
            "leave nonnegative out"
        )


def _onnx_node(x: Tensor, seed: Tensor, axis: int, walk: Walk) -> Tensor:
    """The node of an ONNX graph; options that later versions added are left out where unused."""
    floats = {"damping": float(walk.damping), "norm_floor": float(walk.norm_floor)}
    options = {
        "normalize": walk.normalize,
        "scale": walk.scale,
        "layout": walk.layout,
        "iterations": int(walk.iterations),
        "nonnegative": walk.nonnegative,
        **{name: value for name, value in floats.items() if value},
    }
    return onnx_node("LEAN", x, (seed,), axis, options)


def _reduced(x: Tensor, seed: Tensor, axis: int, walk: Walk) -> Tensor:
    """Reduce by the fastest way that gives what is asked for."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    seed = seed.to(wide.dtype)
    closed = walk.normalize == "column" and walk.iterations == 1 and seed.dim() == 1
    eager = _runs_eagerly(x) and _runs_eagerly(seed)
    compiled = torch.compiler.is_dynamo_compiling()
    # An exported program must run where lean_fx is not installed.
    called = not torch.compiler.is_exporting() if compiled else eager and not _is_watched()
    if closed and called and takes(wide) and takes(seed):
        return compiled_walk(wide, seed, axis, walk).to(x.dtype)
    if closed and (eager or compiled):
        out = _fused(wide, seed, axis, walk)
    else:
        out = reference_walk(wide, seed, axis, walk if eager else replace(walk, tol=None))
    return scaled(out, wide, axis, walk).to(x.dtype)


def _runs_eagerly(x: Tensor) -> bool:
    """Whether ``x`` is data, and not traced, compiled, exported, vmapped, fake or dual."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and not x.is_meta
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0  # the hand-written gradients are for backward only
    )


def _is_watched() -> bool:
    """Whether a mode, such as a counter, is on: it must see every operation of torch."""
    return torch._C._len_torch_dispatch_stack() > 0


def _fused(x: Tensor, seed: Tensor, axis: int, walk: Walk) -> Tensor:
    """The default walk by its hand-written gradient; see :mod:`lean_fx.reduction.walk`."""
    before, behind = x.shape[:axis], x.shape[axis + 1 :]
    channels, preserved = x.shape[axis], seed.shape[0]
    last = behind.numel() == 1  # then all positions stand side by side, behind the channels
    if last:
        matrix = x.reshape(1, before.numel(), channels).mT
    else:
        matrix = x.reshape(before.numel(), channels, behind.numel())
    if walk.layout == "contiguous":
        matrix = torch.unflatten(matrix, 1, (preserved, -1))
    else:
        matrix = torch.unflatten(matrix, 1, (-1, preserved)).transpose(1, 2)
    out = column_walk(matrix, seed, walk).squeeze(2)
    return (out.mT if last else out).reshape(*before, preserved, *behind)
