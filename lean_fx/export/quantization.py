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

import torch

from lean_fx.capture.example_inputs import as_inputs
from lean_fx.errors import ArgumentError, DataError, ExportError, one_line, require, warn
from lean_fx.export.lean_function import INLINED
from lean_fx.export.sessions import open_session
from lean_fx.files import replacing
from lean_fx.locks import SHARED_STATE
from lean_fx.onnx_files import places_of_weights

Quantize = Literal["dynamic", "static"]
Int8Target = Literal["portable", "vnni"]

#: The key of a twin's metadata that says how it was made.
INT8 = "lean_fx.int8"
#: The greatest mean difference of a twin from its file, as a fraction of the mean magnitude of the
#: file's outputs, that brings no warning.
INT8_BOUND = 0.1


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
        calibration: for ``"static"``: batches of inputs, each a tensor or a tuple of them; what
            else a loader gives beside the inputs, such as labels, is for the caller to drop.
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
    session = open_session(source.name, source, threads=1)
    names = [value.name for value in session.get_inputs()]
    given = () if calibration is None else calibration
    batches = [_arrays("calibration", names, each) for each in given]
    if mode == "static" and not batches:
        raise ArgumentError("quantize='static' has no calibration data; give batches of inputs")
    if any(not array.size for batch in batches for array in batch.values()):
        raise ArgumentError("calibration: a batch has no rows; give one or more")
    for batch in batches[:1]:  # else the error would be about the file
        _run("calibration", session, source, batch)

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

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
                    Reader(),
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


def int8_difference(
    path: str | os.PathLike[str], twin: str | os.PathLike[str], batches: Iterable[Any]
) -> float:
    """How far a twin is from its file on this machine.

    Args:
        path: the file.
        twin: its INT8 twin.
        batches: one batch of inputs or more, each a tensor or a tuple of them.

    Returns:
        The mean difference of their floating-point outputs, as a fraction of the mean magnitude of
        the file's: the greatest of the outputs. 0 where there are none.

    Raises:
        ArgumentError: a batch does not fit the file.
    """
    sessions = [open_session(str(each), Path(each), threads=1) for each in (path, twin)]
    names = [value.name for value in sessions[0].get_inputs()]
    apart: dict[int, float] = {}
    size: dict[int, float] = {}
    for batch in batches:
        arrays = _arrays("calibration", names, batch)
        exact, rounded = (session.run(None, arrays) for session in sessions)
        pairs = (
            (torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(exact, rounded, strict=True)
        )
        for place, (ours, theirs) in enumerate(pairs):
            if ours.is_floating_point():
                apart[place] = apart.get(place, 0.0) + float((ours - theirs).abs().sum())
                size[place] = size.get(place, 0.0) + float(ours.abs().sum())
    return max((apart[place] / size[place] for place in apart if size[place]), default=0.0)


def check_int8(
    path: str | os.PathLike[str],
    twin: str | os.PathLike[str],
    batches: Iterable[Any],
    target: Int8Target,
) -> float:
    """Compare a twin with its file on this machine, and warn where it is too far off.

    Args:
        path: the file.
        twin: its INT8 twin.
        batches: inputs, as in :func:`int8_difference`.
        target: what the twin was made for.

    Returns:
        The difference.

    Warns:
        LeanWarning: it is above :data:`INT8_BOUND`.
    """
    apart = int8_difference(path, twin, batches)
    if not apart <= INT8_BOUND:
        remedy = (
            "this processor may saturate 8-bit weights: use int8_target='portable'"
            if target == "vnni"
            else "calibrate with more data, or use the float file"
        )
        warn(
            f"export_onnx: the INT8 twin differs from {Path(path).name} by {apart:.2g} of the mean "
            f"output on this machine, bound {INT8_BOUND:g}; {remedy}"
        )
    return apart


def accuracy_of(path: str | os.PathLike[str], evaluation: Iterable[Any]) -> float:
    """The part of samples whose greatest score is that of their label, in [0, 1].

    Args:
        path: an ONNX file whose first output are scores ``[N, classes]``.
        evaluation: batches ``(inputs, labels)``, such as a DataLoader gives; inputs a tensor or a
            tuple of them, labels whole numbers ``[N]``.

    Raises:
        DataError: there are no samples, or the file is not there.
        ArgumentError: a batch is not a pair of inputs and labels, or the file does not take its
            inputs, or there is no label for each row of scores.
    """
    session = open_session(str(path), Path(path), threads=max(1, torch.get_num_threads()))
    names = [value.name for value in session.get_inputs()]
    right = total = 0
    for batch in evaluation:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ArgumentError("evaluation: a batch is not a pair; give batches (inputs, labels)")
        scores = _run("evaluation", session, path, _arrays("evaluation", names, batch[0]))
        try:
            labels = torch.as_tensor(batch[1])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(
                f"evaluation: labels are no numbers ({one_line(error)}); give whole numbers [N]"
            ) from error
        if scores.dim() != 2 or labels.shape != scores.shape[:1]:
            raise ArgumentError(
                f"evaluation: scores {list(scores.shape)} and labels {list(labels.shape)} do not "
                "fit; give a model whose first output is [N, classes] and labels [N]"
            )
        right += int((scores.argmax(1) == labels).sum())
        total += len(labels)
    if not total:
        raise DataError("evaluation: has no samples; give one batch or more")
    return right / total


def _run(subject: str, session: Any, path: Any, arrays: dict[str, Any]) -> torch.Tensor:
    """The first output of a file.

    Raises:
        ArgumentError: it does not take the inputs.
    """
    try:
        return torch.as_tensor(session.run(None, arrays)[0])
    except Exception as error:
        shapes = ", ".join(f"{array.dtype} {list(array.shape)}" for array in arrays.values())
        raise ArgumentError(
            f"{subject}: {Path(path).name} cannot run on {shapes} ({one_line(error)}); give "
            "batches of its inputs"
        ) from error


def gives_batches(data: Any) -> bool:
    """Whether data can be iterated over, and are not one tensor, whose rows are not batches.

    Example:
        >>> gives_batches([torch.rand(2, 3)]), gives_batches(torch.rand(2, 3))
        (True, False)
    """
    try:
        iter(data)
    except TypeError:
        return False
    return not isinstance(data, torch.Tensor)


def _arrays(subject: str, names: list[str], inputs: Any) -> dict[str, Any]:
    if not isinstance(inputs, torch.Tensor | tuple | list):
        raise ArgumentError(
            f"{subject}: a batch is a {type(inputs).__name__} object; give tensors, or tuples of "
            "them"
        )
    tensors = as_inputs(inputs)
    if len(tensors) != len(names):
        raise ArgumentError(
            f"{subject}: a batch has {len(tensors)} inputs and the model takes {len(names)}; give "
            "batches of its inputs"
        )
    arrays = (torch.as_tensor(each).detach().cpu().numpy() for each in tensors)
    return dict(zip(names, arrays, strict=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the advice to preprocess off the terminal: the exporter has done it."""
    with SHARED_STATE:  # the level is the process's
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
