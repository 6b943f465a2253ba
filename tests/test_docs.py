"""The pages of the site: their code runs, and they are built without a warning."""

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from lean_fx.layers.kinds import KINDS, unregister_layer
from lean_fx.reduction import registry

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "examples/docs").glob("*.md"))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.stem
)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))
    kinds = set(KINDS)
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    program = types.ModuleType("page")  # a study sends its functions to other processes by name
    monkeypatch.setitem(sys.modules, "page", program)
    try:
        for number, block in enumerate(blocks):
            exec(compile(block, f"{page.name}[{number}]", "exec"), vars(program))
    finally:
        for kind in set(KINDS) - kinds:
            unregister_layer(kind)


def test_the_site_is_built_without_a_warning(tmp_path):
    command = ["-q", "-W", "--keep-going", "-c", "examples/docs", "examples", str(tmp_path)]
    run = subprocess.run(
        [sys.executable, "-m", "sphinx", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")
    made = (tmp_path / "docs/mathematics.html").read_text()
    assert made.count("<math") > 20
    for page in PAGES:
        assert (tmp_path / "docs" / f"{page.stem}.html").exists()


@pytest.mark.filterwarnings("ignore:.*off ONNX Runtime's fast path")  # of the narrower net
def test_the_notebook_runs_and_shows_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((ROOT / "examples/first_steps.ipynb").read_text())["cells"]
    program = types.ModuleType("notebook")
    for cell in cells:
        if cell["cell_type"] == "code":
            capsys.readouterr()
            exec("".join(cell["source"]), vars(program))
            shown = "".join(line for each in cell["outputs"] for line in each.get("text", []))
            if "accuracy" not in shown and "ms" not in shown:  # what is measured differs each time
                assert capsys.readouterr().out == shown
