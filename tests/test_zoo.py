"""The zoo's own logic, on nets that take no time."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lean_fx
from lean_fx.errors import ArgumentError, DataError, MissingDependencyError
from support import zoo_rings, zoo_runs
from support.zoo_models import build, catalogue, choose, fitting_images
from support.zoo_rings import run_rings
from support.zoo_rows import RINGS, Ring, Row, read_row, write_row
from support.zoo_runs import is_finished, read_rows, row_file, run_zoo
from support.zoo_table import csv_text, report

ROOT = Path(__file__).parents[1]
SMALL, TO_TRAINS = "zoo_nets:small", RINGS[:5]


def ends(row):
    return {name: ring.status for name, ring in row.rings.items()}


def test_a_net_that_passes_every_ring():
    saved = []
    row = run_rings(SMALL, RINGS, lambda row: saved.append(ends(row)))
    assert {**ends(row), "quick": "ok", "faster": "ok"} == dict.fromkeys(RINGS, "ok")
    assert saved[0] == {"baseline": "running"}
    assert row.ended == "done"
    assert row.numbers["size"] == 64
    assert row.numbers["sizes"] == 2
    assert (row.numbers["conv_calls"], row.numbers["depthwise_calls"]) == (2, 1)
    assert (row.numbers["sites"], row.numbers["sites_reduced"]) == (2, 2)
    assert row.numbers["macs_lean"] < row.numbers["macs"]
    assert row.reasons == {}


def test_what_is_not_reduced_has_its_reason():
    row = run_rings("zoo_nets:OneSize", TO_TRAINS, lambda row: None)
    assert ends(row) == dict.fromkeys(TO_TRAINS, "ok")
    assert row.numbers["size"] == 96
    assert row.numbers["sizes"] == 1
    assert (row.numbers["sites"], row.numbers["sites_reduced"]) == (2, 1)
    assert row.reasons == {"the weight is computed from it in forward, which no layer would do": 1}


def test_a_net_that_cannot_be_captured_is_leanified_layer_by_layer():
    row = run_rings("zoo_nets:Branching", RINGS, lambda row: None)
    skipped = dict.fromkeys(("quick", "exported", "faster"), "skip")
    assert ends(row) == dict.fromkeys(RINGS, "ok") | {"captured": "fail"} | skipped
    assert row.rings["captured"].reason.startswith("Branching: torch.fx cannot trace its forward")
    assert (row.numbers["sites"], row.numbers["sites_reduced"]) == (2, 2)
    assert row.reasons == {}


def test_a_name_that_is_none_fails_in_the_first_ring():
    row = run_rings("resnet18", TO_TRAINS, lambda row: None)
    assert row.rings["baseline"].reason.startswith("model 'resnet18' is not known; use torchvision")
    assert ends(row) == {"baseline": "fail", **dict.fromkeys(TO_TRAINS[1:], "skip")}


def broken(**changes):
    """Stands in for leanify, and breaks its result."""

    def leanify(model, inputs):
        lean = lean_fx.leanify(model, inputs)
        for name, change in changes.items():
            change(model if name == "model" else lean)
        return lean

    return leanify


def zero_the_weights(model):
    nn.init.zeros_(model[0].weight)


def add_an_unused_parameter(lean):
    lean.unused = nn.Parameter(torch.ones(1))


def infinite_weights(lean):
    nn.init.constant_(lean.get_submodule("8").weight, float("inf"))


@pytest.mark.parametrize(
    ("changes", "ring", "reason"),
    [
        (
            {"model": zero_the_weights},
            "leanified",
            "the model itself gives something else after leanify",
        ),
        (
            {"lean": infinite_weights},
            "runs",
            "at the example inputs: its outputs are not finite",
        ),
        ({"lean": add_an_unused_parameter}, "trains", "1 parameters get no gradient: unused"),
    ],
)
def test_a_ring_sees_what_is_broken(monkeypatch, changes, ring, reason):
    monkeypatch.setattr(zoo_rings, "leanify", broken(**changes))
    row = run_rings(SMALL, TO_TRAINS, lambda row: None)
    assert row.rings[ring] == Ring("fail", reason, row.rings[ring].seconds)


@pytest.mark.parametrize(
    ("leanify_s", "trace_s", "ring"),
    [
        (3.0, 1.0, Ring("ok")),
        (3.2, 1.0, Ring("fail", "leanify takes 3.2 times as long as torch.fx with shapes")),
        (1.0, None, Ring("skip", "torch.fx alone cannot trace it")),
    ],
)
def test_quick_is_three_times_a_trace(monkeypatch, leanify_s, trace_s, ring):
    times = {"leanify_s": leanify_s} | ({"trace_s": trace_s} if trace_s else {})
    monkeypatch.setattr(zoo_rings, "time_leanify", lambda model, images: times)
    row = run_rings(SMALL, RINGS[:6], lambda row: None)
    assert (row.rings["quick"].status, row.rings["quick"].reason) == (ring.status, ring.reason)
    assert row.numbers["leanify_s"] == leanify_s


def test_an_error_that_is_not_ours_is_a_crash(monkeypatch):
    def leanify(model, inputs):
        raise KeyError("pack\npadded")

    monkeypatch.setattr(zoo_rings, "leanify", leanify)
    row = run_rings(SMALL, TO_TRAINS, lambda row: None)
    assert (row.rings["leanified"].status, row.rings["runs"].status) == ("crash", "skip")
    assert row.rings["leanified"].reason == r"KeyError: 'pack\npadded'"


def test_no_images_fit():
    with pytest.raises(ArgumentError, match="Bilinear: takes no images of 64 to 512 pixels a side"):
        fitting_images(nn.Bilinear(2, 2, 2))


def test_images_fit_in_training_too():
    model = build("zoo_nets:Larger")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert fitting_images(model).shape == (2, 3, 128, 128)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_trained_is_skipped():
    row = run_rings("zoo_nets:Fixed", TO_TRAINS, lambda row: None)
    assert row.numbers["size"] == 64
    assert (row.rings["runs"].status, row.rings["trains"].status) == ("ok", "skip")
    assert row.rings["trains"].reason == "the baseline cannot take a training step: only eval"


def test_models_are_chosen():
    names = ["torchvision/resnet18", "torchvision/vgg11", "timm/vgg11"]
    assert choose("*", names) == names
    assert choose("timm/*, *vgg11,a:b", names) == ["timm/vgg11", "torchvision/vgg11", "a:b"]
    with pytest.raises(ArgumentError) as caught:
        choose("resnet*", names)
    assert str(caught.value) == "models: 'resnet*' matches no name; use torchvision/*, timm/*"
    with pytest.raises(ArgumentError, match="models: '' names none; use torchvision/"):
        choose("", names)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for call in (catalogue, lambda: build("torchvision/resnet18"), lambda: build("timm/vgg11")):
        with pytest.raises(MissingDependencyError) as caught:
            call()
        assert str(caught.value) == (
            "torchvision is not installed and the zoo needs it; run: pip install torchvision"
        )


def test_rows_round_trip(tmp_path):
    row = Row("a/b", {"baseline": Ring("ok", "", 0.1)}, {"sites": 3}, {"why": 2}, "done")
    write_row(row, tmp_path / "row.json")
    assert read_row(tmp_path / "row.json") == row
    (tmp_path / "row.json").write_text("[1]")
    with pytest.raises(DataError, match=r"row.json: is not a row of the zoo .*; move it away"):
        read_row(tmp_path / "row.json")


def test_rows_that_are_there_are_read(tmp_path):
    (tmp_path / "models").mkdir()
    write_row(Row("timm/b"), row_file(tmp_path, "timm/b"))
    assert read_rows(["timm/a", "timm/b"], tmp_path) == [Row("timm/b")]


def finished(ended="done", rings=TO_TRAINS, **ends):
    return Row("a", {ring: Ring(ends.get(ring, "ok")) for ring in rings}, ended=ended)


@pytest.mark.parametrize(
    ("row", "again", "expected"),
    [
        (finished(), False, True),
        (finished(), True, True),
        (finished(ended=""), False, False),
        (finished(rings=RINGS[:3]), False, False),
        (finished(rings=RINGS[:3], ended="killed by SIGKILL"), False, True),
        (finished(rings=RINGS[:3], ended="killed by SIGKILL"), True, False),
        (finished(trains="fail"), False, True),
        (finished(trains="fail"), True, False),
        (finished(trains="skip"), True, True),
        (finished(rings=RINGS, faster="fail"), True, True),
    ],
)
def test_which_rows_are_finished(row, again, expected):
    assert is_finished(row, TO_TRAINS, again) is expected


def test_models_that_have_ended_are_not_asked_again(tmp_path, monkeypatch):
    asked = []

    def ask(name, file, upto, timeout_s):
        asked.append(name)
        row = Row(name, {ring: Ring("ok") for ring in RINGS[: RINGS.index(upto) + 1]}, ended="done")
        if name == "broken":
            row.rings[upto].status = "fail"
        write_row(row, file)
        return row

    monkeypatch.setattr(zoo_runs, "ask", ask)
    names, told = ["a", "broken", "c"], []
    run_zoo(names[:2], tmp_path, upto="captured")
    rows = run_zoo(names, tmp_path, upto="captured", progress=lambda *args: told.append(args))
    assert asked == names
    assert [row.model for row in rows] == names
    assert told == [("c", 1, 1)]
    run_zoo(names, tmp_path, upto="captured", again=True)
    assert asked[3:] == ["broken"]
    run_zoo(names, tmp_path, upto="leanified", jobs=2)
    assert sorted(asked[4:]) == names


def test_numbers_out_of_range_are_refused(tmp_path):
    for arguments in ({"jobs": 0}, {"timeout_s": 0}, {"upto": "sells"}):
        with pytest.raises(ArgumentError):
            run_zoo(["a"], tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_whatever_becomes_of_a_process_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    (killed,) = run_zoo(["zoo_nets:Killed"], tmp_path, upto="captured")
    (endless,) = run_zoo(["zoo_nets:Endless"], tmp_path, upto="captured", timeout_s=4)
    assert killed.ended == "killed by SIGKILL"
    assert killed.rings == {"baseline": Ring("crash", "killed by SIGKILL")}
    assert endless.ended == "stopped after 4 s"
    assert read_row(row_file(tmp_path, "zoo_nets:Endless")) == endless


def test_the_script_writes_its_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    command = [
        sys.executable,
        ROOT / "examples" / "zoo.py",
        "--models",
        SMALL,
        "--rings",
        "leanified",
    ]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "100%" in run.stdout
    with (tmp_path / "runs/zoo/zoo.csv").open(newline="") as stream:
        (line,) = csv.DictReader(stream)
    assert (line["model"], line["leanified"], line["sites_reduced"]) == (SMALL, "ok", "2")
    assert "| others | 1 | 1/1 | 1/1 |" in (tmp_path / "runs/zoo/zoo.md").read_text()


def test_the_tables_of_some_rows():
    passed = Row(
        "timm/a",
        {ring: Ring("ok") for ring in RINGS},
        {"calls": 9, "sites": 4, "sites_reduced": 3, "leanify_s": 3.0, "trace_s": 2.0}
        | {"conv_calls": 9, "macs": 10, "macs_lean": 5},
        {"groups=N": 1},
        "done",
    )
    other = Row(
        "torchvision/b",
        {"baseline": Ring("ok"), "captured": Ring("fail", "a | b"), "leanified": Ring("fail")},
        {"sites": 7, "sites_reduced": 0},
        ended="done",
    )
    text = report([passed, other], ["Told above."])
    wanted = [
        "# The zoo\n\nTold above.\n",
        "| timm | 1 | 1/1 | 1/1 | 1/1 | 1/1 | 1/1 | 1/1 | 1/1 | 1/1 | 1/1 |",
        "| torchvision | 1 | 1/1 | 0/1 | 0/1 | - | - | - | - | - | - |",
        "| all | 2 | 2/2 | 1/2 | 1/2 | 1/1 |",
        "| timm | 9 | 0 | 0 | 0 | 0 | 4 | 3 | 75.0 |",
        "| torchvision | 0 | 0 | 0 | 0 | 0 | 7 | 0 | 0.0 |",
        "| groups=N | 1 | 1 | timm/a (1) |",
        "| timm | 1.50 [1.50-1.50], 1 | - | 0.50 [0.50-0.50], 1 | - |",
        "| torchvision/b | captured | fail | a \\| b |",
    ]
    for line in wanted:
        assert line in text
    assert text.count("torchvision/b") == 1
    _, first, second = csv.reader(csv_text([passed, other]).splitlines())
    assert first[:3] == ["timm/a", "done", "ok"]
    assert first[-2:] == ["1 groups=N", ""]
    assert second[-1] == "a | b"
