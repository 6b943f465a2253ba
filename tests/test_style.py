"""ruff and mypy, as the tests' own machine runs them; and that CONTRIBUTING names what is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command",
    [
        "ruff format --check lean_fx passes tests examples",
        "ruff check lean_fx passes tests examples",
        "mypy lean_fx examples/support",
    ],
)
def test_style(command):
    run = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "MYPYPATH": "examples"},
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_contributing_names_files_and_targets_that_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:lean_fx|passes|tests|examples)(?:[/.][\w/.]*)?)`", text)
    assert len(paths) > 15
    modules = [path for path in paths if "." in path and not path.endswith(".py")]
    assert {*modules} == {"lean_fx.passes", "lean_fx.register_layer", "lean_fx.register_reduction"}
    assert [path for path in paths if path not in modules and not (ROOT / path).exists()] == []
    targets = re.findall(r"^(\S+): \$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {*re.findall(r"`make ([\w-]+)`", text)} <= {*targets}
