"""ruff and mypy, as the tests' own machine runs them."""

import os
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
