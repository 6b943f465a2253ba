import dataclasses
import itertools
import math
import socket
import time
from types import SimpleNamespace

import pytest
from codecarbon import OfflineEmissionsTracker
from codecarbon.core import hardware_cache
from codecarbon.core.resource_tracker import ResourceTracker
from codecarbon.external.hardware import CPU
from codecarbon.external.ram import RAM

from lean_fx.errors import ArgumentError, LeanError
from lean_fx.measure import energy
from lean_fx.measure.energy import Energy, EnergyMeter
from lean_fx.measure.tracker import meter_of


def busy(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_energy_and_co2_of_a_busy_loop() -> None:
    with EnergyMeter("DEU", interval_s=0.2) as meter:
        busy(1.0)
        hardware = meter._tracker._hardware
    found = meter.energy
    assert found.seconds >= 1.0
    assert found.co2_g > 0
    assert found.meter
    if found.meter == "cpu_load":  # then the model bounds the power
        memory = next(part for part in hardware if isinstance(part, RAM)).total_power().W
        processor = next(part for part in hardware if isinstance(part, CPU))._tdp
        watts = found.energy_j / found.seconds
        assert 0.9 * memory < watts < 1.1 * (memory + processor)
        assert found.is_estimate


def test_laps_add_up_to_the_whole() -> None:
    laps = []
    with EnergyMeter(interval_s=0.1) as meter:
        for seconds in (0.25, 0.01, 0.15):  # the second is shorter than any interval
            busy(seconds)
            laps.append(meter.lap())
            assert laps[-1].seconds >= seconds
            assert laps[-1].energy_j > 0
    laps.append(meter.lap())
    total = laps[0] + laps[1] + laps[2] + laps[3]
    assert total.energy_j == pytest.approx(meter.energy.energy_j, rel=1e-9)
    assert total.co2_g == pytest.approx(meter.energy.co2_g, rel=1e-9)
    assert total.seconds == pytest.approx(meter.energy.seconds, rel=1e-9)
    assert total.meter == meter.energy.meter


def test_the_trackers_thread_and_a_lap_do_not_read_at_once(monkeypatch) -> None:
    read = OfflineEmissionsTracker._do_measurements
    reading: list[int] = []
    together: list[int] = []

    def slow(self: OfflineEmissionsTracker) -> None:
        reading.append(1)
        together.append(len(reading))
        time.sleep(0.02)
        read(self)
        reading.pop()

    monkeypatch.setattr(OfflineEmissionsTracker, "_do_measurements", slow)
    with EnergyMeter(interval_s=0.01) as meter:
        for _ in range(5):
            meter.lap()
    assert len(together) > 6  # the thread has read as well
    assert max(together) == 1


def test_co2_follows_the_country() -> None:
    intensity = {}
    for country in ("USA", "FRA"):  # mostly fossil, mostly nuclear
        with EnergyMeter(country) as meter:
            busy(0.06)
        intensity[country] = meter.energy.co2_g / meter.energy.energy_j
    assert intensity["FRA"] < intensity["USA"]


def test_a_meter_can_be_used_again() -> None:
    meter = EnergyMeter()
    with meter:
        busy(0.2)
    first = meter.energy
    with meter:
        pass
    assert meter.energy.energy_j < first.energy_j
    assert meter.energy.seconds < first.seconds


def test_the_detection_of_hardware_is_not_measured(monkeypatch) -> None:
    detect = ResourceTracker.set_CPU_GPU_ram_tracking

    def slow(self: ResourceTracker) -> None:
        time.sleep(0.4)
        detect(self)

    monkeypatch.setattr(ResourceTracker, "set_CPU_GPU_ram_tracking", slow)
    hardware_cache.clear_cache()
    start = time.perf_counter()
    with EnergyMeter() as meter:
        inside = time.perf_counter()
    assert inside - start >= 0.4
    assert meter.energy.seconds < 0.4


def test_the_first_block_starts_its_joules_and_seconds_together(monkeypatch) -> None:
    prepare = OfflineEmissionsTracker._ensure_emissions_engine

    def slow(self: OfflineEmissionsTracker) -> None:
        if self._emissions is None:
            time.sleep(0.4)
        prepare(self)

    monkeypatch.setattr(OfflineEmissionsTracker, "_ensure_emissions_engine", slow)
    with EnergyMeter() as meter:
        watts = []
        for _ in range(2):
            busy(0.1)
            lap = meter.lap()
            watts.append(lap.energy_j / lap.seconds)
    # Joules of the 0.4 s before the block would make five times the power.
    assert watts[0] < 2.5 * watts[1]


def test_the_energy_of_a_call_is_the_mean_of_those_that_fill_the_seconds(monkeypatch) -> None:
    taken: list[tuple[str, float]] = []

    class Meter:
        """A call of a costs 7 J, one of b 9 J."""

        def __init__(self, country: str) -> None:
            assert country == "FRA"

        def __enter__(self) -> "Meter":
            self.before = len(taken)
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def lap(self) -> Energy:
            within, self.before = taken[self.before :], len(taken)
            joules = sum({"a": 7.0, "b": 9.0}[name] for name, _ in within)
            return Energy(joules, 3.0 * len(within), sum(time for _, time in within), "rapl")

    def call(name: str) -> None:
        start = time.perf_counter()
        busy(0.01)
        taken.append((name, time.perf_counter() - start))

    monkeypatch.setattr(energy, "EnergyMeter", Meter)
    calls = {"a": lambda: call("a"), "b": lambda: call("b")}
    found = energy.energy_in_turn(calls, seconds=0.1, country="FRA", rounds=2)
    assert [found[name].energy_j for name in "ab"] == pytest.approx([7.0, 9.0])
    assert [found[name].co2_g for name in "ab"] == pytest.approx([3.0, 3.0])
    metered = taken[2:]  # the first of each warms up
    for name in "ab":
        times = [each for called, each in metered if called == name]
        assert found[name].seconds == pytest.approx(sum(times) / len(times))
        assert sum(times) > 0.9 * 0.1
    turns = [name for name, _ in itertools.groupby(metered, lambda each: each[0])]
    assert turns == ["a", "b", "a", "b"]

    taken.clear()
    energy.energy_in_turn(calls, seconds=0.0, country="FRA", rounds=3)
    assert [name for name, _ in taken] == ["a", "b"] * 4


def test_no_network_and_no_output(monkeypatch, capfd, tmp_path) -> None:
    tried: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: tried.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: tried.append(address))
    monkeypatch.setenv("CODECARBON_EMISSIONS_ENDPOINT", "http://localhost:9/")
    monkeypatch.setenv("CODECARBON_ELECTRICITYMAPS_API_TOKEN", "token")
    monkeypatch.setenv("CODECARBON_SAVE_TO_FILE", "true")
    monkeypatch.chdir(tmp_path)
    with EnergyMeter("DEU") as meter:
        meter.lap()
    assert meter.energy.co2_g > 0
    assert tried == []
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_an_error_in_the_block_still_leaves_what_was_measured() -> None:
    meter = EnergyMeter()

    def fail() -> None:
        with meter:
            busy(0.06)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert meter.energy.energy_j > 0


