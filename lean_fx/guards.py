"""What a captured model checks of its inputs: that its code would go the way it went."""

from __future__ import annotations

from typing import Any

import torch

from lean_fx.errors import BranchError


def check_branch(value: Any, captured: Any, where: str) -> None:
    """Check that a branch in a model's code goes where it went when the model was captured.

    It is a node of graphs whose capture followed a branch of Python on a size of a value. An export
    skips it, whose sizes are symbols: a check would fix them.

    Args:
        value: what the branch depends on, now.
        captured: what it was then.
        where: the place in the model's code.

    Raises:
        BranchError: the two differ.

    Example:
        >>> check_branch(16 > 8, True, "Net (net.py:7: if x.shape[2] > 8)")
        >>> check_branch(4 > 8, True, "Net (net.py:7: if x.shape[2] > 8)")
        Traceback (most recent call last):
        ...
        lean_fx.errors.BranchError: Net (net.py:7: if x.shape[2] > 8): gives False for these \
inputs, but the model was captured where it gives True; capture it with inputs of these sizes
    """
    if torch.compiler.is_exporting():
        return
    if value != captured:
        raise BranchError(
            f"{where}: gives {value} for these inputs, but the model was captured where it gives "
            f"{captured}; capture it with inputs of these sizes"
        )
