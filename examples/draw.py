"""A picture of models before and after leanify.

    python examples/draw.py --models torchvision/resnet18@96 --out runs/draw

Draws each model of torchvision, timm or one's own, named as in examples/zoo.py with @ and the
pixels a side, beside the same model leanified: one PNG file a model.
"""

import argparse

import lean_fx
from lean_fx.files import make_folder
from support.script import run_script
from support.zoo_models import models_at_sizes


def main() -> None:
    """Draw every model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", default="support.models:PaperNet@96")
    parser.add_argument("--channels", type=int, help="C' of every reduction; else the root")
    parser.add_argument("--out", default="runs/draw", help="folder for the pictures")
    args = parser.parse_args()
    folder = make_folder(args.out)
    for name, model, x in models_at_sizes(args.models):
        lean = lean_fx.leanify(model, x, channels=args.channels or "sqrt")
        path = folder / f"{name.partition('@')[0].replace('/', '-').replace(':', '-')}.png"
        lean_fx.draw({"before": model, "after": lean}, path, x)
        print(f"written to {path}")


if __name__ == "__main__":
    run_script(main)
