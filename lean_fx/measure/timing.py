"""Latency of ONNX files on ONNX Runtime's CPU, several models measured side by side."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from lean_fx.checks import check_int
from lean_fx.errors import ArgumentError, DataError, require
from lean_fx.onnx_files import weights_beside

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[np.generic]
    Inputs: TypeAlias = Mapping[str, Array] | tuple[Array, ...] | Array


@dataclass(frozen=True)
class Latency:
    """The time of one call of a model, measured in rounds.

    Args:
        samples_ms: one figure a round, at least two: the mean milliseconds of a call in it.
        batch: samples in a call.
        threads: threads of a call.

    Example:
        >>> latency = Latency((4.0, 1.0, 2.0, 3.0, 5.0), batch=16, threads=1)
        >>> latency.q1_ms, latency.median_ms, latency.q3_ms
        (2.0, 3.0, 4.0)
    """

    samples_ms: tuple[float, ...]
    batch: int
    threads: int

    def __post_init__(self) -> None:
        if len(self.samples_ms) < 2:
            raise ArgumentError(
                f"Latency: samples_ms has {len(self.samples_ms)} values and quartiles need 2 or "
                "more; measure more rounds"
            )

    @property
    def rounds(self) -> int:
        """The number of samples."""
        return len(self.samples_ms)

    @property
    def median_ms(self) -> float:
        """The median milliseconds of a call."""
        return statistics.median(self.samples_ms)

    @property
    def q1_ms(self) -> float:
        """The lower quartile of the milliseconds of a call."""
        return statistics.quantiles(self.samples_ms, method="inclusive")[0]

    @property
    def q3_ms(self) -> float:
        """The upper quartile of the milliseconds of a call."""
        return statistics.quantiles(self.samples_ms, method="inclusive")[2]


def time_onnx(
    files: Mapping[str, Path | str],
    inputs: Inputs,
    *,
    threads: int = 1,
    rounds: int = 30,
    min_round_ms: float = 5.0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Latency]:
    """Time ONNX files on ONNX Runtime's CPU.

    Every round times every model once, each round starting at another model, so that a change of
    the machine's speed meets all of them alike. Within a round a model is called as often as
    fills ``min_round_ms``; the sample is the mean of these calls. Idle threads of a session do not
    spin and denormal numbers are flushed to zero, so no model pays for another's threads or for
    the values its weights happen to take. Models are warmed up first, outside the timing.

    Args:
        files: the models ("arms") by name.
        inputs: the same for every model: arrays by input name; or by place, as a tuple, or a
            single array. The batch is the first axis of the first array.
        threads: threads of a session, 1 or more.
        rounds: samples of each model, 2 or more.
        min_round_ms: least milliseconds of a model's share of a round, above 0.
        progress: called after every round with the rounds done and the rounds in all.

    Returns:
        A :class:`Latency` for every name, in the order of ``files``.

    Raises:
        ArgumentError: an argument is out of range, or a model does not take these inputs.
        DataError: a file is missing or is not a model that ONNX Runtime can load.
        MissingDependencyError: onnxruntime is not installed.
    """
    if not files:
        raise ArgumentError("time_onnx: files is empty; give at least one name and file")
    threads = check_int("time_onnx: threads", threads, 1)
    rounds = check_int("time_onnx: rounds", rounds, 2)
    if not min_round_ms > 0:
        raise ArgumentError(f"time_onnx: min_round_ms={min_round_ms} is not above 0; use 5.0, say")
    names = list(files)
    with flushing_denormals():
        calls = {name: onnx_call(name, Path(files[name]), inputs, threads) for name in names}
        samples = time_in_turn(calls, rounds=rounds, min_round_ms=min_round_ms, progress=progress)
    arrays = tuple(inputs.values()) if isinstance(inputs, Mapping) else inputs
    first = arrays[0] if isinstance(arrays, tuple) else arrays
    batch = int(first.shape[0]) if first.ndim else 1
    return {name: Latency(samples[name], batch, threads) for name in names}


def time_in_turn(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    min_round_ms: float = 5.0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, tuple[float, ...]]:
    """Time calls in rounds, each round all of them, beginning at another one.

    Args:
        calls: by name; each is called some times beforehand.
        rounds: samples of each.
        min_round_ms: least milliseconds of a call's share of a round; it is repeated to fill it.
        progress: called after every round with the rounds done and the rounds in all.

    Returns:
        The mean milliseconds of a call, one figure a round, by name.
    """
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    repeats = {name: _repeats(call, min_round_ms) for name, call in calls.items()}
    for done in range(rounds):
        start = done % len(names)
        for name in names[start:] + names[:start]:
            samples[name].append(_mean_ms(calls[name], repeats[name]))
        if progress is not None:
            progress(done + 1, rounds)
    return {name: tuple(values) for name, values in samples.items()}


def machine() -> str:
    """Name the machine and the versions that a timing rests on, in one line.

    Example:
        >>> "onnxruntime" in machine()
        True
    """
    facts = _cpu_facts()
    model = facts.get("model name") or platform.processor() or platform.machine()
    flags = facts.get("flags", "").split()
    instructions = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else ""
    cores = os.cpu_count() or 1
    return ", ".join(
        part
        for part in (
            model,
            instructions,
            f"{cores} {'core' if cores == 1 else 'cores'}",
            f"torch {torch.__version__}",
            f"onnxruntime {require('onnxruntime', purpose='timing').__version__}",
        )
        if part
    )


@contextlib.contextmanager
def flushing_denormals() -> Iterator[None]:
    """Flush denormal numbers to zero on this thread, and put it back as it was.

    The session's own option reaches its pool of threads; the calling thread obeys only the first
    session of the process, whatever it asked for, and would keep the setting for good.
    """
    before = sys.float_info.min / 2 == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def onnx_call(name: str, file: Path, inputs: Inputs, threads: int) -> Callable[[], object]:
    """Load a model, warm it up, which checks its inputs, and return its call.

    The arguments and the errors are those of :func:`time_onnx`.
    """
    session = open_session(name, file, threads)
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
            f"{name}: ONNX Runtime rejects {given} ({_one_line(error)}); the model takes {expected}"
        ) from error
    return lambda: session.run(None, feeds)


def open_session(name: str, file: Path, threads: int, optimised: Path | None = None) -> Any:
    """Load a file into ONNX Runtime as it is timed: CPU, all optimisations, no spinning threads.

    Args:
        name: what an error calls it.
        file: the model.
        threads: of a call, 1 or more.
        optimised: where to write the graph as it is run, or None.

    Raises:
        DataError: the file is missing or is not a model that ONNX Runtime can load.
        MissingDependencyError: onnxruntime is not installed.
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
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    try:
        return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise DataError(
            f"{name}: ONNX Runtime cannot load {file} ({_one_line(error)}); export the model again"
        ) from error


def _repeats(call: Callable[[], object], min_round_ms: float) -> int:
    """Warm up, and find how many calls fill a round: double them until they do."""
    repeats = 1
    while _mean_ms(call, repeats) * repeats < min_round_ms:
        repeats *= 2
    return repeats


def _mean_ms(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) * 1e3 / repeats


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _cpu_facts() -> dict[str, str]:
    """Return the first processor's entries of /proc/cpuinfo; none where there is no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    first = text.split("\n\n")[0]
    return {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in first.splitlines())
    }
