"""Keep the length of sequences dynamic in 1-D max pooling, where torch's exporter would freeze it.

On a CPU, ``max_pool1d`` reads the length as a number. Its variant that returns indices too does
not. It returns the same values, and exports to the same node MaxPool if the indices are not used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

_WITH_INDICES: dict[Any, Any] = {
    F.max_pool1d: F.max_pool1d_with_indices,
    torch.max_pool1d: torch.max_pool1d_with_indices,
}


class PoolsAnyLength(TorchFunctionMode):
    """In this mode, 1-D max pooling does not read the length as a number.

    Example:
        >>> with PoolsAnyLength():
        ...     F.max_pool1d(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), 2)
        tensor([[3., 2.]])
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the variant with indices, if there is one."""
        if func in _WITH_INDICES:
            return _WITH_INDICES[func](*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))
