"""What the kernel of LEAN nodes is worth in ONNX Runtime, beside their function and a slice.

    python examples/bench_kernel.py [--threads 1] [--rounds 40] [--steps 20]
        [--reduction lean_gated] [--nets torchvision/mobilenet_v2@96,timm/vit_tiny_patch16_224@224]

First a single reduction between two 1 x 1 convolutions, then the paper's net with two sets of
widths, then models of torchvision and timm at batch 1, if --nets names some. All are trained for
some steps on noise; every round times the three in turn. The slice of the first channels is a free
reduction: no kernel is faster. Writes the table to runs/bench_kernel/bench_kernel.md.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

import lean_fx
from bench_onnx import NETS
from lean_fx.errors import require
from lean_fx.export.sessions import flushing_denormals, onnx_call
from lean_fx.files import make_folder, write_text
from lean_fx.measure.machines import machine
from lean_fx.measure.timing import Latency, time_in_turn
from lean_fx.reduction.registry import make_reduction
from support.models import PaperNet
from support.script import command_line, run_script
from support.zoo_models import models_at_sizes

#: Channels in, size of the map, channels out, whether values are never negative.
NODES = (
    *((50, 48, 10, True), (96, 48, 8, True), (150, 12, 10, True), (256, 14, 16, True)),
    *((960, 3, 30, True), (24, 24, 4, False), (64, 12, 8, False), (160, 3, 10, False)),
)


def node(channels: int, out: int, nonnegative: bool, reduction: str) -> nn.Module:
    """One reduction between convolutions."""
    act = nn.ReLU() if nonnegative else nn.Identity()
    reduced = make_reduction(reduction, channels, out, dim=1)
    if isinstance(reduced, lean_fx.LeanReduction):
        reduced.nonnegative = nonnegative
    return nn.Sequential(nn.Conv2d(channels, channels, 1), act, reduced, nn.Conv2d(out, out, 1))


def trained(model: nn.Module, inputs: torch.Tensor, steps: int) -> nn.Module:
    """The model after some steps of Adam on noise."""
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.rand_like(inputs)).square().mean().backward()
        optimizer.step()
    return model.eval()


def times(
    models: dict[str, nn.Module], inputs: torch.Tensor, threads: int, rounds: int, folder: Path
) -> dict[str, Latency]:
    """The function, the kernel and the slice, in one run."""
    files = {name: folder / f"{name}.onnx" for name in models}
    for name, model in models.items():
        lean_fx.export_onnx(model, files[name], inputs)
    feed = inputs.numpy()
    with flushing_denormals():
        calls = {
            name: onnx_call(name, files[file], feed, threads, kernel=name == "kernel")
            for name, file in (("function", "form"), ("kernel", "form"), ("slice", "slice"))
        }
        samples = time_in_turn(calls, rounds=rounds)
    return {name: Latency(each, len(inputs), threads) for name, each in samples.items()}


def row(first: str, found: dict[str, Latency]) -> str:
    """A row of the table."""
    free = found["slice"].median_ms
    cells = [
        f"{1e3 * each.median_ms:.0f} [{1e3 * each.q1_ms:.0f}-{1e3 * each.q3_ms:.0f}] "
        f"({free / each.median_ms:.2f})"
        for each in found.values()
    ]
    return f"| {first} | {' | '.join(cells)} |"


def main() -> None:
    """Train, export, time, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=20, help="training steps before the export")
    parser.add_argument("--reduction", default="lean", help="a registered form of LEAN")
    parser.add_argument("--nets", default="", help="names of the zoo, each with @ and a size")
    parser.add_argument("--out", default="runs/bench_kernel")
    args = parser.parse_args()
    folder = make_folder(args.out)
    torch.manual_seed(0)
    reductions = {"form": args.reduction, "slice": "slice"}
    track = require("rich.progress", extra="examples", purpose="the progress bar").track

    lines = [
        f"# The kernel of LEAN nodes in ONNX Runtime: {args.reduction}\n",
        f"```\n{command_line()}\n```\n",
        f"{machine()}; threads {args.threads}; microseconds of a call, median and quartiles of "
        f"{args.rounds} rounds; in brackets the speed, that with a slice being 1.\n",
        "| | function | kernel | slice |",
        "|---|---|---|---|",
    ]
    jobs: list[tuple[str, dict[str, nn.Module], torch.Tensor]] = []
    for channels, size, out, nonnegative in NODES:
        sign = "" if nonnegative else ", any sign"
        title = f"node {channels} x {size} x {size} to {out}{sign}"
        x = torch.rand(1, channels, size, size)
        arms = {arm: node(channels, out, nonnegative, name) for arm, name in reductions.items()}
        jobs.append((title, arms, x))
    for widths, channels in NETS:
        for batch in (1, 16):
            x, model = torch.rand(batch, 3, 96, 96), PaperNet(widths)
            arms = {
                arm: lean_fx.leanify(model, x, channels=channels, reduction=name)
                for arm, name in reductions.items()
            }
            jobs.append((f"net {widths}, {channels} channels, batch {batch}", arms, x))
    for title, model, x in models_at_sizes(args.nets):
        arms = {arm: lean_fx.leanify(model, x, reduction=r) for arm, r in reductions.items()}
        jobs.append((title, arms, x))
    with tempfile.TemporaryDirectory() as temporary:
        for title, arms, x in track(jobs, description="models"):
            models = {name: trained(model, x, args.steps) for name, model in arms.items()}
            lines.append(row(title, times(models, x, args.threads, args.rounds, Path(temporary))))
    text = "\n".join(lines) + "\n"
    print(text)
    write_text(folder / "bench_kernel.md", text)
    print(f"written to {folder / 'bench_kernel.md'}")


if __name__ == "__main__":
    run_script(main)
