"""How fast one reduction is: forward and backward, against the literal Algorithm 2.

    python examples/bench_reduction.py [--threads 1] [--rounds 15] [--compile]
        [--nets torchvision/mobilenet_v2@96,timm/vit_tiny_patch16_224@224]

The literal form permutes, forms X X^T for every position, normalises its columns and multiplies.
Every round runs all forms in turn; a speed is a ratio of medians. Also measured: the bytes kept
for the gradient, and a training step of the paper's net against the same net with a free reduction
(a slice of the first channels), and one of models of torchvision and timm, if --nets names some.
--compile adds compile_reductions.
Writes the table to runs/bench_reduction/bench_reduction.md.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import lean_fx
from lean_fx.errors import require
from lean_fx.files import make_folder, write_text
from lean_fx.measure.machines import machine
from lean_fx.reduction.compiling import compile_reductions
from support.models import PaperNet
from support.script import command_line, run_script
from support.zoo_models import models_at_sizes

SHAPES = (
    ((16, 96, 48, 48), 8),
    ((16, 50, 48, 48), 10),
    ((32, 256, 14, 14), 16),
    ((32, 512, 7, 7), 32),
)


def literal(x: Tensor, seed: Tensor) -> Tensor:
    """Algorithm 2 as it is written, one affinity matrix a position."""
    rows = torch.unflatten(x.movedim(1, -1), -1, (seed.shape[0], -1))
    affinity = rows @ rows.mT
    walk = affinity / affinity.abs().sum(-2, keepdim=True).clamp_min(1e-30)
    y = (walk @ seed.unsqueeze(-1)).squeeze(-1)
    return (y / y.abs().sum(-1, keepdim=True).clamp_min(1e-30)).movedim(-1, 1)


def seconds(forms: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each form in each round, all forms in turn."""
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():
        form()
        form()
    for number in range(rounds):
        names = list(forms)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            forms[name]()
            taken[name].append(time.perf_counter() - start)
    return taken


def spread(values: list[float]) -> str:
    """Median and quartiles, in milliseconds."""
    low, middle, high = (1e3 * value for value in statistics.quantiles(values, n=4))
    return f"{middle:.2f} [{low:.2f}-{high:.2f}]"


def reduction_forms(
    shape: tuple[int, ...], channels: int, signed: bool, compiled: bool
) -> dict[str, Callable[[], None]]:
    """Forward and backward of one reduction, in every form."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    x = (x if signed else x.relu()).requires_grad_()
    seed = torch.randn(channels, requires_grad=True)
    grad = torch.randn(shape[0], channels, *shape[2:])

    def ours(x: Tensor, seed: Tensor) -> Tensor:
        return lean_fx.lean_reduction(x, seed, nonnegative=not signed)

    forms = {"literal": literal, "lean_fx": ours}
    if compiled:
        forms["lean_fx, compiled"] = torch.compile(ours, isolate_recompiles=True)

    def run(form: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def step() -> None:
            x.grad = seed.grad = None
            form(x, seed).backward(grad)

        return step

    return {name: run(form) for name, form in forms.items()}


def kept_bytes(shape: tuple[int, ...], channels: int) -> float:
    """What is kept for the gradient, in bytes of x."""
    x, kept = torch.rand(shape).requires_grad_(), []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.nbytes) or tensor, lambda tensor: tensor
    )
    with hooks:
        lean_fx.lean_reduction(x, torch.randn(channels), nonnegative=True)
    return sum(kept) / x.nbytes


def step_forms(
    model: nn.Module, images: Tensor, channels: int | str, compiled: bool
) -> dict[str, Callable[[], None]]:
    """A training step of a net with each reduction."""
    with torch.no_grad():
        labels = torch.randint(model.eval()(images).shape[1], (len(images),))

    def step(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.Adam(model.train().parameters())

        def run() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

        return run

    arms = {
        name: lean_fx.leanify(model, images, channels=channels, reduction=name)
        for name in ("slice", "lean")
    }
    forms = {"baseline": step(model)} | {name: step(arm) for name, arm in arms.items()}
    if compiled:
        lean = lean_fx.leanify(model, images, channels=channels)
        forms["lean, compiled"] = step(compile_reductions(lean))
    return forms


def main() -> None:
    """Measure all, print the tables, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="measure compiled reductions too")
    parser.add_argument("--nets", default="", help="names of the zoo, each with @ and a size")
    parser.add_argument("--out", default="runs/bench_reduction")
    args = parser.parse_args()
    folder = make_folder(args.out)
    torch.set_num_threads(args.threads)
    track = require("rich.progress", extra="examples", purpose="the progress bar").track

    lines = [
        "# One LEAN reduction, forward and backward",
        f"```\n{command_line()}\n```",
        f"{machine()}; threads {args.threads}; median and quartiles of {args.rounds} rounds, ms; "
        "in brackets the speed against the literal form.\n",
    ]
    jobs = [(signed, shape, c) for signed in (False, True) for shape, c in SHAPES]
    gains: dict[tuple[bool, str], list[float]] = {}
    rows = []
    for signed, shape, channels in track(jobs, description="reductions"):
        taken = seconds(reduction_forms(shape, channels, signed, args.compile), args.rounds)
        base = statistics.median(taken["literal"])
        cells = []
        for name, values in taken.items():
            gain = base / statistics.median(values)
            gains.setdefault((signed, name), []).append(gain)
            cells.append(f"{spread(values)} ({gain:.1f}x)")
        kept = "" if signed else f"{kept_bytes(shape, channels):.2f}"
        sign = "any" if signed else ">= 0"
        rows.append(f"| {list(shape)} to {channels} | {sign} | {' | '.join(cells)} | {kept} |")
    names = list(taken)
    lines.append(f"| x | sign | {' | '.join(names)} | kept, of x |")
    lines.append("|---" * (len(names) + 3) + "|")
    lines += rows
    lines.append("\nGeometric means: ")
    for (signed, name), values in gains.items():
        mean = math.prod(values) ** (1 / len(values))
        lines.append(f"- {name}, {'any sign' if signed else '>= 0'}: {mean:.1f}x")

    lines.append("\n# A training step, batch 16\n")
    lines.append("In brackets the speed, that with a slice being 1.\n")
    images = torch.randn(16, 3, 96, 96)
    nets: list[tuple[str, nn.Module, Tensor, int | str]] = [
        (f"the paper's, {widths} to {channels}", PaperNet(widths), images, channels)
        for widths, channels in (((50, 100, 150), 10), ((48, 96, 144), 8))
    ]
    nets += [(*each, "sqrt") for each in models_at_sizes(args.nets, 16)]
    rows = []
    for title, model, images, channels in track(nets, description="steps"):
        taken = seconds(step_forms(model, images, channels, args.compile), args.rounds)
        free = statistics.median(taken["slice"])
        cells = " | ".join(
            f"{spread(values)} ({free / statistics.median(values):.2f})"
            for values in taken.values()
        )
        rows.append(f"| {title} | {cells} |")
    lines.append(f"| net | {' | '.join(taken)} |")
    lines.append("|---" * (len(taken) + 1) + "|")
    lines += rows
    text = "\n".join(lines) + "\n"
    print(text)
    write_text(folder / "bench_reduction.md", text)
    print(f"written to {folder / 'bench_reduction.md'}")


if __name__ == "__main__":
    run_script(main)
