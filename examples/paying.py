"""What each way to keep sites gives on real architectures: all, saving, measured.

    pip install --no-deps torchvision
    python examples/paying.py [--models resnet18,vgg11] [--size 96] [--rounds 20]

Every model is reduced with channels="sqrt" and keep="all", "saving" and "measured"; the table has
the reductions, parameters and MACs of each, and its latency in ONNX Runtime on one thread at batch
1, all arms of a model timed in turn, as a ratio to the model as it is. LEAN nodes run by lean_fx's
kernel where it is built, unless --no-kernel is given. A model that is in runs/paying/paying.csv
already, of the same size, rounds and kernel, is not measured again.
"""

import argparse
import csv
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

import lean_fx
from lean_fx.errors import DataError, require
from lean_fx.files import make_folder, write_text
from lean_fx.kernel import uses_kernel, what_computes
from lean_fx.measure.costs import count_macs, count_parameters
from lean_fx.measure.machines import machine
from lean_fx.measure.timing import time_onnx
from support.script import command_line, run_script
from support.zoo_models import torchvision_models

KEEPS = ("all", "saving", "measured")
FIELDS = ("model", "size", "rounds", "kernel", "keep", "reductions", "parameters", "macs")
FIELDS += ("median_ms", "q1_ms", "q3_ms")


class Block(nn.Module):
    """A transformer block with its attention written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out, self.heads = nn.Linear(width, width), heads
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention, then the MLP, each added to what it read."""
        y = self.norm1(x)
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (self.q(y), self.k(y), self.v(y))
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    """A vision transformer: patches of 16, four blocks, mean of the tokens."""

    def __init__(self, size: int, width: int = 192, depth: int = 4, heads: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 16, 16)
        self.place = nn.Parameter(0.02 * torch.randn((size // 16) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The scores of 1000 classes."""
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def build(name: str, size: int) -> nn.Module:
    """The model, with fresh weights."""
    if name == "small_vit":
        return SmallViT(size)
    return getattr(torchvision_models(), name)(weights=None)


def measure(name: str, size: int, rounds: int, kernel: bool) -> list[dict[str, object]]:
    """The rows of one model: as it is, and with each way to keep sites."""
    torch.manual_seed(0)
    model, images = build(name, size).eval(), torch.rand(1, 3, size, size)
    arms: dict[str, nn.Module] = {"baseline": model}
    for keep in KEEPS:
        arms[keep] = lean_fx.leanify(model, images, keep=keep, kernel=kernel).eval()
    with tempfile.TemporaryDirectory() as folder:
        files = {keep: Path(folder) / f"{keep}.onnx" for keep in arms}
        for keep, arm in arms.items():
            lean_fx.export_onnx(arm, files[keep], images)
        taken = time_onnx(files, images.numpy(), rounds=rounds, kernel=kernel)
    return [
        {
            "model": name,
            "size": size,
            "rounds": rounds,
            "kernel": kernel,
            "keep": keep,
            "reductions": len(arm.meta["lean_fx.plan"].sites) if keep != "baseline" else 0,
            "parameters": count_parameters(arm),
            "macs": count_macs(arm, images),
            "median_ms": taken[keep].median_ms,
            "q1_ms": taken[keep].q1_ms,
            "q3_ms": taken[keep].q3_ms,
        }
        for keep, arm in arms.items()
    ]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of earlier runs."""
    with path.open(newline="") as stream:
        reader = csv.DictReader(stream)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != FIELDS:
        raise DataError(
            f"{path}: is not a table of examples/paying.py; move it away, or give another --out"
        )
    return rows


def markdown(rows: list[dict[str, str]], size: int, rounds: int, kernel: bool) -> str:
    """The table."""
    lines = [
        "# Plans that pay\n",
        f"```\n{command_line()}\n```\n",
        f'{machine()}; channels="sqrt", pictures of {size}x{size}, batch 1, 1 thread; latency as '
        f"median and quartiles of {rounds} rounds, weights as drawn; LEAN nodes by "
        f"{what_computes(kernel)}.\n",
        "| model | keep | reductions | parameters, million | MACs, million | latency, ms | ratio |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    base = {row["model"]: float(row["median_ms"]) for row in rows if row["keep"] == "baseline"}
    for row in rows:
        median, low, high = (float(row[key]) for key in ("median_ms", "q1_ms", "q3_ms"))
        lines.append(
            f"| {row['model']} | {row['keep']} | {row['reductions']} "
            f"| {int(row['parameters']) / 1e6:.2f} | {int(row['macs']) / 1e6:.1f} "
            f"| {median:.2f} [{low:.2f}-{high:.2f}] | {median / base[row['model']]:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is not there yet, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", default="resnet18,vgg11,densenet121,mobilenet_v2,small_vit")
    parser.add_argument("--size", type=int, default=96, help="of the pictures; a multiple of 32")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-kernel", action="store_true", help="time the function in the file")
    parser.add_argument("--out", default="runs/paying")
    args = parser.parse_args()
    kernel = uses_kernel(False if args.no_kernel else None)
    track = require("rich.progress", extra="examples", purpose="the progress bar").track
    folder = make_folder(args.out)
    path = folder / "paying.csv"
    rows = read_rows(path) if path.exists() else []
    wanted = list(dict.fromkeys(name.strip() for name in args.models.split(",")))

    def rows_of(name: str) -> list[dict[str, str]]:
        key = [name, str(args.size), str(args.rounds), str(kernel)]
        return [row for row in rows if [row[field] for field in FIELDS[:4]] == key]

    for name in track([name for name in wanted if not rows_of(name)], description="models"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lean_fx.LeanWarning)
            measured = measure(name, args.size, args.rounds, kernel)
        rows += [{key: str(value) for key, value in row.items()} for row in measured]
        text = [",".join(FIELDS), *(",".join(row[key] for key in FIELDS) for row in rows)]
        write_text(path, "\n".join(text) + "\n")
    shown = [row for name in wanted for row in rows_of(name)]
    table = markdown(shown, args.size, args.rounds, kernel)
    print(table)
    write_text(folder / "paying.md", table)
    print(f"written to {path} and {folder / 'paying.md'}")


if __name__ == "__main__":
    run_script(main)
