"""What a user installs: the files in the wheel, and the types that mypy sees."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
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


def made_source(home):
    """A copy of what the package is built of, as on a clean checkout."""
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
    return source


def built_wheel(home, source=None, **variables):
    source = source or made_source(home)
    # "./": pip would look for a package of that name.
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "made")
    built = run("pip", "wheel", *options, f"./{source.name}", cwd=home, **variables)
    assert built.returncode == 0, built.stdout + built.stderr
    (file,) = (home / "made").glob("lean_fx-*.whl")
    return file


def built_sdist(home):
    source = made_source(home)
    for name in ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "tests", source / "tests")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(home)!r})"
    built = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    shutil.rmtree(source)
    (file,) = home.glob("lean_fx-*.tar.gz")
    return file


NO_COMPILER = {"CC": "/no/compiler", "CXX": "/no/compiler"}


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """A compiler that does not optimise, which takes a seventh of the time."""
    script = tmp_path_factory.mktemp("bin") / "g++"
    script.write_text(f'#!/bin/sh\nexec {shutil.which("g++") or "/no/compiler"} "$@" -O0\n')
    script.chmod(0o755)
    return {"CC": str(script), "CXX": str(script)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, compiler):
    return built_wheel(tmp_path_factory.mktemp("wheel"), **compiler)


def names_in(wheel):
    return sorted(zipfile.ZipFile(wheel).namelist())


def test_the_source_distribution_holds_all_and_makes_the_same_wheel(tmp_path):
    file = built_sdist(tmp_path)
    with tarfile.open(file) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    sources = ("lean_fx/kernel/*.cpp", "lean_fx/kernel/*.h", "tests/*.py", "examples/support/*.py")
    files = [path for each in sources for path in ROOT.glob(each)]
    assert held >= {str(path.relative_to(ROOT)) for path in files}
    assert held >= {"passes/base.py", "lean_fx/py.typed", "Makefile", "LICENSE"}
    (tmp_path / "tree").mkdir()
    wheel = built_wheel(tmp_path, file, **NO_COMPILER)
    names = names_in(wheel)
    assert names == names_in(built_wheel(tmp_path / "tree", **NO_COMPILER))
    assert not [name for name in names if "_onnx" in name]  # a compiler is wanted for it


ASKS = """
import torch, lean_fx
from lean_fx import passes
lean = lean_fx.leanify(torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Linear(32, 4)))
lean(torch.rand(2, 4)).sum().backward()
print(lean_fx.__file__, lean_fx.onnx_kernel())
"""


@pytest.mark.parametrize(
    "kind", ["wheel", "sdist", pytest.param("editable", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("compiles", [True, False], ids=["compiler", "none"])
def test_it_runs_where_it_is_installed(kind, compiles, compiler, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)  # it may name a checkout
    source = built_sdist(tmp_path) if kind == "sdist" else made_source(tmp_path)
    variables = compiler if compiles else NO_COMPILER
    venv.create(tmp_path / "venv")
    python = str(tmp_path / "venv" / "bin" / "python")
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "torch.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    what = [str(built_wheel(tmp_path, source, **variables)) if kind == "wheel" else str(source)]
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed")
    editable = ["--editable"] if kind == "editable" else []
    done = run(
        *("pip", "--python", python, "install", *options, *editable, *what),
        cwd=tmp_path,
        **variables,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    asked = subprocess.run([python, "-c", ASKS], cwd=tmp_path, capture_output=True, text=True)
    home = source if kind == "editable" else packages
    if compiles and shutil.which("g++"):
        file, kernel = asked.stdout.split()
        assert Path(kernel).parent == home / "lean_fx" / "kernel"
        assert Path(file).parent == home / "lean_fx"
    else:
        assert "so its kernel is not built" in asked.stderr.splitlines()[-1]


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
    # torch is found beside it; the editable install there is not, as it is not a folder.
    (packages / "torch.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    cache = ROOT / ".mypy_cache"  # what tests/test_style.py leaves there of torch is taken
    strict = ("mypy", "--strict", f"--python-executable={python}", f"--cache-dir={cache}")

    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    checked = run(*strict, "--hide-error-codes", "right.py", "wrong.py", cwd=tmp_path)
    assert checked.stdout == TOLD, checked.stderr
