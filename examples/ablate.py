"""An ablation of the paper's net on the digits: reductions beside controls of equal budget.

    python examples/ablate.py --arms baseline,narrow,slice,lean_damped --channels 4,8,16
    python examples/ablate.py --sampler tpe --trials 40 --objectives accuracy,latency --prune

Each trial trains the net from scratch in a process of its own; accuracy is that on a fifth of the
train split, held out. The same command again, in other shells or on other machines that share
--storage too, runs what is missing. The table, the fronts and the parallel coordinates are
written to --out at the end. With --top the most accurate configurations are then trained anew on
the whole train split, and tested. Arms: baseline, the registered reductions, and the controls
narrow, narrow_macs, narrow_latency, low_rank and depthwise. Your own model: lean_fx ablate.
"""

import argparse

from lean_fx.checks import whole_numbers
from lean_fx.errors import ArgumentError
from lean_fx.experiment.configurations import Space
from lean_fx.experiment.datasets import digits
from lean_fx.experiment.study import Study
from lean_fx.experiment.study_report import write_report
from lean_fx.experiment.training import Settings
from support.models import PAPER_WIDTHS, PaperNet
from support.script import command_line, run_script


def make(width: float) -> PaperNet:
    """The paper's net for the digits, its widths scaled."""
    return PaperNet([max(1, round(width * full)) for full in PAPER_WIDTHS], 1, 8)


def words(text: str) -> tuple[str, ...]:
    """What commas separate."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def numbers(subject: str, text: str) -> tuple[float, ...]:
    """Numbers that commas separate."""
    try:
        return tuple(map(float, words(text)))
    except ValueError:
        raise ArgumentError(
            f"{subject}: {text!r} is not a list of numbers such as 1e-3,1e-2"
        ) from None


def main() -> None:
    """Run what is missing of the study, then print and draw all of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arms", default="baseline,narrow,slice,lean_damped")
    parser.add_argument("--channels", default="4,8,16", help="C', separated by commas")
    parser.add_argument("--sites", default="all", help="all, late, last, numbers, layer patterns")
    parser.add_argument("--rates", default="1e-3,3e-3", help="learning rates, likewise")
    parser.add_argument("--damping", default="", help="of LEAN's forms, likewise")
    parser.add_argument("--seeds", default="0", help="likewise")
    parser.add_argument("--objectives", default="accuracy,latency", help="and energy, macs, ...")
    parser.add_argument("--sampler", default="grid", help="grid, random or tpe")
    parser.add_argument("--trials", type=int, help="of random and tpe")
    parser.add_argument("--prune", action="store_true", help="end trials below the median early")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--top", type=int, default=0, help="retrain as many of the best")
    parser.add_argument("--top-epochs", type=int, default=50)
    parser.add_argument("--storage", help="URL of a database that workers share")
    parser.add_argument("--out", default="runs/ablation", help="folder of the report")
    args = parser.parse_args()

    space = Space(
        arms=words(args.arms),
        channels=tuple(whole_numbers("channels", args.channels, 1)),
        sites=words(args.sites),
        learning_rates=numbers("rates", args.rates),
        seeds=tuple(whole_numbers("seeds", args.seeds, 0)),
        options={"damping": numbers("damping", args.damping)} if args.damping else {},
    )
    study = Study(
        make,
        digits,
        space,
        args.out,
        words(args.objectives),
        settings=Settings(epochs=args.epochs, accelerator="cpu"),
        storage=args.storage,
        name="ablation",
    )
    rows = study.run(args.trials, sampler=args.sampler, prune=args.prune)
    if args.top:
        rows += study.retrain(args.top, args.top_epochs, space.seeds)
    print(write_report(study, rows, command_line()).read_text(encoding="utf-8"))
    print(f"written to {args.out}/")


if __name__ == "__main__":
    run_script(main)
