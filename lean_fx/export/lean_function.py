"""LEAN as a function of standard ONNX operators; formulas of :mod:`lean_fx.reduction.functional`.

There are three ways to write it, chosen by profiling ONNX Runtime's CPU:

- *planes*, if positions lie behind the channels (images) and no value is negative: products and
  sums over whole planes. Sums over the outer axis are matrix products with ones, since ReduceSum is
  about four times slower there at batch 1.
- *pairs*, for planes of any sign with many positions and few channels: ``G`` is the products of all
  pairs of rows, which takes C' times the numbers of ``x``.
- *rows*, if the channels come last, or the maps are small, large or of unknown size: one small
  matrix product for each position.
"""

from __future__ import annotations

from dataclasses import dataclass

from lean_fx.export.function_body import FunctionBody, NodeFunction


@dataclass(frozen=True, kw_only=True)
class LeanFunction(NodeFunction):
    """What a LEAN node computes.

    Attributes:
        normalize: as in :func:`~lean_fx.lean_reduction`, like the next two.
        scale: of the output.
        iterations: steps of the walk.
        nonnegative: whether no value is below 0.
        matrix: whether the seed has a value for each channel.
        damping: as in :func:`~lean_fx.lean_reduction`, like ``norm_floor``.
        norm_floor: added to ``sum |y|``.
        pairs: whether ``G`` is computed as the products of all pairs of rows.

    Example:
        >>> LeanFunction(
        ...     preserved=10, reducible=5, rows=False, dtype="float", normalize="column",
        ...     scale="sum", iterations=1, nonnegative=True, matrix=False,
        ... ).overload
        '10x5_nonnegative'
    """

    operator = "LEAN"

    normalize: str
    scale: str
    iterations: int
    nonnegative: bool
    matrix: bool
    damping: float = 0.0
    norm_floor: float = 0.0
    pairs: bool = False

    def words(self) -> list[str]:
        """What ``overload`` says of the form's own fields."""
        words = ["nonnegative"] * self.nonnegative + ["rows"] * self.rows + ["pairs"] * self.pairs
        words += [self.normalize] * (self.normalize != "column")
        words += [self.scale] * (self.scale != "sum")
        words += [self.layout] * (self.layout != "contiguous")
        words += [f"iterations{self.iterations}"] * (self.iterations != 1)
        words += ["matrix"] * self.matrix
        words += [f"{name}{value!r}" for name, value in self._floats().items()]
        return words

    def _floats(self) -> dict[str, float]:
        """The options that a node names only where they are not 0."""
        options = {"damping": self.damping, "norm_floor": self.norm_floor}
        return {name: value for name, value in options.items() if value}

    def text(self, opset: int) -> str:
        """The function in ONNX's own text format."""
        body = _Body(self)
        body.write()
        attributes = ("axis", "normalize", "scale", "layout", "iterations", "nonnegative")
        return body.text(opset, ("x", "seed"), (*attributes, *self._floats()))


