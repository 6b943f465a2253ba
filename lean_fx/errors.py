"""The one tree of exceptions, and what else reaches the user: warnings, and other packages' logs.

Every message is one line: subject, value, rule, remedy.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType


class LeanError(Exception):
    """Any error that lean_fx raises on purpose."""


class ArgumentError(LeanError, ValueError):
    """An argument has a wrong type or lies outside its range."""


class _RemedyError(LeanError):
    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason = reason
        self.remedy = remedy


class CaptureError(_RemedyError):
    """A model cannot be captured as a torch.fx graph.

    Attributes:
        reason: what is wrong.
        remedy: what the user can do; empty if there is nothing.
    """


class BranchError(_RemedyError, ValueError):
    """A captured model was given inputs for which its code takes another branch.

    Attributes:
        reason: which branch, and where.
        remedy: what the user can do.
    """


class PassError(LeanError):
    """A pass was given, or has made, a graph that breaks what it requires or ensures."""


class PlanError(LeanError, ValueError):
    """A plan cannot be read, written or applied to this model."""


class DataError(LeanError):
    """A data file is missing, damaged, or not what it should be."""


class WriteError(LeanError, OSError):
    """A path cannot be written; whatever was there before is still whole."""


class MissingDependencyError(LeanError, ImportError):
    """An optional package is not installed."""


class ExportError(LeanError):
    """A model cannot be exported to ONNX."""


class LeanWarning(UserWarning):
    """Something that the user should know, though the result is right."""


def warn(text: str) -> None:
    """Give a :class:`LeanWarning` that names the line of the user's own code."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and _is_ours(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, LeanWarning, stacklevel=level)


def _is_ours(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__"))
    return name.partition(".")[0] in ("lean_fx", "torch", "contextlib")


@contextmanager
def quiet_loggers(*names: str, level: int = logging.CRITICAL) -> Iterator[None]:
    """Let loggers of other packages pass only records of a level or above.

    Example:
        >>> with quiet_loggers("some_package"):
        ...     logging.getLogger("some_package").error("not shown")
    """
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, own in zip(loggers, before, strict=True):
            logger.setLevel(own)


def one_line(error: BaseException, limit: int = 300) -> str:
    r"""What an error says, in one line of no more than ``limit`` characters; else its type.

    Example:
        >>> one_line(ValueError("not\n  this")), one_line(KeyboardInterrupt())
        ('not this', 'KeyboardInterrupt')
    """
    return " ".join(str(error).split())[:limit] or type(error).__name__


def one_line_with_type(error: BaseException, limit: int = 300) -> str:
    """The type of an error, and what it says as :func:`one_line`.

    Example:
        >>> one_line_with_type(ValueError("not this"))
        'ValueError: not this'
    """
    return f"{type(error).__name__}: {one_line(error, limit)}"


def require(module: str, *, extra: str = "", purpose: str) -> ModuleType:
    """Import an optional package, or say in one line what to install.

    ONNX Runtime sends telemetry on some platforms, and looks up a host for it. It does so only if
    the user has set ``ORT_DISABLE_TELEMETRY=0``, or has imported it before.

    Args:
        module: the module's dotted name, such as ``"onnx"``.
        extra: the extra of lean_fx that brings it; empty for a package that a plain
            ``pip install lean_fx`` brings.
        purpose: what it is needed for, in a few words.

    Returns:
        The imported module.

    Raises:
        MissingDependencyError: the package is not installed.

    Example:
        >>> require("json", purpose="reading plans").__name__
        'json'
        >>> require("no_such_thing", extra="examples", purpose="training")
        Traceback (most recent call last):
        ...
        lean_fx.errors.MissingDependencyError: no_such_thing is not installed and training needs \
it; run: pip install "lean_fx[examples]"
    """
    package = module.partition(".")[0]
    if package == "onnxruntime":
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        wanted = f'"lean_fx[{extra}]"' if extra else package
        raise MissingDependencyError(
            f"{package} is not installed and {purpose} needs it; run: pip install {wanted}"
        ) from error
