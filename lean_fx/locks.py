"""The lock for code that changes state that all threads share."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

_COMPILER = "torch._dynamo"


class _SharedState:
    """A reentrant lock. While it is held, what ``torch.compile`` has wrapped runs as written."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._stances: list[AbstractContextManager[None] | None] = []

    def __enter__(self) -> None:
        self._lock.acquire()
        stance = None
        if _COMPILER in sys.modules:
            stance = torch.compiler.set_stance("force_eager")
            stance.__enter__()
        self._stances.append(stance)

    def __exit__(self, *error: Any) -> None:
        stance = self._stances.pop()
        if stance is not None:
            stance.__exit__(*error)
        self._lock.release()


#: torch.fx and torch's exporter patch nn.Module while they trace, and random numbers come from one
#: generator. Code that traces, exports or draws holds this lock.
SHARED_STATE = _SharedState()


@contextmanager
def rebuilding(*, runs: bool = False) -> Iterator[None]:
    """Hold the lock, outside inference mode, while a model is copied and rebuilt.

    Args:
        runs: whether the model runs meanwhile. It may call torch's compiler, which is then loaded
            first, in a second or two, so that the lock can turn it off.
    """
    if runs:
        importlib.import_module(_COMPILER)
    with SHARED_STATE, torch.inference_mode(False):  # what that makes cannot be trained
        yield
