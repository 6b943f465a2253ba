import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lean_fx.errors import ArgumentError, DataError, LeanError, WriteError
from lean_fx.measure.energy import Energy
from lean_fx.measure.pictures import short
from lean_fx.measure.report import Arm, Epoch, Report
from lean_fx.measure.timing import Latency


def make_arm(name: str = "baseline", factor: float = 1.0, meter: str = "cpu_load") -> Arm:
    epochs = tuple(
        Epoch(
            train_loss=2 / i,
            train_accuracy=1 - 0.6 / i,
            test_loss=2.2 / i,
            test_accuracy=(0.7 - 0.4 / i) * factor**0.1,
            train=Energy(820.0 * factor + i, 0.084 * factor, 41.0 * factor, meter),
        )
        for i in range(1, 9)
    )
    return Arm(
        name=name,
        parameters=int(397_660 * factor),
        macs=int(194_097_600 * factor),
        onnx_bytes=int(1_593_210 * factor),
        runs=(epochs,),
        latency=Latency(tuple(factor * ms for ms in (6.1, 6.3, 6.2, 6.9)), batch=1, threads=1),
        test_energy=Energy(90.0 * factor, 0.009 * factor, 4.5 * factor, meter),
    )


def make_report(arms: tuple[Arm, ...] | None = None, **changes: object) -> Report:
    arms = arms or (make_arm(), make_arm("LEAN [10]", 0.25))
    given = {
        "title": "The paper's net [STL-10]",
        "command": "python run.py --epochs 8",
        "arms": arms,
        "machine": "Chip 9, AVX2, 2 cores",
        "seeds": (3,),
        "notes": ("A note.",),
    }
    return Report(**given | changes)


