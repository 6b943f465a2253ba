"""INT8 twins of ONNX files, by onnxruntime.quantization, and what they cost in accuracy.

Convolutions, linear layers and matrix products become INT8. The functions of LEAN nodes, and the
standard operators in their place, stay in floating point: their divisions do not tolerate a rounded
divisor.

On x86-64 processors without VNNI, ONNX Runtime multiplies unsigned activations by signed weights
with an instruction that adds pairs of products in 16 bits and saturates (127 * 255 * 2 does not
fit). A file that is right on one machine is then wrong on another. Weights of 7 bits cannot
saturate, so they are the default::

    int8_target   activations       weights by output channel
    "portable"    unsigned, 8 bits  signed, 7 bits
    "vnni"        unsigned, 8 bits  signed, 8 bits

Dynamic twins have unsigned weights of 8 bits, which no processor saturates.

``examples/bench_int8.py`` compares the pairings. On a processor with AVX2 and no VNNI, the mean
difference from the float file is 1.5 % of the mean output for the paper's net with LEAN and 1.0 %
without, against 5.1 % and 5.5 % with weights of 8 bits, at the same speed (within 2 %). Unsigned
weights of 8 bits come 0.2 and 0.04 points closer, and take 11 % and 17 % more time (batch 16, one
thread). Signed activations are as exact as unsigned ones, and up to 13 % slower.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lean_fx.errors import ArgumentError, ExportError, one_line, require
from lean_fx.export.batches import arrays_by_name, first_output
from lean_fx.export.function_body import INLINED
from lean_fx.export.sessions import open_session
from lean_fx.files import replacing
from lean_fx.locks import SHARED_STATE
from lean_fx.onnx_files import places_of_weights

Quantize = Literal["dynamic", "static"]
Int8Target = Literal["portable", "vnni"]

#: The key of a twin's metadata that says how it was made.
INT8 = "lean_fx.int8"


def quantize_onnx(
    path: str | os.PathLike[str],
    mode: Quantize,
    calibration: Iterable[Any] | None = None,
    target: Int8Target = "portable",
) -> Path:
    """Write the INT8 twin of an ONNX file beside it: ``net.int8.onnx`` for ``net.onnx``.

    Args:
        path: the file, in float32.
        mode: ``"dynamic"``: INT8 weights, activations by their range in each call; ``"static"``:
            both, activations by their range over ``calibration``.
        calibration: for ``"static"``: batches of inputs, each a tensor or a tuple of them. The
            caller drops what else a loader gives, such as labels.
        target: the processors that a static twin is for, see the module's docstring:
            ``"portable"``, all of them; or ``"vnni"``, x86-64 with VNNI (AVX-512 VNNI or AVX-VNNI)
            and arm64, where weights of 8 bits are right too.

    Returns:
        The path of the twin. Its metadata say under ``"lean_fx.int8"`` how it was made.

    Raises:
        ArgumentError: ``"static"`` has no calibration data, or these are not batches of the file's
            inputs, or one has no rows.
        ExportError: ONNX Runtime cannot quantise the file.
        MissingDependencyError: onnxruntime or onnx is not installed.
    """
    tools = require("onnxruntime.quantization", purpose="quantisation")
    source = Path(path)
    twin = source.with_suffix(".int8.onnx")
    batches = _calibration_batches(source, mode, calibration)
    onnx = require("onnx", purpose="quantisation")
    model = onnx.load(source, load_external_data=False)
    names_within = (node.name for node in model.graph.node)
    options = {
        "use_external_data_format": bool(places_of_weights(model)),
        "nodes_to_exclude": [name for name in names_within if name.startswith(INLINED)],
    }
    with replacing(twin) as part, _quiet():
        try:
            if mode == "dynamic":
                # Convolutions with signed weights have no INT8 kernel on the CPU.
                tools.quantize_dynamic(source, part, weight_type=tools.QuantType.QUInt8, **options)
            else:
                tools.quantize_static(
                    source,
                    part,
                    _reader_of(batches),
                    activation_type=tools.QuantType.QUInt8,
                    weight_type=tools.QuantType.QInt8,
                    per_channel=True,
                    reduce_range=target == "portable",
                    **options,
                )
            written = onnx.load(part, load_external_data=False)
            said = "dynamic" if mode == "dynamic" else f"static, {target}"
            written.metadata_props.add(key=INT8, value=said)
            onnx.save(written, part)
        except Exception as error:
            reason = one_line(error)
            raise ExportError(
                f"{source}: ONNX Runtime cannot quantise it ({reason}); use the file as it is"
            ) from error
    return twin


def _calibration_batches(
    source: Path, mode: Quantize, calibration: Iterable[Any] | None
) -> list[dict[str, Any]]:
    """Batches of a file's inputs by name.

    Raises:
        ArgumentError: they are not batches of its inputs, or there are none though needed.
    """
    session = open_session(source.name, source, threads=1)
    names = [value.name for value in session.get_inputs()]
    given = () if calibration is None else calibration
    batches = [arrays_by_name("calibration", names, each) for each in given]
    if mode == "static" and not batches:
        raise ArgumentError("quantize='static' has no calibration data; give batches of inputs")
    if any(not array.size for batch in batches for array in batch.values()):
        raise ArgumentError("calibration: a batch has no rows; give one or more")
    for batch in batches[:1]:  # else the error would be about the file
        first_output("calibration", session, source, batch)
    return batches


def _reader_of(batches: list[dict[str, Any]]) -> Any:
    """The batches as ONNX Runtime reads them."""
    base: Any = require("onnxruntime.quantization", purpose="quantisation").CalibrationDataReader

    class Reader(base):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    return Reader()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the advice to preprocess the file: the exporter has done that."""
    with SHARED_STATE:  # the level is the process's
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
