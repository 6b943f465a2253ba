"""What examples/paying.py takes from an earlier run, and what it measures anew."""

import runpy
import sys
from pathlib import Path

import pytest

from lean_fx.errors import DataError

SCRIPT = Path(__file__).parents[1] / "examples/paying.py"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the script with options; return what it printed and the models that it measured."""
    main = runpy.run_path(str(SCRIPT))["main"]
    asked = []

    def measure(name, size, rounds, kernel):
        asked.append((name, size, rounds))
        settings = {"model": name, "size": size, "rounds": rounds, "kernel": kernel}
        settings["keep"] = "baseline"
        figures = {"reductions": 0, "parameters": 1000, "macs": size}
        times = {"median_ms": float(size), "q1_ms": 1.0, "q3_ms": 2.0}
        return [settings | figures | times]

    monkeypatch.setitem(main.__globals__, "measure", measure)

    def called(options):
        asked.clear()
        arguments = [str(SCRIPT), "--out", str(tmp_path), *options.split()]
        monkeypatch.setattr(sys, "argv", arguments)
        main()
        return capsys.readouterr().out, tuple(asked)

    return called


def test_a_run_with_other_settings_is_measured_anew(run):
    assert run("--models a,b")[1] == (("a", 96, 20), ("b", 96, 20))
    printed, asked = run("--models a --size 224 --rounds 99")
    assert asked == (("a", 224, 99),)
    assert "pictures of 224x224" in printed
    assert "99 rounds" in printed
    assert "| a | baseline | 0 | 0.00 | 0.0 | 224.00 [1.00-2.00] | 1.00 |" in printed
    assert "96.00" not in printed
    assert run("--models a --size 224")[1] == (("a", 224, 20),)


def test_a_run_without_the_kernel_is_measured_anew(run, monkeypatch):
    monkeypatch.setattr("lean_fx.kernel.library_path", lambda: SCRIPT)  # as if it were built
    assert "LEAN nodes by lean_fx's kernel." in run("--models a")[0]
    printed, asked = run("--models a --no-kernel")
    assert asked == (("a", 96, 20),)
    assert "LEAN nodes by the function in the file." in printed


def test_a_run_with_the_same_settings_goes_on(run):
    run("--models a,b")
    printed, asked = run("--models c,b,b")
    assert asked == (("c", 96, 20),)
    assert [line[:4] for line in printed.splitlines() if "| baseline" in line] == ["| c ", "| b "]


def test_a_table_of_other_columns_is_refused(run, tmp_path):
    (tmp_path / "paying.csv").write_text("model,keep\nresnet18,all\n")
    with pytest.raises(DataError) as caught:
        run("--models a")
    assert str(caught.value) == (
        f"{tmp_path / 'paying.csv'}: is not a table of examples/paying.py; move it away, or give "
        "another --out"
    )
