"""The main job on real pictures: scikit-learn's scanned digits, 8x8, grey.

Builds a net of the paper's form, leanifies it, and trains from scratch the baseline, the LEAN net
and a narrower net of the same parameter count; exports all three to ONNX, times them in ONNX
Runtime on the CPU, and meters the energy of training and testing.

    python examples/digits.py
"""

import argparse

from lean_fx.experiment import comparison
from lean_fx.experiment.datasets import digits
from lean_fx.experiment.script import command_line, run_script, show


def main() -> None:
    """Run the experiment and print its report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--channels", type=int, default=10, help="C' of every reduction")
    parser.add_argument("--reduction", default="lean", help="lean, or the name of a control")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/digits", help="folder for the nets and the report")
    args = parser.parse_args()

    from lean_fx.experiment.training import Settings

    data = digits()
    arms = comparison.paper_arms(data, args.channels, args.reduction, args.seed)
    report = comparison.run(
        arms,
        data,
        Settings(epochs=args.epochs, seed=args.seed),
        args.out,
        title="LEAN on scanned digits (8x8)",
        command=command_line(),
    )
    show(report, args.out)


if __name__ == "__main__":
    run_script(main)
