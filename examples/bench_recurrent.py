"""What splitting a stack of recurrent layers costs, and what LEAN between its layers gives.

    python examples/bench_recurrent.py [--threads 1] [--rounds 15]

Three forms of each stack: fused (one nn.LSTM or nn.GRU), split into single layers that compute the
same, and split with a LEAN reduction before each layer but the first. A forward pass and a training
step in PyTorch, and a call of ONNX Runtime, all forms in turn; ratios to the fused form.
Writes the table to runs/bench_recurrent/bench_recurrent.md.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

import lean_fx
from lean_fx.capture.capturing import capture
from lean_fx.errors import require
from lean_fx.files import make_folder, write_text
from lean_fx.kernel import uses_kernel, what_computes
from lean_fx.measure.comparison_table import ratio_of
from lean_fx.measure.eager import time_eager
from lean_fx.measure.machines import machine
from lean_fx.measure.tables import markdown_table
from lean_fx.measure.timing import time_onnx
from lean_fx.passes import SplitLayers
from support.script import command_line, run_script

# kind, layers, hidden, bidirectional, batch
STACKS = (
    (nn.GRU, 3, 64, True, 1),
    (nn.GRU, 3, 64, True, 16),
    (nn.GRU, 3, 256, False, 16),
    (nn.LSTM, 3, 64, True, 16),
    (nn.LSTM, 3, 256, False, 1),
    (nn.LSTM, 3, 256, False, 16),
)
LENGTH, CHANNELS = 40, 40


def forms(stack: nn.RNNBase) -> dict[str, nn.Module]:
    """The stack fused, split, and reduced."""
    model = nn.Sequential(stack).eval()
    reduced = lean_fx.leanify(model, channels=16, min_channels=CHANNELS + 1)
    split = SplitLayers(["0"])(capture(model)).graph_module
    return {"fused": model, "split": split, "lean": reduced.eval()}


def main() -> None:
    """Time all, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", default="runs/bench_recurrent")
    args = parser.parse_args()
    folder = make_folder(args.out)
    torch.manual_seed(0)
    track = require("rich.progress", extra="examples", purpose="the progress bar").track

    rows = [("stack", "batch", "form", "forward", "training step", "ONNX Runtime")]
    for kind, layers, hidden, bidirectional, batch in track(STACKS, description="stacks"):
        stack = kind(CHANNELS, hidden, layers, batch_first=True, bidirectional=bidirectional)
        arms, inputs = forms(stack), (torch.randn(batch, LENGTH, CHANNELS),)
        forward, step = time_eager(arms, inputs, threads=args.threads, rounds=args.rounds)
        with tempfile.TemporaryDirectory() as temporary:
            files = {name: Path(temporary) / f"{name}.onnx" for name in arms}
            for name, arm in arms.items():
                lean_fx.export_onnx(arm, files[name], inputs)
            run = time_onnx(files, inputs[0].numpy(), threads=args.threads, rounds=args.rounds)
        directions = ", both directions" if bidirectional else ""
        for name in arms:
            cells = (
                f"{taken[name].median_ms:.2f} ms, {ratio_of(taken[name], taken['fused'])}"
                for taken in (forward, step, run)
            )
            label = f"{kind.__name__} {hidden} x {layers}{directions}"
            rows.append((label if name == "fused" else "", str(batch), name, *cells))
    text = (
        "# Stacks of recurrent layers, fused, split, and with LEAN between the layers\n\n"
        f"```\n{command_line()}\n```\n\n"
        f"{machine()}; threads {args.threads}; {LENGTH} steps of {CHANNELS} channels; LEAN keeps "
        f"16 channels, its nodes run by {what_computes(uses_kernel(None))}. Median of "
        f"{args.rounds} rounds and its ratio to the fused form, below 1 is faster, with its 95 % "
        "bootstrap interval.\n\n" + markdown_table(rows) + "\n"
    )
    print(text)
    write_text(folder / "bench_recurrent.md", text)
    print(f"written to {folder / 'bench_recurrent.md'}")


if __name__ == "__main__":
    run_script(main)
