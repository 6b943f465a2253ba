"""How far noise moves the outputs of a net with each registered reduction.

    python examples/sensitivity.py [--draws 3] [--out runs/sensitivity]

The paper's net, a ResNet and a DenseNet, untrained, in the mode of training, as
examples/evidence.py trains them: noise of a thousandth on standard normal pictures, and the
relative change of the outputs over that of the pictures (lean_fx.sensitivity). The table has the
median over the draws of the weights, as a ratio to the net without reductions.
"""

import argparse
import statistics
import warnings

import torch

import lean_fx
from lean_fx.files import make_folder, write_text
from support.evidence.arms import PARTS, Arm, Part, make_net
from support.script import command_line, run_script

NETS = {"paper": "the paper's, 96x96", "resnet": "ResNet, 32x32", "densenet": "DenseNet, 32x32"}


def measured(part: Part, reduction: str, draws: int) -> list[float]:
    """The sensitivity of a net, by its draws."""
    found = []
    for seed in range(draws):
        torch.manual_seed(seed)
        pictures = torch.randn(32, 3, part.pixels, part.pixels)
        channels = 10 if part.net == "paper" else 0.25
        net = make_net(part, Arm(reduction or "baseline", reduction, channels), pictures[:2])
        found.append(lean_fx.sensitivity(net, pictures))
    return found


def shown(value: float) -> str:
    """A number with two digits or more.

    Example:
        >>> shown(0.8312), shown(25123.4)
        ('0.83', '25,123')
    """
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description="noise on the inputs, with each reduction")
    parser.add_argument("--draws", type=int, default=3, help="of the weights")
    parser.add_argument("--out", default="runs/sensitivity", help="folder for the table")
    args = parser.parse_args()
    warnings.simplefilter("ignore", lean_fx.LeanWarning)
    parts = [each for each in PARTS if each.name in NETS]
    whole = {part.name: measured(part, "", args.draws) for part in parts}
    lines = [
        "# Noise on the inputs",
        "",
        f"```\n{command_line()}\n```",
        "",
        f"{args.draws} draws of the weights, torch {torch.__version__}; by how much noise of a "
        "thousandth moves the outputs, relative to itself: the first row as it is, the others in "
        "multiples of the first (median of the draws, least and most in brackets).",
        "",
        f"| reduction | {' | '.join(NETS[part.name] for part in parts)} |",
        f"|---|{'---:|' * len(parts)}",
        f"| none | {' | '.join(f'{shown(statistics.median(whole[p.name]))}' for p in parts)} |",
    ]
    for reduction in lean_fx.reductions():
        cells = []
        for part in parts:
            pairs = zip(measured(part, reduction, args.draws), whole[part.name], strict=True)
            ratios = [mine / theirs for mine, theirs in pairs]
            middle, least, most = map(shown, (statistics.median(ratios), min(ratios), max(ratios)))
            cells.append(f"{middle} [{least} - {most}]")
        lines.append(f"| {reduction} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    file = make_folder(args.out) / "sensitivity.md"
    write_text(file, "\n".join(lines) + "\n")
    print(f"the table is in {file}")


if __name__ == "__main__":
    run_script(main)
