"""What leanify does with every torchvision classifier and segmentation net, and with timm.

    pip install --no-deps torchvision timm
    pip install huggingface_hub safetensors pyyaml
    python examples/zoo.py [--models "torchvision/*"] [--rings trains] [--jobs 1] [--out runs/zoo]

Of timm it takes the smallest variant of each module. Each model is asked in a process of its own,
ring by ring: is it captured, leanified, does it run, train, export, is that quick, is the result
cheaper and faster. Weights are random, images small, one thread. Models that have ended are not
asked again, so the same command goes on where it was stopped; --again repeats those that failed. A
model of one's own is named MODULE:FUNCTION. Writes zoo.csv, a line a model, and zoo.md, the tables.
"""

import argparse
from pathlib import Path

from lean_fx.errors import require
from lean_fx.files import make_folder, write_text
from lean_fx.kernel import uses_kernel, what_computes
from lean_fx.measure.machines import machine
from support.script import command_line, run_script
from support.zoo_models import catalogue, choose
from support.zoo_rows import RINGS, Row
from support.zoo_runs import read_rows, run_zoo
from support.zoo_table import csv_text, report


def main() -> None:
    """Ask what has not been asked yet, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", default="*", help="names and patterns, separated by commas")
    parser.add_argument("--rings", default=RINGS[-1], help=f"the last of {', '.join(RINGS)}")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=900, help="seconds a model may take")
    parser.add_argument("--again", action="store_true", help="repeat the models that failed")
    parser.add_argument("--out", default="runs/zoo", help="folder for the rows and the tables")
    args = parser.parse_args()
    progress = require("rich.progress", extra="examples", purpose="the progress bar")

    own = all(":" in name for name in args.models.split(","))
    names = choose(args.models, [] if own else catalogue())
    folder = make_folder(args.out)
    with progress.Progress(*progress.Progress.get_default_columns(), "{task.fields[last]}") as bar:
        task = bar.add_task("models", total=None, last="")
        try:
            run_zoo(
                names,
                folder,
                upto=args.rings,
                jobs=args.jobs,
                timeout_s=args.timeout,
                again=args.again,
                progress=lambda name, done, count: bar.update(
                    task, completed=done, total=count, last=name
                ),
            )
        finally:  # what is known when it is stopped is worth a table, too
            write_tables(read_rows(names, folder), folder)
    print((folder / "zoo.md").read_text())
    print(f"written to {folder / 'zoo.csv'} and {folder / 'zoo.md'}")


def write_tables(rows: list[Row], folder: Path) -> None:
    """Write the CSV file and the report."""
    heading = [
        f"```\n{command_line()}\n```",
        f'{machine()}; 1 thread, weights as drawn, channels="sqrt". A ring counts the models that '
        "pass it of those that were asked. A site is a call that multiplies 16 or more channels "
        "with weights and is not depthwise, found by running the model, not by the pass. LEAN "
        f"nodes run by {what_computes(uses_kernel(None))}.",
    ]
    write_text(folder / "zoo.csv", csv_text(rows))
    write_text(folder / "zoo.md", report(rows, heading))


if __name__ == "__main__":
    run_script(main)
