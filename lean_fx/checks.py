"""Checks of models and options; each error names what is wrong."""

from __future__ import annotations

import numbers
import operator
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lean_fx.errors import ArgumentError


def check_int(subject: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Check that a value is an int of Python or NumPy, not a bool, and in its range.

    Args:
        subject: the owner and name of the value, for the error.
        value: the value.
        least: the smallest that is allowed, or None.
        most: the greatest that is allowed, or None; it needs ``least``.

    Returns:
        The value, as an int of Python.

    Raises:
        ArgumentError: it is not.

    Example:
        >>> check_int("time_onnx: threads", 0, 1)
        Traceback (most recent call last):
        ...
        lean_fx.errors.ArgumentError: time_onnx: threads=0 is not an int of 1 or more
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if whole and (least is None or value >= least) and (most is None or value <= most):
        return operator.index(value)
    upto = "or more" if most is None else f"to {most}"
    allowed = "" if least is None else f" of {least} {upto}"
    raise ArgumentError(f"{subject}={value!r} is not an int{allowed}")


def check_not_negative(subject: str, value: Any) -> None:
    """Check that a value is a finite number of 0 or more, and no bool.

    Raises:
        ArgumentError: it is not.

    Example:
        >>> check_not_negative("LeanReduction: damping", -1.0)
        Traceback (most recent call last):
        ...
        lean_fx.errors.ArgumentError: LeanReduction: damping=-1.0 is not a finite number of 0 or \
more; leave it out for none
    """
    if not _is_number(value) or not 0 <= value < float("inf"):
        raise ArgumentError(
            f"{subject}={value!r} is not a finite number of 0 or more; leave it out for none"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_positive(subject: str, value: Any, remedy: str) -> None:
    """Check that a value is a finite number above 0, and no bool.

    Raises:
        ArgumentError: it is not.

    Example:
        >>> check_positive("sensitivity: noise", 0, "give 1e-3")
        Traceback (most recent call last):
        ...
        lean_fx.errors.ArgumentError: sensitivity: noise=0 is not a finite number above 0; give 1e-3
    """
    if not _is_number(value) or not 0 < value < float("inf"):
        raise ArgumentError(f"{subject}={value!r} is not a finite number above 0; {remedy}")


def check_rate(subject: str, value: Any) -> None:
    """Check that a learning rate is a number in ]0, 1].

    Raises:
        ArgumentError: it is not.

    Example:
        >>> check_rate("Settings: learning_rate", 0)
        Traceback (most recent call last):
        ...
        lean_fx.errors.ArgumentError: Settings: learning_rate=0 lies outside ]0, 1]; use 1e-3
    """
    if not _is_number(value) or not 0 < value <= 1:
        raise ArgumentError(f"{subject}={value!r} lies outside ]0, 1]; use 1e-3")


def check_threads(subject: str, threads: Any) -> int:
    """Check that a number of threads is an int from 1 to four times the cores of this machine.

    Raises:
        ArgumentError: it is not.

    Example:
        >>> check_threads("compare", 1)
        1
    """
    count, most = check_int(f"{subject}: threads", threads, 1), 4 * (os.cpu_count() or 1)
    if count > most:
        raise ArgumentError(
            f"{subject}: threads={threads} is above {most}, four a core; give fewer"
        )
    return count


def check_ints(subject: str, values: Any, least: int) -> tuple[int, ...]:
    """Check that a value is a sequence of one or more ints, as :func:`check_int` does.

    Raises:
        ArgumentError: it is not.

    Example:
        >>> check_ints("PaperNet: widths", [50, 0], 1)
        Traceback (most recent call last):
        ...
        lean_fx.errors.ArgumentError: PaperNet: widths=[50, 0] is not a list of ints of 1 or more
    """
    try:
        if isinstance(values, Sequence) and len(values):
            return tuple(check_int(subject, value, least) for value in values)
    except ArgumentError:
        pass
    raise ArgumentError(f"{subject}={values!r} is not a list of ints of {least} or more")


def whole_numbers(subject: str, text: str, least: int) -> list[int]:
    """Read whole numbers separated by commas, without duplicates.

    Args:
        subject: what the numbers are, for the error.
        text: the numbers.
        least: the smallest that is allowed, 0 or more.

    Raises:
        ArgumentError: one is not an int of ``least`` or more.

    Example:
        >>> whole_numbers("seeds", "0, 1,2", 0)
        [0, 1, 2]
    """
    for part in text.split(","):
        if not part.strip().isdecimal() or int(part) < least:
            raise ArgumentError(f"{subject}: {part!r} is not an int of {least} or more")
    return list(dict.fromkeys(int(part) for part in text.split(",")))


def check_choice(subject: str, value: Any, choices: Iterable[object]) -> None:
    """Check that an option is one of its choices.

    Raises:
        ArgumentError: it is not.

    Example:
        >>> check_choice("LeanReduction: layout", "odd", ("contiguous", "interleaved"))
        Traceback (most recent call last):
        ...
        lean_fx.errors.ArgumentError: LeanReduction: layout='odd' is not known; use contiguous or \
interleaved
    """
    known = tuple(choices)
    if value not in known:
        raise ArgumentError(f"{subject}={value!r} is not known; use {one_of(known)}")


def one_of(words: Sequence[object]) -> str:
    """Join words as a sentence does: ``a, b or c``.

    Example:
        >>> one_of((1, 2, 4)), one_of(["sum"])
        ('1, 2 or 4', 'sum')
    """
    *most, last = map(str, words)
    return f"{', '.join(most)} or {last}" if most else last


def check_path(subject: str, path: Any) -> None:
    """Check that a value is a path.

    Raises:
        ArgumentError: it is not.

    Example:
        >>> check_path("save", None)
        Traceback (most recent call last):
        ...
        lean_fx.errors.ArgumentError: save: path=None is not a path; give the name of a file
    """
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError(f"{subject}: path={path!r} is not a path; give the name of a file")


def check_plain(model: nn.Module) -> None:
    """Check that neither a model nor a part of it is compiled, scripted or a parallel wrapper.

    Raises:
        ArgumentError: one is; names it.

    Example:
        >>> check_plain(nn.DataParallel(nn.Linear(4, 2)))
        Traceback (most recent call last):
        ...
        lean_fx.errors.ArgumentError: model=DataParallel object is a wrapper; give the model \
itself, its module
    """
    found = ""
    if isinstance(model, torch.jit.ScriptModule):
        found = "of TorchScript; give the model that it was made from"
    elif inner := _wrapped_by(model):
        kind = "compiled" if inner == "_orig_mod" else "a wrapper"
        found = f"{kind}; give the model itself, its {inner}"
    if found:
        raise ArgumentError(f"model={type(model).__name__} object is {found}")
    for name, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ArgumentError(
                f"model: its part {name!r} is of TorchScript; put the module that it was made from "
                "in its place"
            )
        if inner := _wrapped_by(part):
            raise ArgumentError(
                f"model: its part {name!r} is a {type(part).__name__}, which wraps a module to run "
                f"it; put that module in its place: its {inner}"
            )


def _wrapped_by(module: nn.Module) -> str:
    """The attribute of a wrapper that holds the module which it runs; empty for other modules."""
    if "_orig_mod" in module._modules:
        return "_orig_mod"
    parallel = isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel)
    return "module" if parallel else ""


def check_shapes(model: nn.Module, subject: str = "model") -> None:
    """Check that no layer is lazy, waiting for a batch to know its shape.

    Raises:
        ArgumentError: one does; names it.

    Example:
        >>> check_shapes(nn.Sequential(nn.Linear(4, 2), nn.LazyLinear(2)))
        Traceback (most recent call last):
        ...
        lean_fx.errors.ArgumentError: model: layer '1' (LazyLinear) has no shape yet; call the \
model once on a batch first
    """
    for name, module in model.named_modules():
        held = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(map(is_lazy, held)):
            kind = type(module).__name__
            raise ArgumentError(
                f"{subject}: {f'layer {name!r} ({kind})' if name else kind} has no shape yet; call "
                "the model once on a batch first"
            )


def check_values(model: nn.Module, subject: str = "model") -> None:
    """Check that every parameter and buffer has values.

    Raises:
        ArgumentError: one is on the meta device; names it.

    Example:
        >>> check_values(nn.Linear(4, 2, device="meta"))
        Traceback (most recent call last):
        ...
        lean_fx.errors.ArgumentError: model: 'weight' is on the meta device and has no values; \
give it some first, with to_empty() and load_state_dict()
    """
    name = first_without_values(model)
    if name:
        raise ArgumentError(
            f"{subject}: {name!r} is on the meta device and has no values; give it some first, "
            "with to_empty() and load_state_dict()"
        )


def first_without_values(model: nn.Module) -> str:
    """The first parameter or buffer on the meta device, by name; empty if there is none.

    Example:
        >>> first_without_values(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2, device="meta")))
        '1.weight'
    """
    named = (*model.named_parameters(), *model.named_buffers())
    return next((name for name, tensor in named if tensor.is_meta), "")
