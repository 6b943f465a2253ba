"""What containers hold, read and restored past what their classes make of it.

A dict of the user's may compute what it gives, or count what is asked of it.
"""

from __future__ import annotations

import operator
from collections import OrderedDict, deque
from typing import Any

CONTAINERS = (list, tuple, OrderedDict, dict, deque, set)


def contents_of(holder: Any) -> Any:
    """What a container holds, even if its class gives something else when it is read."""
    kind = _kind_of(holder)
    return dict(kind.items(holder)) if isinstance(holder, dict) else [*kind.__iter__(holder)]


def _kind_of(holder: Any) -> Any:
    return next(each for each in CONTAINERS if isinstance(holder, each))


def refill(holder: Any, contents: Any) -> None:
    """Restore the contents of a dict, list or set, if they have changed.

    If they have not, another thread may be reading it, and must not find it empty.
    """
    if _is_as_before(contents_of(holder), contents):
        return
    kind = _kind_of(holder)
    if isinstance(holder, list):
        kind.__setitem__(holder, slice(None), contents)
        return
    kind.clear(holder)
    if isinstance(holder, dict):
        for key, each in contents.items():
            kind.__setitem__(holder, key, each)
    else:
        (kind.extend if isinstance(holder, deque) else kind.update)(holder, contents)


def _is_as_before(now: Any, before: Any) -> bool:
    mine, their = (
        [*each, *each.values()] if isinstance(each, dict) else each for each in (now, before)
    )
    return len(mine) == len(their) and all(map(operator.is_, mine, their))
