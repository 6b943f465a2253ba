"""Algorithm 1 of the paper: power iteration embedding of one matrix."""

from __future__ import annotations

from torch import Tensor

from lean_fx.errors import ArgumentError
from lean_fx.reduction.functional import lean_reduction
from lean_fx.reduction.options import Walk, check_floating


def power_iteration_embedding(
    matrix: Tensor, seed: Tensor, *, iterations: int = 1000, tol: float = 1e-6
) -> Tensor:
    """Embed the rows of one matrix in one dimension by power iteration: Algorithm 1 of the paper.

    ``V := D^-1 G V``, brought to an l1 norm of 1, until no value changes by ``tol`` or more;
    ``G = X X^T``, and ``D`` holds the l1 norms of its rows.

    Args:
        matrix: ``X``, floating point.
        seed: the first ``V``; not constant, which is a fixed point for ``X >= 0``.
        iterations: the most steps, 1 or more.
        tol: above 0.

    Shape:
        - matrix: ``[C', C'']``
        - seed: ``[C']``
        - output: ``[C']``

    Raises:
        ArgumentError: the shapes or types do not fit, the seed is constant, or an option out of
            range.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
        >>> embedded = power_iteration_embedding(rows, torch.tensor([0.9, 0.1, 0.4]), iterations=2)
        >>> bool((embedded[0] - embedded[1]).abs() < (embedded[0] - embedded[2]).abs())
        True

    References:
        Huang et al. (2023), Algorithm 1, after Lin and Cohen: Power Iteration Clustering,
        ICML 2010.
    """
    check_floating("power_iteration_embedding", matrix=matrix, seed=seed)
    if matrix.dim() != 2 or seed.shape != matrix.shape[:1]:
        raise ArgumentError(
            f"power_iteration_embedding: matrix {list(matrix.shape)} and seed {list(seed.shape)} "
            "do not fit; give a matrix [C', C''] and a seed [C']"
        )
    walk = Walk(normalize="row", iterations=iterations, tol=tol)
    walk.check("power_iteration_embedding")
    if len(seed) > 1 and bool((seed == seed[0]).all()):
        raise ArgumentError(
            f"power_iteration_embedding: seed holds {float(seed[0]):g} alone, which the walk "
            "keeps; give values that differ"
        )
    return lean_reduction(
        matrix.reshape(-1), seed, 0, normalize="row", iterations=iterations, tol=tol
    )
