"""``lean_fx ablate study.toml``."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from lean_fx import command_line
from lean_fx.experiment import study_worker
from lean_fx.experiment.study_file import read_study_file
from lean_fx.experiment.trials import Outcome
from lean_fx.measure.costs import count_parameters

EXAMPLES = Path(__file__).parents[1] / "examples"

TEXT = """
make = "{home}:small_net"
data = "{home}:small_digits"
folder = "run"
[space]
arms = ["baseline", "slice"]
channels = [4]
[settings]
epochs = 1
"""


def write(folder, text, home="test_study"):
    (folder / "study.toml").write_text(text.replace("{home}", home))
    return str(folder / "study.toml")


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        study_worker, "run_apart", lambda job, stop: Outcome(0.5, 1, 100, 200, 1.0, host="here")
    )


def test_a_study_is_run_and_reported(tmp_path, capsys):
    file = write(tmp_path, TEXT)
    assert command_line.main(["ablate", file]) == 0
    out = capsys.readouterr().out
    assert "| slice 4, rate 0.001 | 1 | 50.0 | 100 | 200 |" in out
    assert out.rstrip().endswith("written to run/")
    assert (tmp_path / "run/study.md").read_text().startswith("# study\n\n```\nlean_fx ablate ")
    assert command_line.main(["ablate", file, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["configuration"]["arm"] for row in rows].count("slice") == 1


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.toml")), ids=lambda file: file.stem)
def test_the_studies_among_the_examples_can_be_read(file):
    study, _, _ = read_study_file(file)
    assert study.data.__doc__
    assert count_parameters(study.make(0.5)) < count_parameters(study.make(1.0))


def test_the_best_are_retrained(tmp_path, capsys):
    text = TEXT + "[retrain]\ntop = 1\nepochs = 7\nseeds = [3, 4]\n"
    file = write(tmp_path, text)
    assert command_line.main(["ablate", file, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    found = [(row["state"], row["configuration"]["seed"]) for row in rows]
    assert found == [("complete", 0)] * 2 + [("retrained", 3), ("retrained", 4)]
    report = (tmp_path / "run/study.md").read_text()
    assert "2 trials complete, 0 pruned" in report
    assert "rate 0.001 | 2 | 1 | 50.0 ± 0.0 |" in report.partition("## Retrained")[2]
    assert (tmp_path / "run/study.csv").read_text().count(",retrained,") == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("make =", "[make", "study.toml: cannot be read"),
        ("folder =", "folders =", "study.toml: 'folders' is not known; use make, data, space,"),
        ("epochs =", "epoch =", "study.toml: settings: 'epoch' is not known; use epochs,"),
        ('folder = "run"', "", "study.toml: 'folder' is missing"),
        (
            "[space]",
            "[retrain]\nbest = 3\n[space]",
            "retrain: 'best' is not known; use top, epochs",
        ),
        (
            "folder =",
            "retrain = 3\nfolder =",
            "study.toml: retrain is not a table; write [retrain]",
        ),
        (":small_net", ":none", "make: test_study:none cannot be imported (AttributeError:"),
        (":small_net", "", "make: 'test_study' is not a MODULE:NAME such as my_nets:make"),
        ("[4]", "[]", "Space: channels is empty; give one choice or more"),
        ("epochs = 1", "epochs = 0", "Settings: epochs=0 is not an int of 1 or more"),
        ("[space]", "[space", "study.toml: cannot be read"),
        ("[space]", "objectives = 3\n[space]", "Study: objectives=3 is not a list of choices"),
        ("[space]", 'objectives = [["accuracy"]]\n[space]', "holds another list or table; give"),
        ("[space]", "storage = 5\n[space]", "Study: storage=5 is not a text; give one"),
        ("[space]", 'held_out = "false"\n[space]', "Study: held_out='false' is not known; use T"),
        ("[space]", 'prune = "no"\n[space]', "Study.run: prune='no' is not known; use True or F"),
        ("[4]", "[[4]]", "Space: channels=([4],) holds another list or table; give plain values"),
        ("[4]", '[4]\nlearning_rates = ["x"]', "Space: learning rate='x' lies outside ]0, 1]"),
        ("[settings]", "[space.options]\ndampnig = [1.0]\n[settings]", "'dampnig' is an argument"),
        ("epochs = 1", 'learning_rate = "x"', "Settings: learning_rate='x' lies outside ]0, "),
        ("[space]", "[retrain]\nseeds = 5\n[space]", "Study.retrain: seeds=5 is not a list of i"),
        ("[space]", "[retrain]\nepochs = 0\n[space]", "Study.retrain: epochs=0 is not an int of"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(tmp_path, capsys, old, new, message):
    file = write(tmp_path, TEXT.replace(old, new))
    assert command_line.main(["ablate", file]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [("dict", r"Study: make\(1.0\) fails \(TypeError: "), ("float", r"make\(1.0\) gives a float")],
)
def test_a_factory_that_makes_no_model(make, message, tmp_path, capsys):
    text = TEXT.replace("{home}:small_net", f"builtins:{make}").replace('"slice"', '"narrow"')
    assert command_line.main(["ablate", write(tmp_path, text)]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_no_worker_is_refused(tmp_path, capsys):
    assert command_line.main(["ablate", write(tmp_path, TEXT), "--workers", "0"]) == 1
    assert capsys.readouterr().err == "error: workers=0 is not an int of 1 or more\n"


@pytest.mark.slow
def test_several_workers_run_each_trial_once(tmp_path):
    text = TEXT.replace("channels", "seeds = [0, 1, 2, 3]\nchannels")
    file = write(tmp_path, text + 'accelerator = "cpu"\n')
    command = [sys.executable, "-m", "lean_fx", "ablate", file, "--workers", "2", "--json"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr
    rows = json.loads(done.stdout)
    assert [row["state"] for row in rows] == ["complete"] * 8
    database = sqlite3.connect(tmp_path / "run/study.db")
    (trials,) = database.execute("select count(*) from trials").fetchone()
    begun = database.execute("select datetime_start, datetime_complete from trials").fetchall()
    begun.sort()
    assert trials == 8
    assert any(later[0] < earlier[1] for earlier, later in pairwise(begun))  # two at once


def test_a_file_that_is_not_there(capsys):
    assert command_line.main(["ablate", "none.toml"]) == 1
    assert "none.toml: cannot be read" in capsys.readouterr().err


def test_a_module_beside_the_file_is_found(tmp_path, monkeypatch, capsys):
    home = tmp_path / "there"
    home.mkdir()
    (home / "nets_beside_a_study.py").write_text("from test_study import small_digits, small_net\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = write(home, TEXT, home="nets_beside_a_study")
    assert command_line.main(["ablate", file]) == 0
    assert (tmp_path / "run/study.md").exists()
