"""The parts that the functions of all reductions have: shapes, sums and constants as ONNX text.

In a file, each reduction is one node of the domain ``lean_fx``. A function in the same file says
what it computes; a runtime without the kernel inlines it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

DOMAIN = "lean_fx"

#: The prefix of the names of nodes that inlining puts in the place of a node of the domain.
INLINED = "LEAN/"


@dataclass(frozen=True, kw_only=True)
class NodeFunction:
    """What a node of the domain computes; nodes with equal fields share one function.

    Attributes:
        operator: the name of the node's operator.
        preserved: C'.
        reducible: C''.
        rows: whether the channels are on the last axis.
        dtype: of ``x``: ``"float"``, ``"double"``, ``"float16"`` or ``"bfloat16"``.
        layout: of the channels, as in :func:`~lean_fx.lean_reduction`.
        axis: the axis of the channels, if shapes are known only at run time; None if the node's
            attributes ``matrix_shape`` and ``output_shape`` hold the shapes.
    """

    operator: ClassVar[str]

    preserved: int
    reducible: int
    rows: bool
    dtype: str
    layout: str = "contiguous"
    axis: int | None = None

    @property
    def overload(self) -> str:
        """A unique name for this form."""
        words = [f"{self.preserved}x{self.reducible}", *self.words()]
        words += [self.dtype] * (self.dtype != "float")
        words += [f"axis{self.axis}"] * (self.axis is not None)
        return "_".join(words)

    def words(self) -> list[str]:
        """What ``overload`` says of the form's own fields."""
        return ["rows"] * self.rows

    def text(self, opset: int) -> str:
        """The function in ONNX's own text format."""
        raise NotImplementedError


class FunctionBody:
    """Writes the lines of a function, one value a line.

    Args:
        form: what is computed.
        planes: whether positions stay behind the channels, so that ``X`` is ``[B, C', C'', P]``;
            otherwise it is ``[B, C', C'']`` where the channels come last, and ``[B, P, C', C'']``
            where not. The attributes ``i`` and ``k`` are its axes of C' and C''.
        squares: whether divisors are sums of products of values, in which 1e-30 is lost.
    """

    def __init__(self, form: NodeFunction, planes: bool, squares: bool) -> None:
        self.form = form
        self.planes = planes
        self.lines: list[str] = []
        self.real = "double" if form.dtype == "double" else "float"
        self.adds_tiny = squares and self.real == "float"
        self.i, self.k = (1, 2) if planes else (-2, -1)
        if planes and form.layout == "interleaved":
            self.i, self.k = 2, 1

    def text(self, opset: int, inputs: tuple[str, ...], attributes: tuple[str, ...]) -> str:
        """The function in ONNX's own text format."""
        if self.form.axis is None:
            attributes = (*attributes, "matrix_shape", "output_shape")
        lines = "\n".join(f"  {line}" for line in self.lines)
        return (
            f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
            f"{self.form.operator} <{', '.join(attributes)}> ({', '.join(inputs)}) => (out) "
            f"{{\n{lines}\n}}"
        )

    def put(self, name: str, expression: str) -> str:
        """Add a line; the name of its value."""
        self.lines.append(f"{name} = {expression}")
        return name

    def begin(self, *inputs: str) -> list[str]:
        """The names of the inputs in the type that is computed in; writes ``tiny``, of divisors."""
        names = list(inputs)
        if self.is_half():
            names = [self.put(f"{name}32", f"Cast<to = 1>({name})") for name in inputs]
        if self.real == "double":  # the text format reads a double as a float
            self.put("small", "Constant<value = double {1e-30}>()")
            self.put("ten", "Constant<value = double {10}>()")
            self.put("tiny", "Pow(small, ten)")
        else:
            tiny = "1e-30" if self.adds_tiny else "1.1754944e-38"
            self.put("tiny", f"Constant<value = float {{{tiny}}}>()")
        return names

    def end(self, value: str) -> None:
        """Give ``value`` the shape and the type of the output."""
        self.put("shaped" if self.is_half() else "out", f"Reshape({value}, {self.output_shape()})")
        if self.is_half():
            self.put("out", "CastLike(shaped, x)")

    def is_half(self) -> bool:
        """Whether x is stored in 16 bits."""
        return self.form.dtype in ("float16", "bfloat16")

    def ints(self, name: str, values: list[int]) -> str:
        """Add a constant of integers."""
        return self.put(name, f"Constant<value_ints = {values}>()")

    def real_number(self, name: str, value: float) -> str:
        """Add a constant of the type that is computed in."""
        return self.put(name, f"Constant<value = {self.real} {{{value!r}}}>()")

    def axis(self, number: int) -> str:
        """The name of a constant, which is written at its first use."""
        name = f"axis{number}".replace("-", "_")
        if name not in self.names():
            self.ints(name, [number])
        return name

    def names(self) -> set[str]:
        """The values so far."""
        return {line.partition(" = ")[0] for line in self.lines}

    def matrix(self, x: str) -> None:
        """``X`` with the axes of ``i`` and ``k`` in their places."""
        form = self.form
        if form.axis is None:
            self.put("matrix_shape", "Constant<value_ints : ints = @matrix_shape>()")
        else:
            sizes = [form.preserved, form.reducible]
            sizes = sizes[::-1] if form.layout == "interleaved" else sizes
            self.put("leading", f"Shape<start = 0, end = {form.axis}>(x)")
            if form.rows:
                self.ints("matrix_shape", [-1, *sizes])
            else:
                self.put("before", "ReduceProd(leading)")
                self.ints("channels", [*sizes, -1])
                self.put("matrix_shape", "Concat<axis = 0>(before, channels)")
        interleaved = form.layout == "interleaved"
        if self.planes or (form.rows and not interleaved):
            self.put("X", f"Reshape({x}, matrix_shape)")
            return
        self.put("view", f"Reshape({x}, matrix_shape)")
        behind = [0, 3, 2, 1] if interleaved else [0, 3, 1, 2]
        perm = [0, 2, 1] if form.rows else behind
        self.put("X", f"Transpose<perm = {perm}>(view)")

    def parameter(self, name: str, given: str, sizes: list[int]) -> str:
        """An input of C' or C' x C'' values, shaped to multiply ``X``."""
        shape = self.ints(f"{name}_shape", [*sizes, 1] if self.planes else sizes)
        return self.put(name, f"Reshape({given}, {shape})")

    def output_shape(self) -> str:
        """The shape of ``x`` with C' channels."""
        if self.form.axis is None:
            return self.put("output_shape", "Constant<value_ints : ints = @output_shape>()")
        self.put("trailing", f"Shape<start = {self.form.axis + 1}>(x)")
        self.ints("preserved", [self.form.preserved])
        return self.put("output_shape", "Concat<axis = 0>(leading, preserved, trailing)")

    def above_zero(self, sums: str) -> str:
        """Divisors that are not 0."""
        # Max is slower than Add; but ONNX Runtime takes 1e-300 for 0 and an Add of it for nothing.
        return f"{'Add' if self.adds_tiny else 'Max'}({sums}, tiny)"

    def sum(self, value: str, axis: int, inner: int | None = None) -> str:
        """The sum over an axis, which stays with length 1.

        ``inner`` is the length of axis 2, if it is not the one of ``X``.
        """
        if axis != 1:
            return f"ReduceSum({value}, {self.axis(axis)})"
        outer, behind = self.form.preserved, self.form.reducible
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