def shown(report: Report, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(report.table())
    return console.file.getvalue()  # type: ignore[attr-defined]


@given(st.floats(1e-9, 1e9), st.sampled_from([1, -1]))
def test_a_short_number_keeps_three_digits(size: float, sign: int) -> None:
    text = short(sign * size)
    digits = text.replace(",", "").replace(".", "").lstrip("-0")
    assert len(digits) >= 3
    assert "e" not in text
    assert float(text.replace(",", "")) == pytest.approx(sign * size, rel=0.005)


def test_short_numbers() -> None:
    values = (0.1234, 1e-5, 0.0, -0.05, 99.99, float("inf"), float("nan"))
    wanted = ["0.123", "0.0000100", "0.00", "-0.0500", "100.0", "inf", "n/a"]
    assert [short(value) for value in values] == wanted


def test_properties_of_an_arm() -> None:
    arm = make_arm()
    assert arm.accuracy == arm.runs[0][-1].test_accuracy
    assert arm.train_energy.energy_j == sum(820.0 + i for i in range(1, 9))
    assert arm.train_energy_per_epoch.seconds == pytest.approx(41.0)
    assert arm.train_energy.meter == "cpu_load"


def test_table_shows_every_figure_in_80_columns() -> None:
    names = ("baseline", "LEAN [10] in front of three layers, row mode, homogeneous")
    heavy = dataclasses.replace(
        make_arm(names[0]), parameters=138_357_544, onnx_bytes=553_438_000, macs=15_470_264_320
    )
    text = shown(make_report((heavy, make_arm(names[1], 0.25))))
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    for cell in (
        "138,357,544",
        "15,470",
        "553,438",
        "LEAN [10] in",
        "6.25",
        "6.18-6.45",
        "0.25",
    ):
        assert cell in text
    for footnote in make_report().footnotes():
        assert footnote.split(":")[0] in text


def test_ratio_is_to_the_first_arm() -> None:
    first, second = make_arm("slow", 1.0), make_arm("fast", 0.25)
    for arms, ratios in (((first, second), ("1.00", "0.25")), ((second, first), ("1.00", "4.00"))):
        rows = {row[0].strip(): row[1:] for row in make_report(arms)._rows()}
        assert rows["ratio"] == ratios


def test_an_estimate_is_called_one_and_a_counter_is_not() -> None:
    estimated = "\n".join(make_report().footnotes())
    assert "meter cpu_load): an estimate" in estimated
    assert "follows time" in estimated
    counted = "\n".join(make_report((make_arm(meter="rapl"),)).footnotes())
    assert "meter rapl): read from a hardware counter" in counted
    assert "estimate" not in counted


def test_two_meters_are_both_named() -> None:
    notes = "\n".join(make_report((make_arm(), make_arm("b", meter="rapl"))).footnotes())
    assert "meter cpu_load" in notes
    assert "meter rapl" in notes


def test_the_seed_is_named_as_the_only_one() -> None:
    assert any("one seed (3)" in note for note in make_report().footnotes())


def test_several_seeds_are_told_by_mean_and_range(tmp_path: Path) -> None:
    low, high = (
        make_arm().runs[0],
        tuple(
            dataclasses.replace(e, test_accuracy=0.9, train_accuracy=1.0, train=e.train.scaled(3))
            for e in make_arm().runs[0]
        ),
    )
    arms = tuple(dataclasses.replace(make_arm(name), runs=(low, high)) for name in "ab")
    report = make_report(arms, seeds=(3, 5))
    assert arms[0].accuracies == pytest.approx((0.65, 0.9))
    assert arms[0].accuracy == pytest.approx(0.775)
    assert arms[0].train_accuracy == pytest.approx((0.925 + 1) / 2)
    assert arms[0].train_energy_per_epoch.seconds == pytest.approx(41.0 * 2)
    rows = {row[0].strip(): row[1:] for row in report._rows()}
    assert rows["test accuracy, %"] == ("77.5", "77.5")
    assert rows["range"] == ("65.0-90.0", "65.0-90.0")
    notes = report.footnotes()
    assert (
        "Accuracy: mean and range over 2 seeds (3, 5); latency and testing: of the nets of seed 3."
    ) in notes
    assert "mean of 8 epochs" in "\n".join(notes)
    assert len(report.draw(tmp_path)) == 2
    assert "range" not in shown(make_report())


def test_markdown_has_the_tables_rows() -> None:
    planned = dataclasses.replace(make_arm("a|b", 0.5), plan="conv2: 50 -> 10")
    lines = make_report((make_arm(), planned)).to_markdown(["curves.png"]).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len({row.replace("\\|", "").count("|") for row in rows}) == 1
    assert rows[0] == "|  | baseline | a\\|b |"
    assert rows[2].endswith("| 198,830 |")
    assert rows[3].endswith("| 97.0 |")
    for line in ("python run.py --epochs 8", "![curves](curves.png)", "conv2: 50 -> 10"):
        assert line in lines


finite = st.floats(allow_nan=False)
energies = st.builds(Energy, finite, finite, finite, st.text())
epochs = st.builds(Epoch, finite, finite, finite, finite, energies)
latencies = st.builds(
    Latency,
    st.lists(finite, min_size=2, max_size=4).map(tuple),
    batch=st.integers(),
    threads=st.integers(),
)


@given(st.lists(epochs, min_size=1, max_size=3), latencies, energies, st.text(), st.integers())
def test_json_round_trip_is_exact(
    epochs: list[Epoch], latency: Latency, test: Energy, text: str, number: int
) -> None:
    arm = Arm(text, number, number, number, (tuple(epochs),) * 2, latency, test, text)
    report = make_report((arm,), title=text, seeds=(number, 0))
    assert Report.from_json(report.to_json()) == report


def broken(change: object) -> str:
    data = json.loads(make_report().to_json())
    change(data)  # type: ignore[operator]
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "report: is not JSON"),
        ("[]", "report: has no format 'lean_fx.report'"),
        (broken(lambda d: d.pop("format")), "report: has no format 'lean_fx.report'"),
        (broken(lambda d: d.update(version=1)), "report: version 1 is not 2"),
        (broken(lambda d: d.pop("seeds")), "report: does not have exactly the keys title, command"),
        (broken(lambda d: d.update(more=1)), "report: does not have exactly the keys title"),
        (broken(lambda d: d.update(seeds=["3"])), "report.seeds[0]: '3' is not int"),
        (broken(lambda d: d.update(seeds=3)), "report.seeds: 3 is not tuple"),
        (broken(lambda d: d.update(arms=3)), "report.arms: 3 is not tuple"),
        (broken(lambda d: d.update(arms=[])), "Report: arms is empty"),
        (
            broken(lambda d: d["arms"][1]["runs"][0][0].update(train_loss=None)),
            "report.arms[1].runs[0][0].train_loss: None is not float",
        ),
        (broken(lambda d: d["arms"][0].update(runs=[])), "Arm: 'baseline' has no epochs"),
        (broken(lambda d: d["arms"][0].update(runs=[[]])), "Arm: 'baseline' has no epochs"),
        (
            broken(lambda d: d["arms"][0]["runs"].append(d["arms"][0]["runs"][0][:2])),
            "Arm: 'baseline' has runs of 8, 2 epochs; give equally long ones",
        ),
        (
            broken(lambda d: d.update(seeds=[3, 4])),
            "Report: 'baseline' has 1 runs for 2 seeds; give one each",
        ),
    ],
)
def test_bad_json_is_told_in_one_line(text: str, message: str) -> None:
    with pytest.raises(LeanError) as caught:
        Report.from_json(text)
    assert isinstance(caught.value, (DataError, ArgumentError))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_importing_the_measures_brings_no_optional_package() -> None:
    code = (
        "import sys; from lean_fx.measure import costs, energy, report, timing; "
        "print({'codecarbon', 'onnxruntime', 'matplotlib', 'rich', 'onnx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_names_must_differ() -> None:
    with pytest.raises(ArgumentError, match="names a, a are not all different"):
        make_report((make_arm("a"), make_arm("a")))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_save_writes_every_file_whole(tmp_path: Path, count: int) -> None:
    arms = tuple(make_arm(f"arm {i} $x_ <b>", 1 / (i + 1)) for i in range(count))
    report = make_report(arms)
    paths = report.save(tmp_path / "new" / "folder")
    names = ["report.json", "report.md", "curves.png", "figure3.png"]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(names)
    assert Report.from_json(paths[0].read_text()) == report
    assert "](figure3.png)" in paths[1].read_text()
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[2:])


def test_drawing_one_epoch_and_leaving_pyplot_alone(tmp_path: Path) -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    arm = dataclasses.replace(make_arm(), runs=(make_arm().runs[0][:1],))
    make_report((arm,)).draw(tmp_path)
    assert pyplot.get_fignums() == before


def test_a_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(WriteError, match="taken: cannot be made"):
        make_report().save(tmp_path / "taken")


def test_a_failed_drawing_leaves_the_old_picture(tmp_path: Path, monkeypatch) -> None:
    from matplotlib.figure import Figure

    old = make_report().draw(tmp_path)[0].read_bytes()

    def fail(self: Figure, part: Path, **_: object) -> None:
        part.write_bytes(b"half")
        raise RuntimeError

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(RuntimeError):
        make_report().draw(tmp_path)
    assert (tmp_path / "curves.png").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "figure3.png"]
