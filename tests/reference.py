"""Algorithm 2 of the paper, line by line, in float64, one position at a time."""

import torch
from torch import Tensor


def algorithm_2(channels: Tensor, seed: Tensor) -> Tensor:
    """The C' values of one position with the given C_in channels."""
    preserved = len(seed)
    reducible = len(channels) // preserved
    x = [[float(channels[i * reducible + k]) for k in range(reducible)] for i in range(preserved)]
    v = [float(value) for value in seed]
    n = range(preserved)
    g = [[sum(x[i][k] * x[j][k] for k in range(reducible)) for j in n] for i in n]
    sums = [sum(abs(g[i][j]) for i in n) for j in n]
    a = [[g[i][j] / sums[j] if sums[j] else 0.0 for j in n] for i in n]
    y = [sum(a[i][j] * v[j] for j in n) for i in n]
    norm = sum(abs(value) for value in y)
    return torch.tensor([value / norm if norm else 0.0 for value in y], dtype=torch.float64)


def reduce_all(x: Tensor, seed: Tensor, dim: int) -> Tensor:
    """Algorithm 2 at every position of ``x``."""
    last = x.movedim(dim, -1)
    rows = [algorithm_2(row, seed) for row in last.reshape(-1, last.shape[-1])]
    return torch.stack(rows).reshape(*last.shape[:-1], len(seed)).movedim(-1, dim)
