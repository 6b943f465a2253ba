"""LEAN as a function of standard ONNX operators; formulas of :mod:`lean_fx.reduction.functional`.

In a file, each reduction is one node ``LEAN`` of the domain ``lean_fx``. A function in the same
file says what it computes; a runtime without the kernel inlines it. There are three forms, chosen
by profiling ONNX Runtime's CPU:

- *planes*, if positions lie behind the channels (images) and no value is negative: products and
  sums over whole planes. Sums over the outer axis are matrix products with ones, since ReduceSum is
  about four times slower there at batch 1.
- *pairs*, for planes of any sign with many positions and few channels: ``G`` is the products of all
  pairs of rows, which takes C' times the numbers of ``x``.
- *rows*, if the channels come last, or the maps are small, large or of unknown size: one small
  matrix product for each position.

A tiny number is added to each divisor that may be zero; it is lost in any other divisor.
"""

from __future__ import annotations

from dataclasses import dataclass

DOMAIN = "lean_fx"
OPERATOR = "LEAN"

#: The prefix of the names of nodes that inlining puts in the place of a LEAN node.
INLINED = f"{OPERATOR}/"


@dataclass(frozen=True)
class LeanFunction:
    """What a LEAN node computes; nodes with equal fields share one function.

    Attributes:
        preserved: C'.
        reducible: C''.
        rows: whether the channels are on the last axis.
        normalize: as in :func:`~lean_fx.lean_reduction`, like the next four.
        scale: of the output.
        layout: of the channels.
        iterations: steps of the walk.
        nonnegative: whether no value is below 0.
        matrix: whether the seed has a value for each channel.
        dtype: of ``x``: ``"float"``, ``"double"``, ``"float16"`` or ``"bfloat16"``.
        axis: the axis of the channels, if shapes are known only at run time; None if the node's
            attributes ``matrix_shape`` and ``output_shape`` hold the shapes.
        damping: as in :func:`~lean_fx.lean_reduction`, like ``norm_floor``.
        norm_floor: added to ``sum |y|``.
        pairs: whether ``G`` is computed as the products of all pairs of rows.
    """

    preserved: int
    reducible: int
    rows: bool
    normalize: str
    scale: str
    layout: str
    iterations: int
    nonnegative: bool
    matrix: bool
    dtype: str
    axis: int | None = None
    damping: float = 0.0
    norm_floor: float = 0.0
    pairs: bool = False

    @property
    def overload(self) -> str:
        """A unique name for this form.

        Example:
            >>> LeanFunction(
            ...     10, 5, False, "column", "sum", "contiguous", 1, True, False, "float"
            ... ).overload
            '10x5_nonnegative'
        """
        words = [f"{self.preserved}x{self.reducible}"]
        words += ["nonnegative"] * self.nonnegative + ["rows"] * self.rows + ["pairs"] * self.pairs
        words += [self.normalize] * (self.normalize != "column")
        words += [self.scale] * (self.scale != "sum")
        words += [self.layout] * (self.layout != "contiguous")
        words += [f"iterations{self.iterations}"] * (self.iterations != 1)
        words += ["matrix"] * self.matrix + [self.dtype] * (self.dtype != "float")
        words += [f"axis{self.axis}"] * (self.axis is not None)
        words += [f"{name}{value!r}" for name, value in self._floats().items()]
        return "_".join(words)

    def _floats(self) -> dict[str, float]:
        """The options that a node names only where they are not 0."""
        options = {"damping": self.damping, "norm_floor": self.norm_floor}
        return {name: value for name, value in options.items() if value}

    def text(self, opset: int) -> str:
        """The function in ONNX's own text format."""
        body = _Body(self)
        body.write()
        attributes = "axis, normalize, scale, layout, iterations, nonnegative"
        if self.axis is None:
            attributes += ", matrix_shape, output_shape"
        attributes += "".join(f", {name}" for name in self._floats())
        lines = "\n".join(f"  {line}" for line in body.lines)
        return (
            f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
            f"{OPERATOR} <{attributes}> (x, seed) => (out) {{\n{lines}\n}}"
        )


