"""The paper's experiment on STL-10: 96x96 colour pictures, 5000 to train on and 8000 to test.

Trains the paper's net, the LEAN net and a narrower net of the same parameter count; exports all
three to ONNX, times them in ONNX Runtime on the CPU, and meters the energy of training and testing.
Reads the official binary files, MD5 checked; --download fetches them (2.6 GB) into DIR.

    python examples/stl10.py --data DIR --download

Reference: Coates, Ng, Lee: An Analysis of Single-Layer Networks in Unsupervised Feature Learning,
AISTATS 2011.
"""

import argparse

from lean_fx.experiment import comparison
from lean_fx.experiment.script import command_line, download_bar, run_script, show
from lean_fx.experiment.stl10 import stl10


def main() -> None:
    """Run the experiment and print its report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default="data", help="folder of the pictures")
    parser.add_argument("--download", action="store_true", help="fetch them if they are missing")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--channels", type=int, default=10, help="C' of every reduction")
    parser.add_argument("--reduction", default="lean", help="lean, or the name of a control")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/stl10", help="folder for the nets and the report")
    args = parser.parse_args()

    from lean_fx.experiment.training import Settings

    with download_bar("STL-10") as progress:
        data = stl10(args.data, download=args.download, progress=progress)
    arms = comparison.paper_arms(data, args.channels, args.reduction, args.seed)
    report = comparison.run(
        arms,
        data,
        Settings(epochs=args.epochs, seed=args.seed),
        args.out,
        title="LEAN on STL-10 (96x96)",
        command=command_line(),
    )
    show(report, args.out)


if __name__ == "__main__":
    run_script(main)
