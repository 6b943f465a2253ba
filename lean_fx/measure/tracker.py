"""CodeCarbon's offline tracker, read lap by lap, and the names of what it reads."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Any

from lean_fx.errors import ArgumentError, require

JOULES_PER_KWH = 3.6e6
ESTIMATES = frozenset({"cpu_load", "constant"})
# CodeCarbon's names of how a piece of hardware is read, in a reader's words.
_METERS = {"intel_rapl": "rapl", "intel_power_gadget": "power_gadget"}


class Totals:
    """An output of CodeCarbon, called at every flush and at the stop, that keeps the totals."""

    def __init__(self) -> None:
        self.latest: tuple[float, float, float] | None = None
        self.meter = ""

    def out(self, total: Any, delta: Any) -> None:
        """Keep joules, grams of CO2 and seconds."""
        self.latest = (
            total.energy_consumed * JOULES_PER_KWH,
            total.emissions * 1e3,
            total.duration,
        )

    def exit(self) -> None:
        """Do nothing: there is nothing to close."""


def make_tracker(country: str, interval_s: float, totals: Totals) -> Any:
    """A tracker of the whole machine that tells its readings only to ``totals``."""
    base: Any = require("codecarbon", purpose="measuring energy").OfflineEmissionsTracker

    class Tracker(base):  # type: ignore[misc]
        """One reading at a time, and one at each flush, however short the lap.

        The tracker's own thread and a flush could otherwise both count the same interval, and a
        flush within 50 ms of a reading would leave the energy since to the next lap.
        """

        def __init__(self, *args: Any, **options: Any) -> None:
            self._reading = threading.Lock()
            super().__init__(*args, **options)

        def _measure_power_and_energy(self) -> None:
            with self._reading:
                super()._measure_power_and_energy()

        def _measure_power_and_energy_if_stale(self, min_interval_s: float = 0.0) -> None:
            self._measure_power_and_energy()

    # Its constructor logs two lines before it reads log_level.
    logging.getLogger("codecarbon").setLevel(logging.ERROR)
    return Tracker(
        country_iso_code=country,
        measure_power_secs=interval_s,
        log_level="error",
        tracking_mode="machine",
        allow_multiple_runs=True,
        output_methods=[],
        output_handlers=[totals],
        api_call_interval=-1,
        # A user's configuration file must not bring the network in.
        emissions_endpoint=False,
        electricitymaps_api_token="",
    )


def check_country(owner: str, country: str) -> None:
    """Check that CodeCarbon knows the electricity of a country.

    Raises:
        ArgumentError: it does not.
        MissingDependencyError: codecarbon is not installed.
    """
    known = require("codecarbon.input", purpose="measuring energy").DataSource()
    if country not in known.get_global_energy_mix_data():
        raise ArgumentError(
            f"{owner}: country={country!r} is not known to CodeCarbon; use a three-letter ISO "
            "code in capitals, such as USA or DEU"
        )


def meter_of(hardware: Iterable[Any]) -> str:
    """Name how CodeCarbon reads processor and GPUs, from the objects it reads them with."""
    return joined(sorted(filter(None, map(_meter_of_one, hardware)), key=ESTIMATES.__contains__))


def _meter_of_one(part: Any) -> str:
    kind = type(part).__name__
    if kind == "CPU":
        return _METERS.get(part._mode, str(part._mode))
    if kind == "GPU":
        kinds = sorted({type(device).__name__ for device in part.devices.devices})
        return joined("amdsmi" if each.startswith("AMD") else "nvml" for each in kinds)
    if kind == "RAM":  # a constant of the machine beside every meter
        return ""
    return {"AppleSiliconChip": "powermetrics", "Raspberry": "pmic"}.get(kind, kind.lower())


def joined(meters: Iterable[str]) -> str:
    """Names of meters as one, each once.

    Example:
        >>> joined(["rapl", "nvml", "rapl"])
        'rapl+nvml'
    """
    return "+".join(dict.fromkeys(meters))
