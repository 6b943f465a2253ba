"""The time of leanify, beside that of a plain torch.fx trace with shapes."""

from __future__ import annotations

import copy
import statistics
import time

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from lean_fx.transform import leanify


def time_leanify(model: nn.Module, images: Tensor) -> dict[str, float]:
    """CPU seconds of leanify and of :func:`trace_with_shapes`, in turn, medians of 3 rounds.

    What takes more than 5 seconds is not repeated. A time is missing where torch.fx alone cannot
    trace the model.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 16), nn.Linear(16, 2))
        >>> sorted(time_leanify(net, torch.rand(2, 3)))
        ['leanify_s', 'trace_s']
    """
    taken: dict[str, list[float]] = {"leanify_s": [], "trace_s": []}
    for _ in range(3):
        replica = copy.deepcopy(model)  # a plain trace may leave a proxy in what it traces
        for name, call in (("leanify_s", leanify), ("trace_s", trace_with_shapes)):
            begun = time.process_time()
            try:
                call(replica, images)
            except Exception:  # torch.fx alone traces less than leanify does
                continue
            taken[name].append(time.process_time() - begun)
        if sum(map(sum, taken.values())) > 5:
            break
    return {name: statistics.median(times) for name, times in taken.items() if times}


def trace_with_shapes(model: nn.Module, images: Tensor) -> None:
    """What leanify's time is compared with: torch.fx's own trace, then the shape of every value.

    Example:
        >>> trace_with_shapes(nn.Conv2d(3, 8, 3), torch.rand(2, 3, 8, 8))
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    FakeTensorProp(torch.fx.symbolic_trace(model), mode).propagate(images)
