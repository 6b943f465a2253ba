"""What a user installs: the files in the wheel, and the types that mypy sees."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command, cwd, **variables):
    """Run Python with no path to the sources in its environment."""
    env = {name: value for name, value in os.environ.items() if "PYTHONPATH" not in name}
    env |= variables
    env.pop("MYPYPATH", None)
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=cwd, env=env, capture_output=True, text=True
    )


def built_wheel(home, **variables):
    for name, least in (("setuptools", 77), ("pip", 0)):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed")
        if int(version.partition(".")[0]) < least:
            pytest.skip(f"{name} {version} is below {least}")
    source = home / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    left = shutil.ignore_patterns("*.so")
    for name in ("lean_fx", "passes", "examples/support"):  # the last must not be packed
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=left)
    # "./": pip would look for a package of that name.
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "made")
    built = run("pip", "wheel", *options, "./source", cwd=home, **variables)
    assert built.returncode == 0, built.stdout + built.stderr
    (file,) = (home / "made").glob("lean_fx-*.whl")
    return file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return built_wheel(tmp_path_factory.mktemp("wheel"))


def test_without_a_compiler_the_wheel_has_no_kernel(tmp_path):
    file = built_wheel(tmp_path, CC="/no/compiler", CXX="/no/compiler")
    assert not [name for name in zipfile.ZipFile(file).namelist() if "_onnx" in name]


def test_the_wheel_holds_the_package_only(wheel):
    files = [Path(name) for name in zipfile.ZipFile(wheel).namelist()]
    assert {file.parts[0].partition("-")[0] for file in files} == {"lean_fx"}
    held = {file for file in files if file.parts[0] == "lean_fx"}
    library = Path("lean_fx/kernel", f"_onnx{sysconfig.get_config_var('EXT_SUFFIX')}")
    assert (library in held) == (shutil.which("g++") is not None)
    held.discard(library)
    sources = {path.relative_to(ROOT) for path in ROOT.glob("lean_fx/**/*.py")}
    sources |= {"lean_fx" / path.relative_to(ROOT) for path in ROOT.glob("passes/*.py")}
    assert held == {*sources, Path("lean_fx/py.typed")}


RIGHT = """
import torch
from torch import nn

import lean_fx
from lean_fx.measure.comparison_table import Comparison
from lean_fx.skip_reason import LeftAlone

model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
inputs = torch.rand(5, 8)
made: lean_fx.Plan = lean_fx.plan(model, inputs, channels="sqrt")
left: tuple[LeftAlone, ...] = made.left_alone
lean: nn.Module = lean_fx.leanify(model, inputs, channels={"2": 8}, skip=("0",), keep="saving")
print(lean_fx.export_onnx(lean, "lean.onnx", inputs).path)
compared: Comparison = lean_fx.compare({"baseline": model, "lean": lean}, inputs)
macs: int = lean_fx.costs_of(lean, inputs).macs
try:
    print(lean_fx.plan_of(lean).to_json(), compared.to_markdown())
except lean_fx.LeanError as error:
    print(error)
"""

WRONG = """
import lean_fx

lean_fx.leanfy
lean_fx.leanify(3)
lean_fx.export_onnx("model", "lean.onnx", 1)
lean_fx.compare({}, 1).to_pdf()
"""

TOLD = """\
wrong.py:4: error: Module has no attribute "leanfy"; maybe "leanify"?
wrong.py:5: error: Argument 1 to "leanify" has incompatible type "int"; expected Module
wrong.py:6: error: Argument 1 to "export_onnx" has incompatible type "str"; expected Module
wrong.py:7: error: "Comparison" has no attribute "to_pdf"
Found 4 errors in 1 file (checked 2 source files)
"""


def test_a_users_file_is_checked_against_the_installed_package(wheel, tmp_path):
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    # torch is found beside it; the editable install there is not, as it is no folder.
    (packages / "torch.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    cache = ROOT / ".mypy_cache"  # what tests/test_style.py leaves there of torch is taken
    strict = ("mypy", "--strict", f"--python-executable={python}", f"--cache-dir={cache}")

    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    checked = run(*strict, "--hide-error-codes", "right.py", "wrong.py", cwd=tmp_path)
    assert checked.stdout == TOLD, checked.stderr
