"""Algorithm 2 of the paper, line by line, in float64, one position at a time."""

import torch
from torch import Tensor


def algorithm_2(
    channels,
    seed,
    normalize="column",
    scale="sum",
    layout="contiguous",
    iterations=1,
    damping=0.0,
    norm_floor=0.0,
):
    """The C' values of one position with the given C_in channels.

    Algorithm 1 normalises rows in place of columns; the options beyond the two algorithms follow
    their formulas in lean_fx.reduction.lean.
    """
    preserved = len(seed)
    reducible = len(channels) // preserved
    n, m = range(preserved), range(reducible)
    if layout == "contiguous":
        x = [[float(channels[i * reducible + k]) for k in m] for i in n]
    else:
        x = [[float(channels[k * preserved + i]) for k in m] for i in n]
    g = [[sum(x[i][k] * x[j][k] for k in m) for j in n] for i in n]
    sums = [sum(abs(g[i][j]) for i in n) for j in n]
    mean = sum(sums) / preserved
    sums = [value + damping * mean or 1.0 for value in sums]
    if normalize == "none":
        sums = [1.0 for _ in n]
    v = seed.double().reshape(preserved, -1).expand(preserved, reducible).tolist()
    for _ in range(iterations):
        if normalize == "row":
            a = [[sum(x[i][k] * x[j][k] * v[j][k] for k in m) / sums[i] for j in n] for i in n]
        else:
            a = [[sum(x[i][k] * x[j][k] * v[j][k] for k in m) / sums[j] for j in n] for i in n]
        y = [sum(a[i][j] for j in n) for i in n]
        norm = sum(abs(value) for value in y) + norm_floor
        y = [value / norm if norm else 0.0 for value in y]
        v = [[value] * reducible for value in y]
    magnitude = sum(abs(value) for row in x for value in row) / len(channels)
    factor = {"sum": 1, "mean": preserved, "magnitude": preserved * magnitude}[scale]
    return torch.tensor([factor * value for value in y], dtype=torch.float64)


def reduce_all(x: Tensor, seed: Tensor, dim: int, **options) -> Tensor:
    """The reference at every position of ``x``."""
    last = x.movedim(dim, -1)
    rows = [algorithm_2(row, seed, **options) for row in last.reshape(-1, last.shape[-1])]
    return torch.stack(rows).reshape(*last.shape[:-1], len(seed)).movedim(-1, dim)