class _Body:
    """Writes the lines of a function, one value a line."""

    def __init__(self, spec: LeanFunction) -> None:
        self.spec = spec
        self.lines: list[str] = []
        self.real = "double" if spec.dtype == "double" else "float"
        self.planes = (spec.nonnegative or spec.pairs) and not spec.rows
        # The axes of the preserved and of the reducible channels in X.
        self.i, self.k = (1, 2) if self.planes else (-2, -1)
        if self.planes and spec.layout == "interleaved":
            self.i, self.k = 2, 1

    def write(self) -> None:
        spec = self.spec
        half = spec.dtype in ("float16", "bfloat16")
        x, seed = "x", "seed"
        if half:
            x, seed = self.put("x32", "Cast<to = 1>(x)"), self.put("seed32", "Cast<to = 1>(seed)")
        if self.real == "double":  # the text format reads a double as a float
            self.put("small", "Constant<value = double {1e-30}>()")
            self.put("ten", "Constant<value = double {10}>()")
            self.put("tiny", "Pow(small, ten)")
        else:
            self.put("tiny", "Constant<value = float {1e-30}>()")
        if spec.norm_floor:
            self.real_number("norm_floor", spec.norm_floor)
        self.matrix(x)
        v = self.seed(seed)
        if spec.normalize != "none":
            self.column_sums()
        for step in range(spec.iterations):
            v = self.walk(v, f"{step + 1}" if spec.iterations > 1 else "")
        v = self.scaled(v)
        if spec.rows or self.planes:
            last = v
        else:  # [B, P, C', 1]: the positions go behind the channels again
            last = self.put("planes", f"Transpose<perm = [0, 2, 1, 3]>({v})")
        self.put("shaped" if half else "out", f"Reshape({last}, {self.output_shape()})")
        if half:
            self.put("out", "CastLike(shaped, x)")

    def put(self, name: str, expression: str) -> str:
        self.lines.append(f"{name} = {expression}")
        return name

    def ints(self, name: str, values: list[int]) -> str:
        return self.put(name, f"Constant<value_ints = {values}>()")

    def real_number(self, name: str, value: float) -> str:
        return self.put(name, f"Constant<value = {self.real} {{{value!r}}}>()")

    def axis(self, number: int) -> str:
        """The name of a constant, which is written at its first use."""
        name = f"axis{number}".replace("-", "_")
        if name not in self.names():
            self.ints(name, [number])
        return name

    def names(self) -> set[str]:
        return {line.partition(" = ")[0] for line in self.lines}

    def matrix(self, x: str) -> None:
        """``X`` with the axes of ``i`` and ``k`` in their places."""
        spec = self.spec
        if spec.axis is None:
            self.put("matrix_shape", "Constant<value_ints : ints = @matrix_shape>()")
        else:
            sizes = [spec.preserved, spec.reducible]
            sizes = sizes[::-1] if spec.layout == "interleaved" else sizes
            self.put("leading", f"Shape<start = 0, end = {spec.axis}>(x)")
            if spec.rows:
                self.ints("matrix_shape", [-1, *sizes])
            else:
                self.put("before", "ReduceProd(leading)")
                self.ints("channels", [*sizes, -1])
                self.put("matrix_shape", "Concat<axis = 0>(before, channels)")
        interleaved = spec.layout == "interleaved"
        if self.planes or (spec.rows and not interleaved):
            self.put("X", f"Reshape({x}, matrix_shape)")
            return
        self.put("view", f"Reshape({x}, matrix_shape)")
        behind = [0, 3, 2, 1] if interleaved else [0, 3, 1, 2]
        perm = [0, 2, 1] if spec.rows else behind
        self.put("X", f"Transpose<perm = {perm}>(view)")

    def output_shape(self) -> str:
        if self.spec.axis is None:
            return self.put("output_shape", "Constant<value_ints : ints = @output_shape>()")
        self.put("trailing", f"Shape<start = {self.spec.axis + 1}>(x)")
        self.ints("preserved", [self.spec.preserved])
        return self.put("output_shape", "Concat<axis = 0>(leading, preserved, trailing)")

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

    def above_zero(self, sums: str) -> str:
        # ONNX Runtime takes 1e-300 for 0 and an Add of it for nothing; Max is slower than Add.
        return f"{'Max' if self.real == 'double' else 'Add'}({sums}, tiny)"

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

    def sum(self, value: str, axis: int, inner: int | None = None) -> str:
        """The sum over an axis, which stays with length 1.

        ``inner`` is the length of axis 2, if it is not the one of ``X``.
        """
        if axis != 1:
            return f"ReduceSum({value}, {self.axis(axis)})"
        outer, behind = self.spec.preserved, self.spec.reducible
        if self.i == 2:
            outer, behind = behind, outer
        inner = inner or behind
        if "ones" not in self.names():
            row = ", ".join(["1"] * outer)
            self.put("ones", f"Constant<value = {self.real}[1,{outer}] {{{row}}}>()")
            self.ints("flat", [0, outer, -1])
        if f"summed{inner}" not in self.names():
            self.ints(f"summed{inner}", [0, 1, inner, -1])
        self.put(f"{value}_flat", f"Reshape({value}, flat)")
        self.put(f"{value}_sum", f"MatMul(ones, {value}_flat)")
        return f"Reshape({value}_sum, summed{inner})"

    def turned(self) -> list[int]:
        return [0, 2, 1] if self.spec.rows else [0, 1, 3, 2]
