"""How large and how straight the code is: ``make house`` prints it.

Lines and files are those of Python in ``lean_fx`` and ``passes``, without ``lean_fx.experiment``.
What one ``leanify`` enters is counted on a plain CNN, after a first call has filled the caches:
the files whose functions run, and how often the next function to run is one of another file.
"""

import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import FrameType

import torch
from torch import nn

import lean_fx
from test_layers import FILES, ROOT, module_name, runs_imports


def plain_cnn() -> nn.Module:
    """Three convolutions and a linear layer."""
    return nn.Sequential(
        *(nn.Conv2d(3, 48, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(48, 96, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(96, 96, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96 * 4 * 4, 10)),
    )


def entered() -> tuple[int, int]:
    """The files that a leanify enters, and the switches from one of them to another."""
    model, inputs = plain_cnn(), torch.rand(2, 3, 30, 30)
    lean_fx.leanify(model, inputs)
    files: list[str] = []

    def trace(frame: FrameType, event: str, _: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and ("/lean_fx/" in name or "/passes/" in name):
            name = str(Path(name).resolve())
            if name.startswith(str(ROOT)) and files[-1:] != [name]:
                files.append(name)

    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        lean_fx.leanify(model, inputs)
    finally:
        sys.settrace(None)
    return len(set(files)), len(files)


def circle() -> str:
    """A circle of imports, or none."""
    graph = {module_name(path): set(runs_imports(path)) for path in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " -> ".join(error.args[1])
    return "none"


def loaded() -> int:
    """The modules of lean_fx that importing it loads."""
    code = "import sys, lean_fx; print(sum(n.startswith('lean_fx') for n in sys.modules))"
    return int(subprocess.check_output([sys.executable, "-c", code], text=True))


def main() -> None:
    """Print the figures, each beside its bar."""
    counted = [path for path in FILES if "experiment" not in path.parts]
    lines = {path: len(path.read_text().splitlines()) for path in counted}
    files, switches = entered()
    rows = [
        ("lines without lean_fx.experiment", sum(lines.values()), "11,000"),
        ("files without lean_fx.experiment", len(lines), ""),
        ("files of more than 300 lines", sum(count > 300 for count in lines.values()), ""),
        ("files in passes/", sum(path.parent.name == "passes" for path in FILES), "14"),
        ("files that leanify of a plain CNN enters", files, "30"),
        ("switches from file to file meanwhile", switches, "500"),
        ("modules that import lean_fx loads", loaded(), ""),
        ("circle of imports", circle(), "none"),
    ]
    for what, found, bar in rows:
        shown = f"{found:,}" if isinstance(found, int) else found
        print(f"{what:42} {shown:>8}   {f'at most {bar}' if bar not in ('', 'none') else bar}")


if __name__ == "__main__":
    main()
