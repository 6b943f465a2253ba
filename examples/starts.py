"""How the weights of rebuilt layers start: scaled by one number, or in two parts.

    python examples/starts.py [--seeds 0,1,2] [--out runs/starts]

The two parts are those of lean_fx.layers.gains. The paper's net on scanned digits, and a VGG whose
batch norms are group norms on STL-10 at 24x24, which examples/stl10.py --download fetches into the
folder data. Each start has the better of two learning rates, by the mean over the seeds, on a
held-out fifth of the train split. Trainings that are done are kept, and are not run again.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

import lean_fx
from lean_fx.checks import whole_numbers
from lean_fx.errors import LeanWarning
from lean_fx.experiment.datasets import Dataset, digits
from lean_fx.experiment.training import Settings, train
from lean_fx.files import make_folder, write_text
from lean_fx.graph import site_reductions
from lean_fx.layers.gains import Gains, gains_between
from lean_fx.measure.machines import machine
from support.evidence.pictures import small_stl10
from support.evidence.plain_nets import Vgg
from support.evidence.rows import mean_and_error, with_error
from support.models import PaperNet
from support.script import command_line, run_script

EPOCHS = 12
REDUCTIONS = ("mean", "lean_damped", "lean_simplex")
STARTS = ("one number", "two parts")


def group_norm_vgg() -> nn.Module:
    """A VGG whose batch norms are group norms, of four groups."""
    net = Vgg()
    for name, module in [*net.named_modules()]:
        if isinstance(module, nn.BatchNorm2d):
            net.set_submodule(name, nn.GroupNorm(4, module.num_features))
    return net


def paper_net() -> nn.Module:
    """The paper's net for digits."""
    return PaperNet((50, 100, 150), 1, 8, 10)


@dataclasses.dataclass(frozen=True)
class Task:
    """A net and its data.

    Args:
        name: of the task.
        make: gives the net.
        data: gives its data.
        channels: C'.
        rates: to choose from.
    """

    name: str
    make: Callable[[], nn.Module]
    data: Callable[[], Dataset]
    channels: int | float
    rates: tuple[float, ...]


def by_one_number(rms: float, values: Tensor, reduced: Tensor, **_: bool) -> Gains:
    """The gain of the whole alone."""
    return Gains(gains_between(rms, values, reduced).whole)


def accuracy(task: Task, reduction: str, start: str, rate: float, seed: int, folder: Path) -> float:
    """The accuracy of one training on the part that is held out, in percent."""
    data = task.data().held_out()
    torch.manual_seed(seed)
    one = mock.patch.object(site_reductions, "gains_between", by_one_number)
    with one if start == STARTS[0] else contextlib.nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore", LeanWarning)
        net = lean_fx.leanify(
            task.make(),
            data.normalised(data.train_x[:2]),
            channels=task.channels,
            reduction=reduction,
        )
    settings = Settings(EPOCHS, learning_rate=rate, seed=seed, accelerator="cpu", schedule="cosine")
    name = f"{task.name}, {reduction}, {start}, rate {rate:g}, seed {seed}"
    history = train(net, data, settings, folder / name.replace(", ", "/"), name=name)
    return 100 * history[-1].test_accuracy


def shown(values: list[float]) -> str:
    """Mean and standard error."""
    return with_error(*mean_and_error(values))


def table(found: dict[tuple[str, ...], dict[float, list[float]]]) -> list[str]:
    """The lines of a table: for each start the accuracies at its better rate, and their difference.

    Args:
        found: by task, reduction and start, and by rate, the accuracies of the seeds.
    """
    lines = [
        "| task | reduction | one number, % | rate | two parts, % | rate | gained |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, reduction in dict.fromkeys(key[:2] for key in found):
        best, cells = [], []
        for start in STARTS:
            rates = found[name, reduction, start]
            rate = max(rates, key=lambda each: statistics.mean(rates[each]))
            best.append(rates[rate])
            cells.append(f"{shown(rates[rate])} | {rate:g}")
        gained = [after - before for before, after in zip(*best, strict=True)]
        lines.append(f"| {name} | {reduction} | {' | '.join(cells)} | {shown(gained)} |")
    return lines


def main() -> None:
    """Train all, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2", help="seeds, separated by commas")
    parser.add_argument(
        "--out", default="runs/starts", help="folder for the trainings and the table"
    )
    args = parser.parse_args()
    seeds, folder = whole_numbers("seeds", args.seeds, 0), make_folder(args.out)
    pictures, scans = functools.cache(small_stl10), functools.cache(digits)
    tasks = [
        Task("digits", paper_net, scans, 10, (3e-3, 1e-2)),
        Task("VGG with group norm", group_norm_vgg, pictures, 0.25, (1e-3, 3e-3)),
    ]
    runs = [
        (task, reduction, start, rate, seed)
        for task in tasks
        for seed, reduction in itertools.product(seeds, REDUCTIONS)
        for rate, start in itertools.product(task.rates, STARTS)
    ]
    found: dict[tuple[str, ...], dict[float, list[float]]] = {}
    for number, (task, reduction, start, rate, seed) in enumerate(runs, start=1):
        print(f"{number}/{len(runs)}", file=sys.stderr)
        reached = accuracy(task, reduction, start, rate, seed, folder)
        rates = found.setdefault((task.name, reduction, start), {})
        rates.setdefault(rate, []).append(reached)
    text = (
        f"# How the weights of rebuilt layers start\n\n```\n{command_line()}\n```\n\n{machine()}; "
        f"{EPOCHS} epochs, {len(seeds)} seeds; accuracy on a held-out fifth of the train split, "
        "mean and standard error over the seeds, each start at the better of two rates.\n\n"
    )
    write_text(folder / "starts.md", text + "\n".join(table(found)) + "\n")
    print(f"the table is in {folder / 'starts.md'}")


if __name__ == "__main__":
    run_script(main)
