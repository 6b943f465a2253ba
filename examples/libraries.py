"""What leanify does with small models of other people's libraries.

    pip install --no-deps torchvision timm
    python examples/libraries.py --packages   # prints the names of the libraries to install
    python examples/libraries.py [--models "transformers/*"] [--jobs 1] [--out runs/libraries]

Each model is asked in a process of its own, with random weights and small inputs, and nothing is
downloaded. Models that have a row are not asked again, so the same command goes on where it was
stopped; --again repeats those that failed. A library that is not installed is a row that says so.
Writes libraries.md, the table.
"""

import argparse
import fnmatch
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from lean_fx.errors import require
from lean_fx.files import make_folder, write_text
from lean_fx.measure.machines import machine
from lean_fx.measure.tables import markdown_table
from support.library_models import MODELS, PACKAGES
from support.library_rows import LibraryRow, read_library_row, write_library_row
from support.script import command_line, run_script
from support.zoo_runs import run_module


def main() -> None:
    """Ask what has not been asked yet, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", default="*", help="names and patterns, separated by commas")
    parser.add_argument("--packages", action="store_true", help="print the libraries and end")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a model may take")
    parser.add_argument("--again", action="store_true", help="repeat the models that failed")
    parser.add_argument("--out", default="runs/libraries", help="folder for the rows and the table")
    args = parser.parse_args()
    if args.packages:
        print(*PACKAGES.values())
        return
    patterns = args.models.split(",")
    names = [name for name in MODELS if any(fnmatch.fnmatch(name, each) for each in patterns)]
    folder = make_folder(args.out)
    make_folder(folder / "models")
    todo = [name for name in names if not _is_finished(folder, name, args.again)]
    progress = require("rich.progress", extra="examples", purpose="the progress bar")
    pool = ThreadPoolExecutor(args.jobs)
    try:
        with progress.Progress() as bar:
            task = bar.add_task("models", total=len(todo))
            asked = [pool.submit(_ask, folder, each, args.timeout) for each in todo]
            for _ in as_completed(asked):
                bar.advance(task)
    finally:  # what is known when it is stopped is worth a table, too
        pool.shutdown(wait=True, cancel_futures=True)
        files = (_file(folder, name) for name in names)
        rows = [read_library_row(file) for file in files if file.exists()]
        write_text(folder / "libraries.md", report(rows))
    print((folder / "libraries.md").read_text())
    print(f"written to {folder / 'libraries.md'}")


def report(rows: list[LibraryRow]) -> str:
    """The table, and what it comes to, in Markdown."""
    asked = [row for row in rows if row.form]
    sites = sum(row.sites for row in asked)
    shares = [sum(getattr(row, name) for row in asked) for name in ("reduced", "module_reduced")]
    libraries = {row.model.partition("/")[0] for row in asked}
    refused = [row.model for row in rows if not row.form and "itself" not in row.ended]
    lines = [
        "# Models of other libraries",
        f"```\n{command_line()}\n```",
        f"{machine()}. A site is a call that multiplies 16 or more channels with weights, found by "
        'running the model, not by the pass. "-": the model itself cannot.',
        f"{len(asked)} models of {len(libraries)} libraries; {len(refused)} refused"
        f"{': ' + ', '.join(refused) if refused else ''}. Of {sites} sites "
        f"{shares[0]} ({shares[0] / max(1, sites):.1%}) read a reduction by default, {shares[1]} "
        f'({shares[1] / max(1, sites):.1%}) with form="module".',
    ]
    header = ("model", "form", "sites", "reduced", 'form="module"', "batch", "size", "trains")
    table = [
        (
            row.model,
            row.form or row.ended,
            *(str(each) for each in (row.sites, row.reduced, row.module_reduced)),
            *(row.batch, row.size, row.trains, row.exports, f"{row.seconds:g}"),
            "; ".join(f"{count} {reason}" for reason, count in row.reasons.items()),
        )
        for row in rows
    ]
    return "\n\n".join(
        [*lines, markdown_table([(*header, "exports", "seconds", "not reduced"), *table])]
    )


def _file(folder: Path, name: str) -> Path:
    return folder / "models" / f"{name.replace('/', '.')}.json"


def _is_finished(folder: Path, name: str, again: bool) -> bool:
    file = _file(folder, name)
    return file.exists() and (not again or read_library_row(file).ended == "done")


def _ask(folder: Path, name: str, timeout_s: float) -> None:
    """Ask one model in a process of its own, whatever becomes of that."""
    file = _file(folder, name)
    end = run_module("support.library_rows", [name, str(file)], timeout_s)
    if end:
        write_library_row(LibraryRow(name, ended=end), file)


if __name__ == "__main__":
    run_script(main)
