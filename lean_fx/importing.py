"""Objects that a user names in a shell or a file, as ``package.module:name``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def split_place(place: str) -> tuple[str, str] | None:
    """The module and the name at ``package.module:name``, or None of another text.

    Example:
        >>> split_place("torch.nn:Linear"), split_place("torch.nn")
        (('torch.nn', 'Linear'), None)
    """
    home, _, name = place.partition(":")
    return (home, name) if home and name else None


def look_in(folder: str) -> None:
    """Have imports find the modules of a folder.

    Example:
        >>> look_in(os.getcwd())
        >>> os.getcwd() in sys.path
        True
    """
    if folder not in sys.path:
        sys.path.insert(0, folder)


def import_object(home: str, name: str) -> Any:
    """What is called ``name``, dots included, in a module; the folder at hand is looked in too.

    Whatever the import raises is raised: a user's own module may raise anything.

    Example:
        >>> import_object("torch.nn", "Linear.__name__")
        'Linear'
    """
    look_in(os.getcwd())  # as `python -m` does
    found: Any = importlib.import_module(home)
    for part in name.split("."):
        found = getattr(found, part)
    return found
