"""ONNX Runtime sessions on the CPU, with the options for timing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from lean_fx.errors import ArgumentError, DataError, one_line, require
from lean_fx.kernel import onnx_kernel
from lean_fx.onnx_files import weights_beside

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[np.generic]
    Inputs: TypeAlias = Mapping[str, Array] | tuple[Array, ...] | Array


@contextlib.contextmanager
def flushing_denormals() -> Iterator[None]:
    """Flush denormal numbers to zero on this thread.

    A session's own option is for its pool of threads. For the calling thread, ONNX Runtime applies
    the option of the first session of the process, and never changes it again.
    """
    before = sys.float_info.min / 2 == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def onnx_call(
    name: str, file: Path, inputs: Inputs, threads: int, *, kernel: bool = False
) -> Callable[[], object]:
    """Load a model and return its call. Warm-up calls check the inputs.

    The arguments and the errors are those of :func:`~lean_fx.measure.timing.time_onnx`; of
    ``kernel`` those of :func:`open_session`.
    """
    session = open_session(name, file, threads, kernel=kernel)
    wanted = [value.name for value in session.get_inputs()]
    if isinstance(inputs, Mapping):
        feeds = dict(inputs)
    else:
        arrays = inputs if isinstance(inputs, tuple) else (inputs,)
        if len(arrays) != len(wanted):
            raise ArgumentError(
                f"{name}: arrays given: {len(arrays)}; the model has the inputs "
                f"{', '.join(wanted)}; give an array for each"
            )
        feeds = dict(zip(wanted, arrays, strict=True))
    if set(feeds) != set(wanted):
        raise ArgumentError(
            f"{name}: the inputs given are {', '.join(feeds)} and the model's are "
            f"{', '.join(wanted)}; give these"
        )
    try:
        for _ in range(3):  # the first calls plan and allocate memory
            session.run(None, feeds)
    except Exception as error:
        given = ", ".join(f"{key} {value.dtype}{list(value.shape)}" for key, value in feeds.items())
        expected = ", ".join(f"{v.name} {v.type}{v.shape}" for v in session.get_inputs())
        raise ArgumentError(
            f"{name}: ONNX Runtime rejects {given} ({one_line(error)}); the model takes {expected}"
        ) from error
    return lambda: session.run(None, feeds)


def open_session(
    name: str, file: Path, threads: int, optimised: Path | None = None, *, kernel: bool = False
) -> Any:
    """Load a file into ONNX Runtime as it is timed: CPU, all optimisations, no spinning threads.

    Args:
        name: the name of the file in errors.
        file: the model.
        threads: of a call, 1 or more.
        optimised: where to write the graph as it is run, or None.
        kernel: whether LEAN nodes run by :func:`~lean_fx.onnx_kernel`.

    Raises:
        DataError: the file is missing or is not a model that ONNX Runtime can load, or it cannot
            load the kernel.
        MissingDependencyError: onnxruntime is not installed, or the kernel is not built.
    """
    ort = require("onnxruntime", purpose="timing")
    if not file.is_file():
        raise DataError(f"{name}: {file} is not a file; export the model there first")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
        options.add_session_config_entry(  # a file cannot hold 2 GB
            "session.optimized_model_external_initializers_file_name",
            weights_beside(optimised).name,
        )
    if kernel:
        _register_kernel(name, options)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    try:
        return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise DataError(
            f"{name}: ONNX Runtime cannot load {file} ({one_line(error)}); export the model again"
        ) from error


def _register_kernel(name: str, options: Any) -> None:
    library = onnx_kernel()
    try:
        options.register_custom_ops_library(library)
    except Exception as error:
        raise DataError(
            f"{name}: ONNX Runtime cannot load {library} ({one_line(error)}); install lean_fx "
            "again, or give kernel=False"
        ) from error
