"""Checks of options; each error names the option, its value and what it may be."""

from __future__ import annotations

import numbers
import operator
import os
from collections.abc import Iterable, Sequence
from typing import Any

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
    """Check that a value is a finite number of 0 or more, and not a bool.

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
    """Check that a value is a finite number above 0, and not a bool.

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
