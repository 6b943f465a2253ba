"""The main job on real pictures: scikit-learn's scanned digits, 8x8, grey.

Builds a net of the paper's form, leanifies it, and trains from scratch the baseline, the LEAN net
and a narrower net of the same parameter count, each at the learning rate that suits it best on a
part of the train split; exports all three to ONNX, times them in ONNX Runtime on the CPU, and
meters the energy of training and testing.

    python examples/digits.py
"""

from lean_fx.experiment.datasets import digits
from support.script import experiment_parser, run_experiment, run_script


def main() -> None:
    """Run the experiment and print its report."""
    parser = experiment_parser(__doc__.split("\n\n")[0], epochs=40, out="runs/digits")
    args = parser.parse_args()
    run_experiment(digits(), args, title="LEAN on scanned digits (8x8)")


if __name__ == "__main__":
    run_script(main)
