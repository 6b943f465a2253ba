"""Who may import whom, and what importing lean_fx brings along."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for path in sorted(ROOT.glob("lean_fx/**/*.py")) if "passes" not in path.parts]
FILES += sorted(ROOT.glob("passes/*.py"))

# From the bottom up; a module may import modules of its own layer and of those below it.
LAYERS = (
    {
        "lean_fx.errors",
        "lean_fx.files",
        "lean_fx.onnx_files",
        "lean_fx.locks",
        "lean_fx.importing",
        "lean_fx.skip_reason",
        "lean_fx.kernel",
    },
    {"lean_fx.checks", "lean_fx.model_checks", "lean_fx.cloning"},
    {"lean_fx.reduction"},
    {"lean_fx.layers"},
    {"lean_fx.graph"},
    {"lean_fx.passes"},
    {"lean_fx.capture"},
    {"lean_fx.planning"},
    {"lean_fx.export"},
    {"lean_fx.measure"},
    {"lean_fx.selection"},
    {"lean_fx.planned"},
    {"lean_fx.transform", "lean_fx.saving", "lean_fx.boxes", "lean_fx.drawing"},
    {"lean_fx"},
    {"lean_fx.experiment", "lean_fx.command_arguments", "lean_fx.command_line"},
    {"lean_fx.__main__"},
)
OPTIONAL = {
    "onnx": {"lean_fx.onnx_files", "lean_fx.export", "lean_fx.measure"},
    "onnx_ir": {"lean_fx.export"},
    "onnxscript": {"lean_fx.export", "lean_fx.measure"},
    "onnxruntime": {"lean_fx.export", "lean_fx.measure"},
    "codecarbon": {"lean_fx.measure"},
    "rich": {"lean_fx.measure", "lean_fx.experiment"},
    "matplotlib": {"lean_fx.drawing", "lean_fx.measure", "lean_fx.experiment"},
    "numpy": {"lean_fx.export", "lean_fx.measure", "lean_fx.experiment"},
    "sklearn": {"lean_fx.experiment"},
    "lightning": {"lean_fx.experiment"},
    "filelock": {"lean_fx.experiment"},
    "optuna": {"lean_fx.experiment"},
    "sqlalchemy": {"lean_fx.experiment"},
    "safetensors": {"lean_fx.saving"},
}

#: How many modules of lean_fx `import lean_fx` may load.
MOST_MODULES_LOADED = 104


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("lean_fx", *parts) if parts[0] == "passes" else parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_name(path) for path in FILES}


def layer_of(module):
    name = ".".join(module.split(".")[:2])  # a package is in one layer
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


def imports(path):
    """Every module that a file imports, functions and type checking included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module
            yield node.module
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "require"
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.args[0].value


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_downwards(path):
    module = module_name(path)
    for imported in imports(path):
        package = imported.partition(".")[0]
        if package == "lean_fx":
            assert layer_of(imported) <= layer_of(module), f"{module} imports {imported}"
        elif package not in sys.stdlib_module_names | {"torch"}:
            home = next(
                (name for name in OPTIONAL.get(package, ()) if module.startswith(name)), None
            )
            assert home, f"{module} imports {imported}"


def runs_imports(path):
    """The modules of lean_fx that a file imports as it is imported itself."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("lean_fx."):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & MODULES or {node.module}


def test_modules_import_each_other_in_no_circle():
    sorter = TopologicalSorter({module_name(path): set(runs_imports(path)) for path in FILES})
    sorter.prepare()


def test_every_module_has_a_layer():
    assert len({layer_of(module_name(path)) for path in FILES}) == len(LAYERS)


@pytest.fixture(scope="module")
def loaded():
    """The names of the modules that `import lean_fx` adds to those of `import torch`."""
    code = (
        "import torch, sys; before = set(sys.modules)\n"
        "import lean_fx\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.split()


def test_import_needs_torch_alone(loaded):
    assert {name.partition(".")[0] for name in loaded} & set(OPTIONAL) == set()


def test_import_loads_neither_the_exporter_nor_the_timer(loaded):
    own = [name for name in loaded if name.partition(".")[0] == "lean_fx"]
    unwanted = ("lean_fx.export", "lean_fx.measure", "lean_fx.experiment")
    assert [name for name in own if name.startswith(unwanted)] == []
    assert 0 < len(own) <= MOST_MODULES_LOADED


def test_what_is_loaded_when_it_is_used_is_listed():
    lazily = {"compare", "costs_of", "export_onnx", "load", "plan_of", "save"}
    code = (
        f"import lean_fx; assert {lazily!r} < set(dir(lean_fx)); from lean_fx import *\n"
        "assert set(lean_fx.__all__) <= set(globals()) & set(dir(lean_fx))\n"
        "assert all(getattr(lean_fx, name) is globals()[name] for name in lean_fx.__all__)\n"
        "lean_fx.Comparison"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AttributeError: module 'lean_fx' has no attribute 'Comparison'" in run.stderr


def test_passes_has_one_import_name():
    code = "import passes"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "import this package as lean_fx.passes, not as passes" in run.stderr
