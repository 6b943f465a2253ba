"""Latency of ONNX files on ONNX Runtime's CPU, several models measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lean_fx.checks import check_int, check_positive, check_threads
from lean_fx.errors import ArgumentError
from lean_fx.export.sessions import flushing_denormals, onnx_call
from lean_fx.kernel import uses_kernel, what_computes

if TYPE_CHECKING:
    from lean_fx.export.sessions import Inputs


@dataclass(frozen=True)
class Latency:
    """The time of one call of a model, measured in rounds.

    Args:
        samples_ms: one figure a round, at least two: the mean milliseconds of a call in it.
        batch: samples in a call.
        threads: threads of a call.
        kernel: whether LEAN nodes ran by :func:`~lean_fx.onnx_kernel`.

    Example:
        >>> latency = Latency((4.0, 1.0, 2.0, 3.0, 5.0), batch=16, threads=1)
        >>> latency.q1_ms, latency.median_ms, latency.q3_ms
        (2.0, 3.0, 4.0)
    """

    samples_ms: tuple[float, ...]
    batch: int
    threads: int
    kernel: bool = False

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
    def lean_nodes(self) -> str:
        """How LEAN nodes ran, in words."""
        return f"by {what_computes(self.kernel)}"

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
    kernel: bool | None = None,
) -> dict[str, Latency]:
    """Time ONNX files on ONNX Runtime's CPU.

    Every round times every model once, each round starting at another model, so that a change of
    the machine's speed affects all of them alike. Within a round a model is called as often as
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
        kernel: whether LEAN nodes run by :func:`~lean_fx.onnx_kernel`, or by the function in the
            file. None: by the kernel where it is built. Each Latency says which.

    Returns:
        A :class:`Latency` for every name, in the order of ``files``.

    Raises:
        ArgumentError: an argument is out of range, or a model does not take these inputs.
        DataError: a file is missing or is not a model that ONNX Runtime can load.
        MissingDependencyError: onnxruntime is not installed, or the kernel is asked for and is not
            built.
    """
    if not files:
        raise ArgumentError("time_onnx: files is empty; give at least one name and file")
    threads = check_threads("time_onnx", threads)
    rounds = check_int("time_onnx: rounds", rounds, 2)
    check_positive("time_onnx: min_round_ms", min_round_ms, "use 5.0, say")
    names, by_kernel = list(files), uses_kernel(kernel)
    with flushing_denormals():
        calls = {
            name: onnx_call(name, Path(files[name]), inputs, threads, kernel=by_kernel)
            for name in names
        }
        samples = time_in_turn(calls, rounds=rounds, min_round_ms=min_round_ms, progress=progress)
    arrays = tuple(inputs.values()) if isinstance(inputs, Mapping) else inputs
    each_input = arrays if isinstance(arrays, tuple) else (arrays,)
    batch = next((int(value.shape[0]) for value in each_input if value.ndim), 1)
    return {name: Latency(samples[name], batch, threads, by_kernel) for name in names}


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
