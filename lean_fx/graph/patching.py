"""Replace functions and classes by name while the code of a model runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import CellType
from typing import Any

from torch import nn

from lean_fx.graph.model_code import CACHE, cells_of, globals_of, is_users_code

#: What holds a name, the name, and its value meanwhile.
Patch = tuple[Any, str, Any]
_MISSING = object()


def without_caches(model: nn.Module) -> list[Patch]:
    """Patches that replace the cached functions of a model's code by the functions themselves.

    Otherwise a cache of the user's would later give the model proxies and fake tensors.
    """
    modules = [each for each in model.modules() if is_users_code(type(each).__module__)]
    kinds = dict.fromkeys(base for each in modules for base in type(each).__mro__)
    holders = (*globals_of(modules), *kinds)
    named = [
        (holder, name, each.__wrapped__)
        for holder in holders
        for name, each in list((holder if isinstance(holder, dict) else vars(holder)).items())
        if isinstance(each, CACHE)
    ]
    cells = [cell for each in modules for cell in cells_of(each)]
    enclosed = [
        (cell, "cell_contents", cell.cell_contents.__wrapped__)
        for cell in cells
        if isinstance(cell.cell_contents, CACHE)
    ]
    return named + enclosed


@contextmanager
def patching(patches: Iterable[Patch]) -> Iterator[None]:
    """Replace attributes of objects and items of dictionaries; restore them on exit."""
    done: list[Patch] = []
    try:
        for home, name, value in patches:
            done.append((home, name, _replace(home, name, value)))
        yield
    finally:
        for home, name, before in reversed(done):
            _replace(home, name, before)


def _replace(home: Any, name: str, value: Any) -> Any:
    """Give a name another value; return the one before, or _MISSING."""
    if isinstance(home, CellType):
        before, home.cell_contents = home.cell_contents, value
        return before
    names = home if isinstance(home, dict) else vars(home)
    before = names.get(name, _MISSING)
    if isinstance(home, dict):
        home.pop(name, None)
        if value is not _MISSING:
            home[name] = value
    elif value is _MISSING:
        delattr(home, name)
    else:
        setattr(home, name, value)
    return before