class _Body(FunctionBody):
    def __init__(self, spec: LeanFunction) -> None:
        super().__init__(spec, (spec.nonnegative or spec.pairs) and not spec.rows, squares=True)
        self.spec = spec

    def write(self) -> None:
        spec = self.spec
        x, seed = self.begin("x", "seed")
        if spec.norm_floor:
            self.real_number("norm_floor", spec.norm_floor)
        self.matrix(x)
        v = self.seed(seed)
        if spec.normalize != "none":
            self.column_sums()
        for step in range(spec.iterations):
            v = self.walk(v, f"{step + 1}" if spec.iterations > 1 else "")
        v = self.scaled(v)
        if not spec.rows and not self.planes:
            # [B, P, C', 1]: the positions go behind the channels again
            v = self.put("planes", f"Transpose<perm = [0, 2, 1, 3]>({v})")
        self.end(v)

    def seed(self, seed: str) -> str:
        """``V``, shaped to multiply ``X``."""
        preserved, reducible = self.spec.preserved, self.spec.reducible
        shape = [preserved, reducible if self.spec.matrix else 1]
        if self.planes:
            shape.append(1)
            if self.i == 2:
                if self.spec.matrix:
                    seed = self.put("turned", f"Transpose<perm = [1, 0]>({seed})")
                shape[:2] = shape[1::-1]
        self.ints("seed_shape", shape)
        return self.put("V", f"Reshape({seed}, seed_shape)")

    def column_sums(self) -> None:
        """``d[j] = sum_i |G[i,j]|``."""
        if self.spec.nonnegative:
            self.put("t", self.sum("X", self.i))
            sums = self.over_k("d0", "t")
        else:
            if self.spec.pairs:
                self.put("left", f"Unsqueeze(X, {self.axis(self.i + 1)})")
                self.put("right", f"Unsqueeze(X, {self.axis(self.i)})")
                self.put("products", "Mul(left, right)")
                both = 3 if self.k == 2 else 1  # the axis of k, beside the two of rows
                self.put("G", f"ReduceSum<keepdims = 0>(products, {self.axis(both)})")
            else:
                self.put("XT", f"Transpose<perm = {self.turned()}>(X)")
                self.put("G", "MatMul(X, XT)")
            self.put("absG", "Abs(G)")
            sums = self.put("d0", f"ReduceSum(absG, {self.axis(self.k)})")
        if self.spec.damping:
            self.put("d_sum", self.sum(sums, self.i, inner=1))
            share = self.real_number("share", self.spec.damping / self.spec.preserved)
            self.put("d_share", f"Mul(d_sum, {share})")
            sums = self.put("d_damped", f"Add({sums}, d_share)")
        self.put("d", self.above_zero(sums))

    def walk(self, v: str, number: str) -> str:
        """One step, divided by its l1 norm."""
        spec = self.spec
        weights = self.put(f"r{number}", f"Div({v}, d)") if spec.normalize == "column" else v
        self.over_i(f"u{number}", weights, spec.matrix and v == "V")
        y = self.over_k(f"y{number}", f"u{number}")
        if spec.normalize == "row":
            y = self.put(f"yd{number}", f"Div({y}, d)")
        self.put(f"a{number}", f"Abs({y})")
        self.put(f"s0{number}", self.sum(f"a{number}", self.i, inner=1))
        norm = f"s0{number}"
        if spec.norm_floor:
            norm = self.put(f"s1_{number}", f"Add({norm}, norm_floor)")
        self.put(f"s{number}", self.above_zero(norm))
        return self.put(f"V{number or 1}", f"Div({y}, s{number})")

    def scaled(self, v: str) -> str:
        if self.spec.scale == "sum":
            return v
        self.put("count", f"Constant<value = {self.real} {{{self.spec.preserved}}}>()")
        v = self.put("mean", f"Mul({v}, count)")
        if self.spec.scale == "magnitude":
            values = "X" if self.spec.nonnegative else self.put("absX", "Abs(X)")
            self.ints("both", [self.i, self.k])
            self.put("m", f"ReduceMean({values}, both)")
            v = self.put("scaled", f"Mul({v}, m)")
        return v

    def over_i(self, name: str, weights: str, every_channel: bool) -> str:
        """``u[k] = sum_i weights[i] X[i,k]``."""
        if self.planes or every_channel:
            self.put(f"{name}X", f"Mul(X, {weights})")
            return self.put(name, self.sum(f"{name}X", self.i))
        shape = self.turned() if weights != "V" else [1, 0]
        self.put(f"{name}T", f"Transpose<perm = {shape}>({weights})")
        return self.put(name, f"MatMul({name}T, X)")

    def over_k(self, name: str, weights: str) -> str:
        """``y[i] = sum_k X[i,k] weights[k]``."""
        if self.planes:
            self.put(f"{name}X", f"Mul(X, {weights})")
            return self.put(name, self.sum(f"{name}X", self.k))
        self.put(f"{name}T", f"Transpose<perm = {self.turned()}>({weights})")
        return self.put(name, f"MatMul(X, {name}T)")

    def turned(self) -> list[int]:
        return [0, 2, 1] if self.spec.rows else [0, 1, 3, 2]
