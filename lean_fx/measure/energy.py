"""Measure the energy and CO2 of a stretch of code by CodeCarbon, without the network."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from types import TracebackType
from typing import Any

from lean_fx.checks import check_positive
from lean_fx.errors import LeanError
from lean_fx.measure.tracker import (
    ESTIMATES,
    JOULES_PER_KWH,
    Totals,
    check_country,
    joined,
    make_tracker,
    meter_of,
)


@dataclass(frozen=True)
class Energy:
    """What a stretch of code consumed.

    Args:
        energy_j: joules of processor, memory and, where there are any, GPUs.
        co2_g: grams of CO2 equivalent of these joules, by the country's mix of electricity.
        seconds: how long it took.
        meter: how processor and GPUs were read, parts joined by ``+``: ``"rapl"`` and ``"nvml"``
            are hardware counters; ``"cpu_load"`` and ``"constant"`` are estimates.

    Example:
        >>> first = Energy(energy_j=30.0, co2_g=0.5, seconds=1.0, meter="rapl")
        >>> (first + first).scaled(0.25)
        Energy(energy_j=15.0, co2_g=0.25, seconds=0.5, meter='rapl')
    """

    energy_j: float
    co2_g: float
    seconds: float
    meter: str

    def __add__(self, other: Energy) -> Energy:
        return Energy(
            self.energy_j + other.energy_j,
            self.co2_g + other.co2_g,
            self.seconds + other.seconds,
            joined([*self.meter.split("+"), *other.meter.split("+")]),
        )

    def scaled(self, factor: float) -> Energy:
        """Multiply everything by ``factor``, such as one over a number of epochs."""
        return Energy(
            self.energy_j * factor, self.co2_g * factor, self.seconds * factor, self.meter
        )

    @property
    def co2_g_per_kwh(self) -> float:
        """Grams of CO2 equivalent of a kilowatt-hour; NaN without a joule."""
        return self.co2_g / self.energy_j * JOULES_PER_KWH if self.energy_j else math.nan

    @property
    def is_estimate(self) -> bool:
        """True when any part was not read from a hardware counter but guessed by a model."""
        return not set(self.meter.split("+")).isdisjoint(ESTIMATES)

    @property
    def basis(self) -> str:
        """What the joules rest on, in words for a footnote."""
        if math.isnan(self.energy_j):
            return "not measured, at least not throughout"
        if self.is_estimate:
            return (
                "an estimate, which follows time: at equal load its ratios are the ratios of time"
            )
        return "read from a hardware counter"


class EnergyMeter:
    """Measure the energy of a block, and of laps within it, by CodeCarbon's offline tracker.

    How far to trust the joules depends on the machine; :attr:`Energy.meter` says how they were
    read. With RAPL (Linux on bare metal, readable by the user) and NVML they come from hardware
    counters. Without, as on nearly all virtual machines, the meter is ``cpu_load``: the processor's
    power is taken to be TDP x (0.1 + 0.9 load^3), with the load of the whole machine in ]0, 1] and
    the TDP looked up by the processor's name (a generic 85 W where unknown); ``constant`` is half
    the TDP. The power of the memory is a constant of the machine with every meter. So with an
    estimate the energy of two programs at equal load differs exactly as their times do: it is not
    evidence beyond the time. Where the TDP is known, set CODECARBON_FORCE_CPU_POWER (watts).

    It meters the machine, not the process: whatever else runs is counted too. CO2 is the energy
    times the country's average intensity, from the table that comes with CodeCarbon; nothing is
    looked up on the network.

    Entering the block detects the hardware, which takes a second or two the first time in a
    process and milliseconds afterwards; that time is outside the measured seconds.

    Args:
        country: three-letter ISO code in capitals of the country whose electricity is used.
        interval_s: seconds between two readings, above 0. The load is sampled every second.

    Raises:
        ArgumentError: CodeCarbon does not know the country, or interval_s is not above 0.
        MissingDependencyError: codecarbon is not installed.

    Example::

        with EnergyMeter("DEU") as meter:
            for epoch in range(50):
                train(epoch)
                print(meter.lap().energy_j)
        print(meter.energy)

    References:
        CodeCarbon 3, https://docs.codecarbon.io/latest/explanation/methodology
    """

    def __init__(self, country: str = "USA", interval_s: float = 1.0) -> None:
        check_positive("EnergyMeter: interval_s", interval_s, "use 1.0")
        check_country("EnergyMeter", country)
        self.country = country
        self.interval_s = interval_s
        self._tracker: Any = None
        self._totals: Totals | None = None
        self._start = self._lap_start = Energy(0.0, 0.0, 0.0, "")

    def __enter__(self) -> EnergyMeter:
        if self._tracker is not None:
            raise LeanError("EnergyMeter: is running already; make another one for an inner block")
        self._totals = Totals()
        self._tracker = make_tracker(self.country, self.interval_s, self._totals)
        self._tracker.start()
        try:
            # The first reading loads CodeCarbon's tables between its joules and its seconds; the
            # second takes both at the same moment.
            self._read()
            self._start = self._lap_start = self._read()
        except LeanError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        tracker, self._tracker = self._tracker, None
        tracker.stop()

    def lap(self) -> Energy:
        """Measure since the last lap, or since the block began.

        Laps add up to :attr:`energy`; after the block, a last lap is what was left over.

        Raises:
            LeanError: no block was entered yet, or CodeCarbon has failed.
        """
        now = self._read()
        lap, self._lap_start = _difference(now, self._lap_start), now
        return lap

    @property
    def energy(self) -> Energy:
        """What the block consumed: up to now inside it, and in all after it.

        Raises:
            LeanError: as in :meth:`lap`.
        """
        return _difference(self._read(), self._start)

    def _read(self) -> Energy:
        """Return the totals of the tracker, brought up to date while it runs."""
        if self._totals is None:
            raise LeanError("EnergyMeter: has not measured anything; use it in a with statement")
        if self._tracker is not None:
            self._totals.latest = None
            self._tracker.flush()
        if self._totals.latest is None:  # CodeCarbon logs its errors and goes on
            raise LeanError(
                "EnergyMeter: CodeCarbon gave no reading; set the level of its logger 'codecarbon' "
                "to DEBUG to see why"
            )
        if self._tracker is not None:
            self._totals.meter = meter_of(self._tracker._hardware)
        return Energy(*self._totals.latest, self._totals.meter)


def energy_in_turn(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    country: str = "USA",
    rounds: int = 5,
) -> dict[str, Energy]:
    """Measure the mean energy of a call of each, all in turn, round by round.

    A machine that becomes slower or busier then affects all of them alike. The first call of each
    is a warm-up and is not metered.

    Args:
        calls: what to meter, by name.
        seconds: for each in all, 0 or more; an estimate needs 30 or more. Every round has at
            least one call of each.
        country: as in :class:`EnergyMeter`.
        rounds: 1 or more.

    Raises:
        ArgumentError, LeanError, MissingDependencyError: those of :class:`EnergyMeter`.
    """
    for call in calls.values():
        call()
    counts = dict.fromkeys(calls, 0)
    laps: dict[str, list[Energy]] = {name: [] for name in calls}
    with EnergyMeter(country) as meter:
        for _ in range(rounds):
            for name, call in calls.items():
                counts[name] += call_for(call, seconds / rounds)
                laps[name].append(meter.lap())
    return {name: reduce(add, laps[name]).scaled(1 / counts[name]) for name in calls}


def call_for(call: Callable[[], object], seconds: float) -> int:
    """Call a function until the seconds are over, at least once; return how often.

    Example:
        >>> call_for(lambda: None, 0)
        1
    """
    calls, end = 0, time.perf_counter() + seconds
    while not calls or time.perf_counter() < end:
        call()
        calls += 1
    return calls


def _difference(later: Energy, earlier: Energy) -> Energy:
    return Energy(
        later.energy_j - earlier.energy_j,
        later.co2_g - earlier.co2_g,
        later.seconds - earlier.seconds,
        later.meter,
    )
