"""Import objects that a user names as ``package.module:name`` in a shell or a file."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def split_place(place: str) -> tuple[str, str] | None:
    """The module and the name in ``package.module:name``; None for any other text.

    Example:
        >>> split_place("torch.nn:Linear"), split_place("torch.nn")
        (('torch.nn', 'Linear'), None)
    """
    home, _, name = place.partition(":")
    return (home, name) if home and name else None


def look_in(folder: str) -> None:
    """Let imports find the modules of a folder.

    Example:
        >>> look_in(os.getcwd())
        >>> os.getcwd() in sys.path
        True
    """
    if folder not in sys.path:
        sys.path.insert(0, folder)


def import_object(home: str, name: str) -> Any:
    """Import a module, also from the working directory, and return the object ``name`` in it.

    ``name`` may contain dots. The module's own code may raise anything, and that is passed on.

    Example:
        >>> import_object("torch.nn", "Linear.__name__")
        'Linear'
    """
    look_in(os.getcwd())  # as `python -m` does
    found: Any = importlib.import_module(home)
    for part in name.split("."):
        found = getattr(found, part)
    return found
