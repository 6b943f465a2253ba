"""What metering costs the work that is metered: the same work with and without EnergyMeter.

    python examples/metering.py [--rounds 9] [--seconds 10] [--threads 1 2]

The work is training steps of the paper's net in PyTorch, and calls of its file in ONNX Runtime, on
one thread and on all cores, where the meter's thread has no core to itself. A round has one stretch
of equally many calls plain, one metered and one plain again, each round beginning at another; the
ratio of the two plain ones is what the machine alone makes of the same work. Entering and leaving
the meter's block lies outside a stretch and is told by itself, and so is the processor time of the
meter while the program sleeps. Writes the table to runs/metering/metering.md.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import lean_fx
from lean_fx.checks import check_int, check_ints
from lean_fx.errors import ArgumentError, require
from lean_fx.export.sessions import onnx_call
from lean_fx.files import make_folder, write_text
from lean_fx.measure.comparison_table import ratio_of
from lean_fx.measure.eager import training_step, using_threads
from lean_fx.measure.energy import EnergyMeter
from lean_fx.measure.machines import machine
from lean_fx.measure.timing import Latency
from support.models import PaperNet
from support.script import command_line, run_script

ARMS = ("plain", "metered", "plain again")


def stretch(call: Callable[[], object], calls: int, metered: bool) -> tuple[float, float, float]:
    """Milliseconds of a call, and the seconds that it took to enter the block and to leave it."""
    begin = time.perf_counter()
    with EnergyMeter() if metered else contextlib.nullcontext():
        start = time.perf_counter()
        for _ in range(calls):
            call()
        end = time.perf_counter()
    return (end - start) * 1e3 / calls, start - begin, time.perf_counter() - end


def calls_in(call: Callable[[], object], seconds: float) -> int:
    """How many calls fill the seconds, by a tenth of them."""
    calls, start = 0, time.perf_counter()
    while not calls or time.perf_counter() - start < seconds / 10:
        call()
        calls += 1
    return max(1, round(calls * seconds / (time.perf_counter() - start)))


def spread(values: list[float]) -> str:
    """Median and quartiles of seconds, in milliseconds."""
    low, middle, high = (1e3 * value for value in statistics.quantiles(values, n=4))
    return f"{middle:.1f} [{low:.1f}-{high:.1f}]"


def the_meter_alone(seconds: float) -> list[str]:
    """What a block, a lap and a second of the meter cost, without any work."""
    _, first, _ = stretch(lambda: None, 1, metered=True)
    again = [stretch(lambda: None, 1, metered=True)[1:] for _ in range(20)]
    laps = []
    with EnergyMeter() as meter:
        before = time.process_time()
        time.sleep(seconds)
        share = (time.process_time() - before) / seconds
        for _ in range(20):
            start = time.perf_counter()
            meter.lap()
            laps.append(time.perf_counter() - start)
    return [
        f"| entering the block, the first time in a process, ms | {first * 1e3:.0f} |",
        f"| entering it afterwards, ms | {spread([enter for enter, _ in again])} |",
        f"| leaving it, ms | {spread([leave for _, leave in again])} |",
        f"| a lap, ms | {spread(laps)} |",
        f"| processor time while the program sleeps, of one core | {share:.2%} |",
    ]


def compare_arms(
    call: Callable[[], object], rounds: int, seconds: float, advance: Callable[[], None]
) -> list[list[float]]:
    """Milliseconds of a call in each round, for each arm, all arms in turn."""
    calls = calls_in(call, seconds)
    taken: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for done in range(rounds):
        first = done % len(ARMS)
        for arm in ARMS[first:] + ARMS[:first]:
            taken[arm].append(stretch(call, calls, arm == "metered")[0])
            advance()
    return [taken[arm] for arm in ARMS]


def main() -> None:
    """Measure all, print the tables, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a stretch")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--out", default="runs/metering")
    args = parser.parse_args()
    check_int("metering: rounds", args.rounds, 2)
    check_ints("metering: threads", args.threads, 1)
    if not args.seconds >= 0.1:
        raise ArgumentError(f"metering: seconds={args.seconds} is too little; give 0.1 or more")
    folder = make_folder(args.out)
    torch.manual_seed(0)
    progress = require("rich.progress", extra="examples", purpose="the progress bar").Progress

    model, images = PaperNet(), torch.rand(16, 3, 96, 96)
    rows, highest = [], 0.0
    with tempfile.TemporaryDirectory() as temporary, progress() as bar:
        total = 2 * len(args.threads) * args.rounds * len(ARMS)
        task = bar.add_task("the meter alone", total=total)
        alone = the_meter_alone(args.seconds)
        bar.update(task, description="stretches of work")
        file = Path(temporary) / "net.onnx"
        lean_fx.export_onnx(model, file, images)
        for threads in args.threads:
            works = (
                ("training step", 16, training_step(model, (images,))),
                ("ONNX Runtime", 1, onnx_call("net", file, images[:1].numpy(), threads)),
            )
            for work, batch, call in works:
                with using_threads(threads):
                    taken = compare_arms(call, args.rounds, args.seconds, lambda: bar.advance(task))
                plain, *others = (Latency(tuple(each), batch, threads) for each in taken)
                ratios = [ratio_of(other, plain) for other in others]
                highest = max(highest, ratios[0].high)
                cells = [f"{each.median_ms:.2f}" for each in (plain, others[0])]
                cells += [f"{each.median:.3f} [{each.low:.3f}-{each.high:.3f}]" for each in ratios]
                rows.append(f"| {work}, batch {batch} | {threads} | {' | '.join(cells)} |")
    lines = [
        "# What metering costs\n",
        f"```\n{command_line()}\n```\n",
        f"{machine()}; medians of {args.rounds} rounds of stretches of {args.seconds:g} s; the "
        f"meter reads every {EnergyMeter().interval_s:g} s; ratio: to plain, with its bootstrap "
        "interval; plain again: what the machine makes of the same work.\n",
        "| work | threads | plain, ms | metered, ms | metered, ratio | plain again, ratio |",
        "|---|---|---|---|---|---|",
        *rows,
        f"\nThe highest end of an interval of the metered work: {highest:.3f}.\n",
        "| the meter alone | once, or median and quartiles of 20 |",
        "|---|---|",
        *alone,
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    write_text(folder / "metering.md", text)
    print(f"written to {folder / 'metering.md'}")


if __name__ == "__main__":
    run_script(main)