@pytest.mark.parametrize("country", ["usa", "XXX", ""])
def test_an_unknown_country_is_told(country: str) -> None:
    with pytest.raises(ArgumentError, match=f"country='{country}' is not known to CodeCarbon"):
        EnergyMeter(country)


def test_an_interval_out_of_range_is_told() -> None:
    with pytest.raises(ArgumentError, match=r"interval_s=0 is not a finite number above 0"):
        EnergyMeter(interval_s=0)


def test_reading_before_measuring_is_told() -> None:
    with pytest.raises(LeanError, match="has not measured anything; use it in a with statement"):
        EnergyMeter().lap()


def test_entering_twice_is_told() -> None:
    with EnergyMeter() as meter, pytest.raises(LeanError, match="is running already"):
        meter.__enter__()


def test_a_failure_inside_codecarbon_is_told(monkeypatch) -> None:
    def fail(self: ResourceTracker) -> None:
        raise RuntimeError

    monkeypatch.setattr(ResourceTracker, "set_CPU_GPU_ram_tracking", fail)
    meter = EnergyMeter()
    with pytest.raises(LeanError, match="CodeCarbon gave no reading"):
        meter.__enter__()
    monkeypatch.undo()
    with meter:
        busy(0.06)
    assert meter.energy.energy_j > 0


def gpu(*vendors: str) -> object:
    devices = [type(vendor, (), {})() for vendor in vendors]
    return type("GPU", (), {"devices": SimpleNamespace(devices=devices)})()


def cpu(mode: str) -> CPU:
    part = CPU.__new__(CPU)
    part._mode = mode
    return part


@pytest.mark.parametrize(
    ("hardware", "meter", "estimate"),
    [
        ([RAM(), cpu("cpu_load")], "cpu_load", True),
        ([cpu("constant")], "constant", True),
        ([cpu("intel_rapl")], "rapl", False),
        ([cpu("cpu_load"), gpu("NvidiaGPUDevice", "NvidiaGPUDevice")], "nvml+cpu_load", True),
        ([cpu("intel_rapl"), gpu("AMDGPUDevice")], "rapl+amdsmi", False),
    ],
)
def test_the_meter_is_named_by_the_hardware(hardware: list, meter: str, estimate: bool) -> None:
    assert meter_of(hardware) == meter
    assert Energy(1.0, 1.0, 1.0, meter).is_estimate is estimate


def test_adding_joins_meters_and_scaling_keeps_them() -> None:
    total = Energy(1.0, 2.0, 3.0, "cpu_load") + Energy(10.0, 20.0, 30.0, "rapl+cpu_load")
    assert total == Energy(11.0, 22.0, 33.0, "cpu_load+rapl")
    assert total.scaled(2.0) == Energy(22.0, 44.0, 66.0, "cpu_load+rapl")


def test_what_joules_rest_on_is_said():
    measured = Energy(1.0, 0.1, 1.0, "rapl")
    assert measured.basis == "read from a hardware counter"
    assert dataclasses.replace(measured, meter="cpu_load").basis.startswith("an estimate")
    unknown = dataclasses.replace(measured, energy_j=math.nan)
    assert unknown.basis == "not measured, at least not throughout"
