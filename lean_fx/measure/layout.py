"""Tell how well a file fits ONNX Runtime's blocked layout, its fast path for convolutions."""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path
from typing import Any

from lean_fx.errors import require
from lean_fx.export.sessions import open_session
from lean_fx.measure.machines import machine


def _optimised(file: Path, kernel: bool) -> Any:
    """The graph as ONNX Runtime runs it on this machine."""
    onnx = require("onnx", purpose="comparing")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimised.onnx"
        open_session(file.stem, file, threads=1, optimised=target, kernel=kernel)
        return onnx.load(target, load_external_data=False)


def blocked_layout(file: Path, *, kernel: bool = False) -> tuple[int, tuple[str, ...]]:
    """How ONNX Runtime uses its blocked layout, the fast path for convolutions, for a file.

    Args:
        file: the model.
        kernel: whether LEAN nodes run by :func:`~lean_fx.onnx_kernel`.

    Returns:
        How many nodes only change the layout; and the convolutions that miss it, with the reason.
        It is for two-dimensional convolutions in float32 with one group, whose input channels are
        fewer than a block (16 numbers with AVX-512, 8 without) or a multiple of 4, and for some
        with more groups.
    """
    nodes = _optimised(file, kernel).graph.node
    reorders = sum(node.op_type in ("ReorderInput", "ReorderOutput") for node in nodes)
    if platform.machine() not in ("x86_64", "AMD64"):
        return reorders, ()  # there is no such layout
    onnx = require("onnx", purpose="comparing")
    graph = onnx.load(file, load_external_data=False).graph
    weights = {value.name: value for value in graph.initializer}
    block = 16 if "AVX-512" in machine() else 8
    found = []
    for node in nodes:
        if node.op_type not in ("Conv", "FusedConv") or node.domain == "com.microsoft.nchwc":
            continue
        layer = node.input[1].removesuffix(".weight") if node.input[1] in weights else node.name
        groups = next((each.i for each in node.attribute if each.name == "group"), 1)
        dims = weights[node.input[1]].dims if node.input[1] in weights else []
        if len(dims) != 4 or weights[node.input[1]].data_type != onnx.TensorProto.FLOAT:
            reason = "it takes only two-dimensional convolutions with constant weights in float32"
        elif groups > 1:
            reason = f"its {groups} groups do not fill blocks of {block} channels"
        else:
            reason = f"{dims[1]} input channels are not below {block}, and no multiple of 4"
        found.append(f"{layer} is off ONNX Runtime's fast path: {reason}")
    return reorders, tuple(found)
