"""What the example scripts have in common: how they end, and how they show a report."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import nn

from lean_fx.checks import whole_numbers
from lean_fx.errors import LeanError, require
from lean_fx.experiment import comparison
from lean_fx.experiment.datasets import Dataset
from lean_fx.measure.report import Report
from support.arms import paper_arms


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main function; an error of ours ends it with one line and status 1."""
    try:
        main()
    except LeanError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; run the same again to go on") from None


def command_line() -> str:
    """The command that started this program, as a reader can type it."""
    script = Path(sys.argv[0])
    shown = script.resolve()
    if shown.is_relative_to(Path.cwd()):
        shown = shown.relative_to(Path.cwd())
    return shlex.join(["python", str(shown), *sys.argv[1:]])


def experiment_parser(
    description: str,
    epochs: int,
    out: str,
    *,
    channels: int = 10,
    reduction: str = "lean",
    seeds: str = "0",
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2),
    rate_epochs: int | None = None,
    schedule: str = "cosine",
) -> argparse.ArgumentParser:
    """A parser with the options of the main job: baseline, LEAN and control on some data.

    Args:
        description: of the script, one line.
        epochs: a default, like the rest.
        out: folder for the nets and the report.
        channels: C' of every reduction.
        reduction: a registered name.
        seeds: numbers, separated by commas.
        rates: of which each net chooses one; without any, all train at Adam's usual one.
        rate_epochs: of the trainings that choose; as many as ``epochs`` by default.
        schedule: of the rate.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--channels", type=int, default=channels, help="C' of every reduction")
    parser.add_argument("--reduction", default=reduction, help="lean, or another registered name")
    parser.add_argument("--seeds", default=seeds, help="seeds, separated by commas")
    parser.add_argument(
        "--rates", type=float, nargs="*", default=rates, help="learning rates for each to choose of"
    )
    parser.add_argument(
        "--rate-epochs", type=int, default=rate_epochs, help="to choose the rate (default: all)"
    )
    parser.add_argument("--schedule", default=schedule, help="of the rate: constant or cosine")
    parser.add_argument("--out", default=out, help="folder for the nets and the report")
    return parser


def run_experiment(
    data: Dataset,
    args: argparse.Namespace,
    title: str,
    make_arms: Callable[[int], Mapping[str, nn.Module]] | None = None,
) -> None:
    """Run the main job with the options of :func:`experiment_parser`, and show its report.

    Args:
        data: what to train and test on.
        args: the options.
        title: of the report.
        make_arms: gives the models of a seed; without it, the paper's net, leanified and narrower.
    """
    from lean_fx.experiment.training import Settings

    def papers(seed: int) -> Mapping[str, nn.Module]:
        return paper_arms(data, args.channels, args.reduction, seed)

    settings = Settings(epochs=args.epochs, schedule=args.schedule)
    report = comparison.run(
        {seed: (make_arms or papers)(seed) for seed in whole_numbers("seeds", args.seeds, 0)},
        data,
        settings,
        args.out,
        title=title,
        command=command_line(),
        rates=args.rates,
        rate_epochs=args.rate_epochs,
    )
    show(report, args.out)


def show(report: Report, folder: str | Path) -> None:
    """Print a report's table, and where its files are."""
    console = require("rich.console", extra="examples", purpose="the table").Console()
    console.print(report.table())
    print(f"report.md, report.json, curves.png, figure3.png and the nets are in {folder}/")


@contextlib.contextmanager
def download_bar(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yield a function that draws a progress bar from bytes there and bytes in all."""
    progress = require("rich.progress", extra="examples", purpose="the progress bar")
    console = require("rich.console", extra="examples", purpose="the progress bar")
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    bar = progress.Progress(*columns, console=console.Console(stderr=True))
    task = bar.add_task(what, total=None)

    def update(done: int, total: int | None) -> None:
        bar.start()  # at the first piece, so that nothing is drawn where nothing is fetched
        bar.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        if bar.live.is_started:
            bar.stop()
