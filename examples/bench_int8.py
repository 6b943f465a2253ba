"""What INT8 costs and gains, by the types of activations and weights: error, accuracy and speed.

    python examples/bench_int8.py --data DIR [--steps 250] [--rounds 60]

The paper's net, its LEAN form and one with a slice in the place of LEAN are trained for some steps
on STL-10 at 48x48, exported, and quantised each way; so is the small net of the tests, untrained.
The error is the mean difference of the outputs from the float file's, as a fraction of their mean
magnitude. What saturates is the same against the twin's own numbers multiplied exactly: above 0
only on processors that saturate. Every round times all files in turn, on one thread. Writes the
table to runs/bench_int8/bench_int8.md.
"""

import argparse
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime import quantization as tools
from torch import Tensor, nn
from torch.nn import functional as F

import lean_fx
from lean_fx.errors import require
from lean_fx.experiment.datasets import Dataset
from lean_fx.files import make_folder, write_text
from lean_fx.kernel import uses_kernel, what_computes
from lean_fx.measure.machines import machine
from lean_fx.measure.timing import time_onnx
from support.models import PaperNet
from support.script import command_line, run_script
from support.stl10 import stl10

SIGNED, UNSIGNED = tools.QuantType.QInt8, tools.QuantType.QUInt8
# Activations and weights; 7 bits are a reduced range.
PAIRINGS = {
    "unsigned x signed 7 bits (portable)": (UNSIGNED, SIGNED, True),
    "unsigned x signed 8 bits (vnni)": (UNSIGNED, SIGNED, False),
    "signed x signed 7 bits": (SIGNED, SIGNED, True),
    "signed x signed 8 bits": (SIGNED, SIGNED, False),
    "unsigned x unsigned 8 bits": (UNSIGNED, UNSIGNED, False),
}


class Batches(tools.CalibrationDataReader):
    """Batches of pictures, for onnxruntime.quantization."""

    def __init__(self, pictures: Tensor) -> None:
        self.rest = iter(pictures.split(50))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, or None."""
        batch = next(self.rest, None)
        return None if batch is None else {"input": batch.numpy()}


def small(data: Dataset, pictures: Tensor) -> Tensor:
    """Pictures as the nets take them: normalised, 48x48 by means over 2x2."""
    return F.avg_pool2d(data.normalised(pictures), 2)


def trained(model: nn.Module, data: Dataset, steps: int, learning_rate: float) -> nn.Module:
    """The model after some steps of Adam, the learning rate falling to 0 along a cosine."""
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(data.train_y), (64,))
        scores = model(small(data, data.train_x[chosen]))
        optimizer.zero_grad()
        F.cross_entropy(scores, data.train_y[chosen]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def outputs(path: Path, pictures: Tensor, *, exact: bool = False) -> np.ndarray:
    """The scores that a file gives; ``exact``: without the kernels that may saturate."""
    options = onnxruntime.SessionOptions()
    if exact:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": x.numpy()})[0] for x in pictures.split(250)])


def twins(path: Path, calibration: Tensor) -> dict[str, Path]:
    """The file, and its twin by each pairing."""
    made = {"float32": path}
    for name, (activations, weights, reduced) in PAIRINGS.items():
        made[name] = path.with_name(f"{path.stem}.{len(made)}.onnx")
        tools.quantize_static(
            path,
            made[name],
            Batches(calibration),
            activation_type=activations,
            weight_type=weights,
            per_channel=True,
            reduce_range=reduced,
        )
    made["dynamic, unsigned weights"] = path.with_name(f"{path.stem}.dynamic.onnx")
    tools.quantize_dynamic(path, made["dynamic, unsigned weights"], weight_type=UNSIGNED)
    return made


def rows(
    net: str, files: dict[str, Path], images: Tensor, labels: Tensor, rounds: int
) -> list[str]:
    """The lines of the table for one net."""
    whole = outputs(files["float32"], images)
    times = {
        batch: time_onnx(files, images[:batch].numpy(), threads=1, rounds=rounds)
        for batch in (1, 16)
    }
    lines = []
    for name, file in files.items():
        found, exact = outputs(file, images), outputs(file, images, exact=True)
        size = np.abs(whole).mean()
        cells = [
            f"{np.abs(found - whole).mean() / size:.4f}",
            f"{np.abs(found - exact).mean() / size:.4f}",
            f"{100 * (found.argmax(1) == labels.numpy()).mean():.1f}",
            f"{100 * (found.argmax(1) == whole.argmax(1)).mean():.1f}",
        ]
        for taken in times.values():
            each, plain = taken[name], taken["float32"].median_ms
            cells.append(
                f"{each.median_ms:.2f} [{each.q1_ms:.2f}-{each.q3_ms:.2f}] "
                f"({each.median_ms / plain:.2f})"
            )
        lines.append(f"| {net} | {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Train, export, quantise, time, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default="data", help="folder of STL-10")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", default="runs/bench_int8")
    args = parser.parse_args()
    folder, data = make_folder(args.out), stl10(args.data)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    images, labels = small(data, data.test_x[:2000]), data.test_y[:2000]
    calibration = small(data, data.train_x[:200])
    track = require("rich.progress", extra="examples", purpose="the progress bar").track

    pictures = torch.rand(2, 3, 48, 48)
    tiny = PaperNet((16, 32, 48), image_size=48)
    arms = {
        "16/32/48 with lean, untrained": lean_fx.leanify(tiny, pictures, channels=8).eval(),
    }
    for name, rate in (("lean", 1e-2), ("slice", 1e-3), ("", 1e-3)):
        model: nn.Module = PaperNet(image_size=48)
        if name:
            model = lean_fx.leanify(model, pictures, channels=10, reduction=name)
        arms[f"paper's net{' with ' * bool(name)}{name}"] = trained(model, data, args.steps, rate)
    lines = [
        "# INT8 in ONNX Runtime\n",
        f"```\n{command_line()}\n```\n",
        f"{machine()}; 1 thread; milliseconds of a call, median and quartiles of {args.rounds} "
        "rounds, in brackets the ratio to float32; accuracy on 2,000 test pictures; "
        f"LEAN nodes by {what_computes(uses_kernel(None))}.\n",
        "| net | activations x weights | error | of it saturation | accuracy % | as float32 % "
        "| batch 1 ms | batch 16 ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        for place, (name, arm) in enumerate(track(arms.items(), description="nets")):
            path = Path(temporary) / f"{place}.onnx"
            lean_fx.export_onnx(arm, path, pictures)
            lines += rows(name, twins(path, calibration), images, labels, args.rounds)
    text = "\n".join(lines) + "\n"
    print(text)
    write_text(folder / "bench_int8.md", text)
    print(f"written to {folder / 'bench_int8.md'}")


if __name__ == "__main__":
    run_script(main)
