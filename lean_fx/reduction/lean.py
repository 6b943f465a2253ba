"""LEAN as a module; its formulas are those of :mod:`lean_fx.reduction.functional`."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.fx
from torch import Tensor, nn

from lean_fx.checks import check_choice
from lean_fx.errors import ArgumentError
from lean_fx.reduction.base import Reduction
from lean_fx.reduction.functional import lean_reduction
from lean_fx.reduction.options import Layout, Normalize, Scale, Walk

# torch.fx's own tracer meets one call, not what is inside: it depends on the rank of x.
torch.fx.wrap("lean_reduction")

SeedShape = Literal["vector", "matrix"]
SeedInit = Literal["normal", "uniform", "ones", "near_one"]


class LeanReduction(Reduction):
    """Reduce C_in channels to C' by one step of a random walk over them, with a learned seed.

    The seed values are all its parameters. They are drawn from a standard normal, from which the
    literal form trains best: on scanned digits, the paper's net, three seeds each, it reaches
    88.9 ± 3.2 % there, 64.8 ± 5.4 from the uniform, 58.1 ± 0.7 from ones and 56.3 ± 12.1 near one,
    each at its best of three rates (``examples/results/seeds``).

    The literal form amplifies small changes of its input, and a deep net of such reductions does so
    many times over. The registered ``"lean_damped"`` does not: it sets ``scale="magnitude"``,
    ``damping=1.0``, ``norm_floor=0.1`` and ``seed_init="near_one"``.

    Args:
        in_channels: the channels ``C_in`` of the input, 1 or more.
        out_channels: the preserved channels ``C'``, a divisor of ``in_channels``.
        dim: the axis of the channels.
        normalize: ``"column"`` (the paper's Algorithm 2), ``"row"`` (Algorithm 1) or ``"none"``.
        scale: ``"sum"`` (the paper's: absolute values sum to 1), ``"mean"`` (times C': their mean
            is 1) or ``"magnitude"`` (times C' and the mean magnitude of the position's input).
        seed: ``"vector"`` (the paper's, C' values) or ``"matrix"`` (one value a channel, C_in).
        seed_init: ``"normal"`` (standard), ``"uniform"`` (in [0, 1[), ``"ones"`` or ``"near_one"``
            (normal of mean 1 and standard deviation 0.5).
        layout: ``"contiguous"`` (channel ``i C'' + k`` is ``X[i,k]``) or ``"interleaved"``.
        iterations: steps of the walk, 1 or more; the most of them if ``tol`` is given.
        tol: stop once no value changes by this much or more; above 0.
        damping: how many times the mean of the sums ``d`` is added to each, before the walk divides
            by them; 0 or more.
        norm_floor: what is added to ``sum |y|``, before each step divides by it; 0 or more.
        nonnegative: promises that no input is below 0, for the cheaper path; an attribute, which
            ``leanify`` sets where the graph proves it.

    Shape:
        - input: ``[..., C_in, ...]``, ``C_in`` along ``dim``
        - output: ``[..., C', ...]``

    Raises:
        ArgumentError: ``out_channels`` does not divide ``in_channels``, or an argument is out of
            its range.

    Example:
        >>> LeanReduction(50, 10)(torch.rand(2, 50, 8, 8)).shape
        torch.Size([2, 10, 8, 8])
        >>> LeanReduction(50, 10, dim=-1, scale="magnitude")(torch.rand(2, 7, 50)).shape
        torch.Size([2, 7, 10])
        >>> LeanReduction(8, 3)
        Traceback (most recent call last):
        ...
        lean_fx.errors.ArgumentError: LeanReduction: out_channels=3 does not divide in_channels=8; \
use 1, 2, 4 or 8

    References:
        Huang et al. (2023), Algorithm 2.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dim: int = 1,
        *,
        normalize: Normalize = "column",
        scale: Scale = "sum",
        seed: SeedShape = "vector",
        seed_init: SeedInit = "normal",
        layout: Layout = "contiguous",
        iterations: int = 1,
        tol: float | None = None,
        nonnegative: bool = False,
        damping: float = 0.0,
        norm_floor: float = 0.0,
    ) -> None:
        super().__init__(in_channels, out_channels, dim)
        options = (normalize, scale, layout, iterations, tol, damping, norm_floor)
        Walk(nonnegative, *options).check("LeanReduction")
        check_choice("LeanReduction: seed", seed, get_args(SeedShape))
        check_choice("LeanReduction: seed_init", seed_init, get_args(SeedInit))
        if seed_init == "ones" and normalize == "row" and not damping:
            raise ArgumentError(
                "LeanReduction: seed_init='ones' with normalize='row' is a dead layer, as the walk "
                "keeps a constant seed; use normal, uniform or near_one"
            )
        self.normalize: Normalize = normalize
        self.scale: Scale = scale
        self.layout: Layout = layout
        self.seed_init: SeedInit = seed_init
        self.iterations = int(iterations)
        self.tol = tol
        self.nonnegative = nonnegative
        self.damping = float(damping)
        self.norm_floor = float(norm_floor)
        matrix = (self.out_channels, self.in_channels // self.out_channels)
        self.seed = nn.Parameter(torch.empty(matrix if seed == "matrix" else matrix[:1]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the seed anew, as ``seed_init`` says."""
        if self.seed_init == "near_one":
            nn.init.normal_(self.seed, mean=1.0, std=0.5)
            return
        draw = {"normal": nn.init.normal_, "uniform": nn.init.uniform_, "ones": nn.init.ones_}
        draw[self.seed_init](self.seed)

    @property
    def macs_per_position(self) -> int:
        """Multiply-adds of one position.

        ``2 C_in`` a step; with normalisation ``2 C_in`` more for the sums of non-negative values,
        ``C' C_in`` for those of any sign; ``C_in`` more for the magnitude.
        """
        sums = 2 * self.in_channels if self.nonnegative else self.out_channels * self.in_channels
        return (
            2 * self.in_channels * self.iterations
            + (sums if self.normalize != "none" else 0)
            + (self.in_channels if self.scale == "magnitude" else 0)
        )

    def reduce(self, x: Tensor) -> Tensor:
        """Reduce by :func:`~lean_fx.lean_reduction`."""
        return lean_reduction(
            x,
            self.seed,
            self.dim,
            nonnegative=self.nonnegative,
            normalize=self.normalize,
            scale=self.scale,
            layout=self.layout,
            iterations=self.iterations,
            tol=self.tol,
            damping=self.damping,
            norm_floor=self.norm_floor,
        )

    def extra_repr(self) -> str:
        """The arguments, as in torch.nn; options only where they are not the default."""
        options = {
            "normalize": (self.normalize, "column"),
            "scale": (self.scale, "sum"),
            "seed": ("matrix" if self.seed.dim() == 2 else "vector", "vector"),
            "seed_init": (self.seed_init, "normal"),
            "layout": (self.layout, "contiguous"),
            "iterations": (self.iterations, 1),
            "tol": (self.tol, None),
            "damping": (self.damping, 0),
            "norm_floor": (self.norm_floor, 0),
        }
        changed = [f", {name}={now!r}" for name, (now, usual) in options.items() if now != usual]
        sign = ", nonnegative" if self.nonnegative else ""
        return f"{super().extra_repr()}{''.join(changed)}{sign}"
