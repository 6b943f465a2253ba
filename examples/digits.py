"""The main job on real pictures: scikit-learn's scanned digits, 8x8, grey.

Builds a net of the paper's form, leanifies it, and trains from scratch the baseline, the LEAN net
and two narrower nets, one of the same parameter count and one as fast, each at the learning rate
that suits it best on a part of the train split; exports all to ONNX, times them in ONNX Runtime on
the CPU, and meters the energy of training and testing.

    python examples/digits.py
"""

from torch import nn

from lean_fx.experiment.datasets import digits
from lean_fx.experiment.processes import processes
from support.arms import as_fast_arm, paper_arms
from support.script import experiment_parser, run_experiment, run_script


def main() -> None:
    """Run the experiment and print its report."""
    description = __doc__.split("\n\n")[0]
    parser = experiment_parser(
        description, epochs=40, out="runs/digits", reduction="lean_gated", rate_epochs=12
    )
    args = parser.parse_args()
    data = digits()

    def arms(seed: int) -> dict[str, nn.Module]:
        made = paper_arms(data, args.channels, args.reduction, seed)
        if processes().count == 1:  # several would time one another
            _, lean, *_ = made.values()
            as_fast = as_fast_arm(data, lean, args.out, seed)
            made[f"as fast {'/'.join(map(str, as_fast.widths))}"] = as_fast
        return made

    run_experiment(data, args, title="LEAN on scanned digits (8x8)", make_arms=arms)


if __name__ == "__main__":
    run_script(main)
