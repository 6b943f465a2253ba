"""How the time of leanify grows with the depth of a net, beside a plain torch.fx trace with shapes.

    python examples/bench_leanify.py [--layers 100,200,500,1000,2000] [--rounds 3]

The net is a chain of residual layers, each a convolution, batch norm and ReLU. Every round times
both at every depth in turn, in CPU seconds of one thread, which another program's load does not
lengthen by waiting. Writes the table and the picture of it to runs/bench_leanify.
"""

import argparse
import math
import statistics
import time

import torch
from torch import Tensor, nn

import lean_fx
from lean_fx.checks import check_int, whole_numbers
from lean_fx.errors import require
from lean_fx.files import make_folder, replacing, write_text
from lean_fx.measure.machines import machine
from lean_fx.measure.pictures import colour, new_figure
from lean_fx.measure.tables import markdown_table
from support.script import command_line, run_script
from support.zoo_times import trace_with_shapes

ARMS = {"leanify": lean_fx.leanify, "trace and shapes": trace_with_shapes}


class Chain(nn.Module):
    """Residual layers one after another."""

    def __init__(self, layers: int, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 1)
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(layers - 1))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(layers - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return as many pixels as there are."""
        x = self.stem(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + norm(conv(x)).relu()
        return x


def measure(depths: list[int], rounds: int) -> dict[str, dict[int, list[float]]]:
    """CPU seconds of each arm at each depth, one a round."""
    track = require("rich.progress", extra="examples", purpose="the progress bar").track
    images = torch.rand(2, 3, 4, 4)
    for call in ARMS.values():
        call(Chain(3), images)  # what is done once a process is not timed
    taken: dict[str, dict[int, list[float]]] = {arm: {n: [] for n in depths} for arm in ARMS}
    jobs = [(layers, arm) for _ in range(rounds) for layers in depths for arm in ARMS]
    for layers, arm in track(jobs, description="nets"):
        model = Chain(layers)
        begun = time.process_time()
        ARMS[arm](model, images)
        taken[arm][layers].append(time.process_time() - begun)
    return taken


def markdown(taken: dict[str, dict[int, list[float]]], rounds: int) -> str:
    """The table, and the power of the depth that the time grows with over its second half."""
    medians = {arm: {n: statistics.median(s) for n, s in by.items()} for arm, by in taken.items()}
    depths = list(medians["leanify"])
    rows = [["layers", *(f"{arm}, s" for arm in ARMS), "leanify, ms a layer", "ratio"]]
    for layers in depths:
        ours, plain = (medians[arm][layers] for arm in ARMS)
        cells = [
            f"{statistics.median(s):.3f} [{min(s):.3f}-{max(s):.3f}]"
            for s in (taken[arm][layers] for arm in ARMS)
        ]
        rows.append([str(layers), *cells, f"{1e3 * ours / layers:.2f}", f"{ours / plain:.2f}"])
    lines = [
        "# How the time of leanify grows",
        f"```\n{command_line()}\n```",
        f"{machine()}; CPU seconds, 1 thread; median, least and greatest of {rounds} rounds.",
        markdown_table(rows),
    ]
    if len(depths) > 1:
        low, high = depths[-2:]
        powers = [
            f"{arm} {math.log(times[high] / times[low]) / math.log(high / low):.2f}"
            for arm, times in medians.items()
        ]
        lines.append(
            f"From {low} to {high} layers the time grows with the depth to the power of: "
            f"{', '.join(powers)}. Linear growth is 1."
        )
    return "\n\n".join(lines) + "\n"


def main() -> None:
    """Time, and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", default="100,200,500,1000,2000", help="separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="runs/bench_leanify")
    args = parser.parse_args()
    depths = sorted(whole_numbers("layers", args.layers, 2))
    check_int("rounds", args.rounds, 1)
    torch.set_num_threads(1)
    folder = make_folder(args.out)
    taken = measure(depths, args.rounds)
    text = markdown(taken, args.rounds)
    figure, (ax,) = new_figure(6, 4, 1, 1)
    for index, (arm, by_depth) in enumerate(taken.items()):
        times = [statistics.median(each) for each in by_depth.values()]
        ax.plot(list(by_depth), times, "o-", color=colour(index), label=arm, markersize=4)
    ax.set(xlabel="layers", ylabel="CPU time, s", xlim=(0, None), ylim=(0, None))
    ax.legend(frameon=False)
    with replacing(folder / "bench_leanify.png") as part:
        figure.savefig(part, format="png", dpi=150)
    write_text(folder / "bench_leanify.md", text)
    print(text)
    print(f"bench_leanify.md and bench_leanify.png are in {folder}/")


if __name__ == "__main__":
    run_script(main)
