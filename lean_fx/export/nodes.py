"""The nodes of reductions in an exported model: their names, shapes and functions."""

from __future__ import annotations

import ast
import dataclasses
import math
from typing import Any

from lean_fx.errors import require
from lean_fx.export.conditioned_function import GatedFunction, SimplexFunction
from lean_fx.export.function_body import DOMAIN, NodeFunction
from lean_fx.export.lean_function import LeanFunction
from lean_fx.graph.rewriting import numbered

#: Where a node keeps the name that its value has in torch's graph.
TORCH_NAME = "lean_fx.torch_name"

#: When products of pairs of rows are used: at least so many positions for each row of a sample, and
#: at most so many numbers in all.
LEAST_POSITIONS, MOST_NUMBERS = 8, 2**21

_DTYPES = {"FLOAT": "float", "DOUBLE": "double", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}


def define_functions(model: Any) -> None:
    """Give every node of a reduction its shapes and its function.

    Args:
        model: an ``onnx_ir.Model``; changed in place.
    """
    onnx, ir = require("onnx", purpose="export"), require("onnx_ir", purpose="export")
    opset = model.opset_imports[""]
    taken = {value.name for value in model.graph.inputs} | set(model.graph.initializers)
    for node in model.graph.all_nodes():
        taken |= {node.name, *(value.name for value in node.outputs)}
    for node in model.graph.all_nodes():
        if node.domain != DOMAIN:
            continue
        shape = [size if isinstance(size, int) else None for size in node.inputs[0].shape]
        axis = node.attributes["axis"].value
        function = _function_of(node, shape, axis)
        shapes = _shapes(shape, axis, function)
        if shapes is None:
            function = dataclasses.replace(function, axis=axis)
        else:
            if isinstance(function, LeanFunction):
                pairs = _suit_pairs(shape[axis + 1 :], function)
                function = dataclasses.replace(function, pairs=pairs)
            for name, sizes in zip(("matrix_shape", "output_shape"), shapes, strict=True):
                node.attributes[name] = ir.AttrInt64s(name, sizes)
        node.overload = function.overload
        (output,) = node.outputs
        node.metadata_props[TORCH_NAME] = output.name
        node.name = _free(_module_of(node) or node.name, taken)
        output.name = _free(function.operator, taken)
        proto = onnx.parser.parse_function(function.text(opset))
        proto.overload = function.overload
        definition = ir.serde.deserialize_function(proto)
        model.functions[definition.identifier()] = definition


def _function_of(node: Any, shape: list[int | None], axis: int) -> NodeFunction:
    """What a node computes, as far as its attributes and the shapes of its inputs say it."""
    x, first, *_ = node.inputs
    preserved, channels = first.shape[0], shape[axis]
    assert channels is not None
    common = {
        "preserved": preserved,
        "reducible": channels // preserved,
        "rows": axis == len(shape) - 1,
        "dtype": _DTYPES[x.dtype.name],
    }
    if node.op_type == "LEANSimplex":
        return SimplexFunction(**common)
    if node.op_type == "LEANGated":
        return GatedFunction(**common)
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    del given["axis"]
    given |= {"nonnegative": bool(given["nonnegative"]), "matrix": len(first.shape) == 2}
    return LeanFunction(**common, **given)


def _suit_pairs(behind: list[int | None], function: LeanFunction) -> bool:
    """Whether products of pairs of rows are faster, as the sizes of the maps are known and fit.

    ``MOST_NUMBERS`` bounds their memory, which is C' times that of the input.
    """
    if function.rows or function.nonnegative or function.normalize == "none" or None in behind:
        return False
    rows, positions = function.preserved, math.prod(size or 1 for size in behind)
    numbers = rows**2 * function.reducible * positions
    return positions >= LEAST_POSITIONS * rows and numbers <= MOST_NUMBERS


def _free(wanted: str, taken: set[str]) -> str:
    """The name ``wanted``, with a number if that is taken; adds it to ``taken``."""
    name = next(name for name in numbered(wanted) if name not in taken)
    taken.add(name)
    return name


def _module_of(node: Any) -> str:
    """The qualified name of the reduction that a node was exported from, or an empty string."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _shapes(
    shape: list[int | None], axis: int, function: NodeFunction
) -> tuple[list[int], list[int]] | None:
    """The shapes for reshaping the input and the output; None if two or more sizes are unknown."""
    behind = shape[axis + 1 :]
    matrix = [function.preserved, function.reducible]
    if function.layout == "interleaved":
        matrix = matrix[::-1]
    if function.rows:
        matrix = [-1, *matrix]
    elif axis <= 1:
        matrix = [1 - axis, *matrix, -1]  # 0 copies a length
    elif None not in behind:
        matrix = [-1, *matrix, math.prod(size or 1 for size in behind)]
    else:
        return None
    output = [*shape[:axis], function.preserved, *behind]
    if output.count(None) > 1:
        return None
    return matrix, [-1 if size is None else size for size in output]
