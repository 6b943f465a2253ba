"""The forms of :mod:`lean_fx.reduction.conditioned` as functions of standard ONNX operators."""

from __future__ import annotations

from dataclasses import dataclass

from lean_fx.export.function_body import FunctionBody, NodeFunction


@dataclass(frozen=True, kw_only=True)
class SimplexFunction(NodeFunction):
    """What a node ``LEANSimplex`` computes of ``x`` and ``logits``.

    Example:
        >>> SimplexFunction(preserved=10, reducible=5, rows=True, dtype="float").overload
        '10x5_rows'
    """

    operator = "LEANSimplex"

    def text(self, opset: int) -> str:
        """The function in ONNX's own text format."""
        body = FunctionBody(self, planes=not self.rows, squares=False)
        x, logits = body.begin("x", "logits")
        body.matrix(x)
        body.parameter("V", body.put("v", f"Softmax<axis = 0>({logits})"), [self.preserved, 1])
        body.put("VX", "Mul(X, V)")
        body.put("t", body.sum("VX", body.i))
        body.put("abs_t", "Abs(t)")
        body.put("s0", body.sum("abs_t", body.k))
        body.put("s", body.above_zero("s0"))
        body.put("a", "Div(t, s)")
        body.put("aX", "Mul(X, a)")
        body.end(body.put("y", body.sum("aX", body.k)))
        return body.text(opset, ("x", "logits"), ("axis",))


@dataclass(frozen=True, kw_only=True)
class GatedFunction(NodeFunction):
    """What a node ``LEANGated`` computes of ``x``, ``weight`` and ``gate``.

    Example:
        >>> GatedFunction(preserved=10, reducible=5, rows=False, dtype="double").overload
        '10x5_double'
    """

    operator = "LEANGated"

    def text(self, opset: int) -> str:
        """The function in ONNX's own text format."""
        body = FunctionBody(self, planes=not self.rows, squares=False)
        x, weight, gate = body.begin("x", "weight", "gate")
        body.matrix(x)
        matrix = [self.preserved, self.reducible]
        body.parameter("W", weight, matrix)
        body.parameter("V", gate, matrix)
        body.put("VX", "Mul(X, V)")
        body.put("u", body.sum("VX", body.i))
        body.put("absX", "Abs(X)")
        body.ints("both", [body.i, body.k])
        body.put("m0", "ReduceMean(absX, both)")
        body.put("m", body.above_zero("m0"))
        body.put("u_m", "Div(u, m)")
        body.put("tanh", "Tanh(u_m)")
        body.real_number("one", 1.0)
        body.put("g", "Add(tanh, one)")
        body.put("WX", "Mul(X, W)")
        body.put("gWX", "Mul(WX, g)")
        body.end(body.put("y", body.sum("gWX", body.k)))
        return body.text(opset, ("x", "weight", "gate"), ("axis",))
