"""The compiled library's walk and gradient, on tensors on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any, get_args

import torch
from torch import Tensor

from lean_fx.errors import ArgumentError, LeanError
from lean_fx.kernel import library_path
from lean_fx.reduction.options import Scale, Walk


def _load() -> Any:
    """The library; None if it was not built, or is of a version without these functions."""
    path = library_path()
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
        return library if library.lean_gradient_float64 else None
    except (OSError, AttributeError):
        return None


_LIBRARY = _load()
_IS_BUILT = _LIBRARY is not None  # a constant to torch.compile
_SCALES = get_args(Scale)  # in the order of Scale in walk.h
_DTYPES = {torch.float32: "float32", torch.float64: "float64"}


class _Call(ctypes.Structure):
    """As Call in eager.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("before", "behind", "preserved", "reducible")),
        *((name, ctypes.c_int64) for name in ("interleaved", "nonnegative", "scale", "threads")),
        *((name, ctypes.c_double) for name in ("damping", "norm_floor")),
    )


def takes(x: Tensor) -> bool:
    """Whether the library is built, and computes with such a tensor.

    Example:
        >>> takes(torch.zeros(2, dtype=torch.float16))
        False
    """
    plain = x.is_cpu and x.layout is torch.strided and x.dtype in _DTYPES
    return plain and _IS_BUILT


def run_walk(x: Tensor, seed: Tensor, walk: Walk) -> Tensor:
    """The walk of Algorithm 2, one step with a vector seed.

    Args:
        x: :func:`takes` it.
        seed: of the same dtype.
        walk: its signs, scale, layout, damping and norm floor.

    Shape:
        - x: ``[N, C, P]``, C channels at P positions of N samples
        - seed: ``[C']``
        - output: ``[N, C', P]``

    Raises:
        ArgumentError: the seed does not fit.
    """
    x, seed = _in_memory(x), _in_memory(seed)
    call = _call(x, seed, walk)
    out = x.new_empty(x.shape[0], len(seed), x.shape[2])
    _run("walk", call, x, seed, out)
    return out


def run_gradient(x: Tensor, seed: Tensor, grad: Tensor, walk: Walk) -> tuple[Tensor, Tensor]:
    """The gradients of ``x`` and ``seed``, from that of the output of :func:`run_walk`.

    Shape:
        - x: ``[N, C, P]``
        - seed: ``[C']``
        - grad: ``[N, C', P]``
        - output: ``[N, C, P]`` and ``[C']``
    """
    x, seed, grad = _in_memory(x), _in_memory(seed), _in_memory(grad)
    grad_x, grad_seed = torch.empty_like(x), torch.empty_like(seed)
    _run("gradient", _call(x, seed, walk), x, seed, grad, grad_x, grad_seed)
    return grad_x, grad_seed


def _in_memory(tensor: Tensor) -> Tensor:
    """A tensor whose numbers lie in memory, in their order and with their signs."""
    if tensor._is_zerotensor():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    return tensor.resolve_neg().contiguous()


def _call(x: Tensor, seed: Tensor, walk: Walk) -> _Call:
    before, channels, behind = x.shape
    if not takes(x) or x.dtype != seed.dtype or seed.dim() != 1 or channels % len(seed):
        raise ArgumentError(
            f"lean_fx::walk: seed={list(seed.shape)} of {seed.dtype} does not fit x="
            f"{list(x.shape)} of {x.dtype}; give float32 or float64 of both, and C' seeds that "
            "divide the channels, which are on axis 1"
        )
    sizes = (before, behind, len(seed), channels // len(seed))
    interleaved, scale = walk.layout == "interleaved", _SCALES.index(walk.scale)
    flags = (interleaved, walk.nonnegative, scale, torch.get_num_threads())
    return _Call(*sizes, *flags, walk.damping, walk.norm_floor)


def _run(name: str, call: _Call, *tensors: Tensor) -> None:
    function = getattr(_LIBRARY, f"lean_{name}_{_DTYPES[tensors[0].dtype]}")
    if function(ctypes.byref(call), *(ctypes.c_void_p(each.data_ptr()) for each in tensors)):
        raise LeanError(f"lean_reduction: no memory for the {name}; give smaller batches")
