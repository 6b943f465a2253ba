"""How fast LEAN runs in ONNX Runtime: the paper's net against the same net with a free reduction.

    python examples/bench_onnx.py [--threads 1] [--rounds 40] [--steps 20]

The free reduction is a slice of the first channels. The passes are LEAN without all that is small:
its three products and four sums over x alone (their values mean nothing), which bound the speed of
every form that makes them with these operators. All nets are trained for some steps on noise, so
that their weights are not a fresh draw; every round times all files in turn. Writes the table to
runs/bench_onnx/bench_onnx.md. All of it is about the function in the file; examples/bench_kernel.py
times the kernel.
"""

import argparse
import tempfile
from pathlib import Path

import onnx
import torch
from torch import nn

import lean_fx
from lean_fx.errors import require
from lean_fx.files import make_folder, write_text
from lean_fx.measure.machines import machine
from lean_fx.measure.timing import time_onnx
from support.models import PaperNet
from support.script import command_line, run_script

NETS = (((50, 100, 150), 10), ((48, 96, 144), 8))


def trained(model: nn.Module, steps: int) -> nn.Module:
    """The model after some steps of Adam on noise."""
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(steps):
        images, labels = torch.rand(16, 3, 96, 96), torch.randint(10, (16,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


def keep_passes(path: Path, out: Path) -> None:
    """Write the file anew with functions that only pass over ``x`` as LEAN does."""
    model = onnx.load(path)
    for function in model.functions:
        preserved, reducible = map(int, function.overload.partition("_")[0].split("x"))
        bare = onnx.parser.parse_function(f"""
            <domain: "{function.domain}", opset_import: ["": {function.opset_import[0].version}]>
            {function.name} <matrix_shape, output_shape> (x, seed) => (out) {{
              matrix_shape = Constant <value_ints: ints = @matrix_shape> ()
              output_shape = Constant <value_ints: ints = @output_shape> ()
              ones = Constant <value = float[1, {preserved}] {{{"1," * (preserved - 1)}1}}> ()
              flat = Constant <value_ints = [0, {preserved}, -1]> ()
              summed = Constant <value_ints = [0, 1, {reducible}, -1]> ()
              k = Constant <value_ints = [2]> ()
              X = Reshape (x, matrix_shape)
              X_flat = Reshape (X, flat)
              X_sum = MatMul (ones, X_flat)
              t = Reshape (X_sum, summed)
              Xt = Mul (X, t)
              d = ReduceSum (Xt, k)
              Xd = Mul (X, d)
              Xd_flat = Reshape (Xd, flat)
              Xd_sum = MatMul (ones, Xd_flat)
              u = Reshape (Xd_sum, summed)
              Xu = Mul (X, u)
              y = ReduceSum (Xu, k)
              out = Reshape (y, output_shape)
            }}""")
        del function.node[:]
        function.node.extend(bare.node)
    onnx.save(model, out)


def main() -> None:
    """Train, export, time, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=20, help="training steps before the export")
    parser.add_argument("--out", default="runs/bench_onnx")
    args = parser.parse_args()
    folder = make_folder(args.out)
    torch.manual_seed(0)
    track = require("rich.progress", extra="examples", purpose="the progress bar").track

    lines = [
        "# LEAN in ONNX Runtime\n",
        f"```\n{command_line()}\n```\n",
        f"{machine()}; threads {args.threads}; milliseconds of a call, median and quartiles of "
        f"{args.rounds} rounds; in brackets the speed, that with a slice being 1.\n",
        "| widths | channels | batch | baseline | slice | lean | passes |",
        "|---|---|---|---|---|---|---|",
    ]
    jobs = [(widths, channels, batch) for widths, channels in NETS for batch in (1, 16)]
    with tempfile.TemporaryDirectory() as temporary:
        for widths, channels, batch in track(jobs, description="nets"):
            model, images = PaperNet(widths), torch.rand(2, 3, 96, 96)
            arms = {"baseline": model}
            for name in ("slice", "lean"):
                arms[name] = lean_fx.leanify(model, images, channels=channels, reduction=name)
            files = {}
            for name, arm in arms.items():
                files[name] = Path(temporary) / f"{name}.onnx"
                lean_fx.export_onnx(trained(arm, args.steps), files[name], images)
            files["passes"] = Path(temporary) / "passes.onnx"
            keep_passes(files["lean"], files["passes"])
            inputs = torch.rand(batch, 3, 96, 96).numpy()
            taken = time_onnx(files, inputs, threads=args.threads, rounds=args.rounds, kernel=False)
            free = taken["slice"].median_ms
            cells = [
                f"{each.median_ms:.2f} [{each.q1_ms:.2f}-{each.q3_ms:.2f}] "
                f"({free / each.median_ms:.2f})"
                for each in taken.values()
            ]
            lines.append(f"| {widths} | {channels} | {batch} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    write_text(folder / "bench_onnx.md", text)
    print(f"written to {folder / 'bench_onnx.md'}")


if __name__ == "__main__":
    run_script(main)
