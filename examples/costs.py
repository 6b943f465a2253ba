"""Multiply-adds of ``costs_of`` beside those that PyTorch's counter sees, on real models.

    pip install --no-deps torchvision timm && pip install huggingface_hub safetensors pyyaml
    python examples/costs.py [--models resnet18,timm/mixer_s32_224]

Names are those of torchvision, or of timm behind "timm/"; without --models, 20 models of the two
and some small ones that show where the counts differ. The table is written to runs/costs/costs.md;
where the counts differ, it names the operators that the counter takes for no work at all.
"""

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lean_fx
from lean_fx.errors import require
from lean_fx.files import make_folder, write_text
from lean_fx.measure.tables import markdown_table
from support.models import PaperNet
from support.script import command_line, run_script

#: Each with the size of the pictures that it is counted at.
MODELS = {
    **dict.fromkeys(("alexnet", "vgg11", "resnet18", "resnext50_32x4d", "densenet121"), 64),
    **{"googlenet": 64, "inception_v3": 96, "squeezenet1_1": 64, "mobilenet_v2": 64},
    **dict.fromkeys(("mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5"), 64),
    **dict.fromkeys(("efficientnet_b0", "regnet_y_400mf", "convnext_tiny", "swin_t"), 64),
    **{"vit_b_32": 224, "timm/mixer_s32_224": 224, "timm/xcit_nano_12_p16_224": 224},
    **{"timm/tf_efficientnet_b0": 64},
}

#: Operators that do products and that FlopCounterMode has no formula for.
UNSEEN = {
    "aten::_native_multi_head_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_transformer_encoder_layer_fwd",
    "aten::_trilinear",
    "aten::mkldnn_rnn_layer",
    "aten::mv",
}


def small_models() -> dict[str, tuple[nn.Module, Tensor]]:
    """Models that show where the counts differ, each with its input."""
    lean = lean_fx.leanify(PaperNet(), torch.rand(1, 3, 96, 96), channels=10)
    return {
        "LSTM(32, 64)": (nn.LSTM(32, 64), torch.rand(9, 1, 32)),
        "GRU(32, 64)": (nn.GRU(32, 64), torch.rand(9, 1, 32)),
        "TransformerEncoderLayer(32, 4)": (
            nn.TransformerEncoderLayer(32, 4, batch_first=True),
            torch.rand(1, 9, 32),
        ),
        "PaperNet with LEAN": (lean, torch.rand(1, 3, 96, 96)),
    }


@dataclass(frozen=True)
class Counts:
    """Multiply-adds of one model, by both counts.

    Attributes:
        macs: by ``costs_of``.
        conv_macs: those of them that are convolutions'.
        seen: by FlopCounterMode, as it comes.
        conv_seen: those of them that are convolutions'.
        unseen: the operators that FlopCounterMode takes for no work.
        reductions: those of LEAN by its formula; FlopCounterMode sees only its matrix products.
        without_formula: how many nodes may do more than ``costs_of`` counts.
    """

    macs: int
    conv_macs: int
    seen: int
    conv_seen: int
    unseen: tuple[str, ...]
    reductions: int
    without_formula: int

    @property
    def reason(self) -> str:
        """Why the counts differ, if they do."""
        if self.macs == self.seen:
            return ""
        lean = f"{self.reductions:,} are LEAN's own" if self.reductions else ""
        return ", ".join(filter(None, (*self.unseen, lean)))


def build(name: str) -> nn.Module:
    """The model, with fresh weights."""
    # Without its C extension torchvision lacks these operators, and its import asks for them.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # googlenet and inception on how they draw their weights
        if name.startswith("timm/"):
            return require("timm", purpose=name).create_model(name.removeprefix("timm/"))
        return getattr(require("torchvision.models", purpose=name), name)(weights=None)


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[tuple[FlopCounterMode, set[str]]]:
    """FlopCounterMode as it comes, and the names of all operators that run."""
    counter, operators = FlopCounterMode(display=False), _Names()
    with torch.no_grad(), operators, counter:
        yield counter, operators.names


def count(model: nn.Module, inputs: Tensor) -> Counts:
    """Count one pass both ways."""
    model.eval()
    costs = lean_fx.costs_of(model, inputs)
    with watched() as (counter, operators):
        model(inputs)
    conv = counter.get_flop_counts().get("Global", {}).get(torch.ops.aten.convolution, 0)
    return Counts(
        macs=costs.macs,
        conv_macs=sum(node.macs for node in costs.nodes if "conv" in node.kind.lower()),
        seen=counter.get_total_flops() // 2,
        conv_seen=conv // 2,
        unseen=tuple(sorted(operators & UNSEEN)),
        reductions=sum(node.macs for node in costs.nodes if node.kind == "LeanReduction"),
        without_formula=len(costs.without_formula),
    )


def markdown(counted: dict[str, Counts], versions: str) -> str:
    """The table."""
    head = ("model", "MACs", "convolutions", "FlopCounterMode", "convolutions ")
    rows = [(*head, "equal", "what the counter does not see", "nodes that may do more")]
    for name, each in counted.items():
        figures = (each.macs, each.conv_macs, each.seen, each.conv_seen)
        equal = "yes" if each.macs == each.seen else "no"
        rows.append(
            (name, *(f"{x:,}" for x in figures), equal, each.reason, str(each.without_formula))
        )
    return (
        f"# Multiply-adds, counted twice\n\n```\n{command_line()}\n```\n\n{versions}; batch 1, "
        "eval mode, CPU. The first count switches fused kernels off and counts reductions by their "
        "own formula. A node may do more if it has code of its own.\n\n"
        + markdown_table(rows)
        + "\n"
    )


def main() -> None:
    """Count, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument(
        "--size", type=int, help="of the pictures; by default small, a size a model"
    )
    parser.add_argument("--out", default="runs/costs")
    args = parser.parse_args()
    track = require("rich.progress", extra="examples", purpose="the progress bar").track
    folder = make_folder(args.out)
    counted: dict[str, Counts] = {}
    for name in track([each.strip() for each in args.models.split(",")], description="models"):
        size = args.size or MODELS.get(name, 224)
        counted[name] = count(build(name), torch.rand(1, 3, size, size))
    for name, (model, inputs) in small_models().items():
        counted[name] = count(model, inputs)
    packages = [torch, *(require(name, purpose="the models") for name in ("torchvision", "timm"))]
    versions = ", ".join(f"{each.__name__} {each.__version__}" for each in packages)
    table = markdown(counted, versions)
    print(table)
    write_text(folder / "costs.md", table)
    print(f"written to {folder / 'costs.md'}")


if __name__ == "__main__":
    run_script(main)
