"""The paper's experiment on STL-10: 96x96 colour pictures, 5000 to train on and 8000 to test.

Trains the paper's net, the LEAN net and a narrower net of the same parameter count; exports all
three to ONNX, times them in ONNX Runtime on the CPU, and meters the energy of training and testing.
Reads the official binary files, MD5 checked; --download fetches them (2.6 GB) into DIR.

    python examples/stl10.py --data DIR --download

Reference: Coates, Ng, Lee: An Analysis of Single-Layer Networks in Unsupervised Feature Learning,
AISTATS 2011.
"""

from support.script import (
    download_bar,
    experiment_parser,
    run_experiment,
    run_script,
)
from support.stl10 import stl10


def main() -> None:
    """Run the experiment and print its report."""
    parser = experiment_parser(__doc__.split("\n\n")[0], epochs=50, out="runs/stl10")
    parser.add_argument("--data", default="data", help="folder of the pictures")
    parser.add_argument("--download", action="store_true", help="fetch them if they are missing")
    args = parser.parse_args()
    with download_bar("STL-10") as progress:
        data = stl10(args.data, download=args.download, progress=progress)
    run_experiment(data, args, title="LEAN on STL-10 (96x96)")


if __name__ == "__main__":
    run_script(main)
