"""Nets for sequences on the Free Spoken Digit Dataset: 2700 recordings to train on, 300 to test.

Turns the recordings into log-mel frames and trains, from scratch and with three seeds, a stacked
bidirectional GRU, the same with LEAN before its layers, and a narrower one of the same parameter
count; exports all three to ONNX, times them in ONNX Runtime on the CPU, and meters the energy of
training and testing. --net lstm, fc and conv1d do the same with an LSTM, a fully connected and a
1-D convolutional net. --download fetches the recordings (16 MB) into DIR.

    python examples/spoken_digits.py --data DIR --download
    python examples/spoken_digits.py --data DIR --net conv1d --epochs 60

Reference: Z. Jackson and others: Free Spoken Digit Dataset, doi 10.5281/zenodo.1342401.
"""

from collections.abc import Mapping

from torch import nn

from support.arms import sequence_arms
from support.script import (
    download_bar,
    experiment_parser,
    run_experiment,
    run_script,
)
from support.sequence_nets import SEQUENCE_WIDTHS
from support.spoken_digits import spoken_digits


def main() -> None:
    """Run the experiment and print its report."""
    parser = experiment_parser(
        __doc__.split("\n\n")[0],
        epochs=20,
        out="runs/spoken_digits",
        channels=16,
        seeds="0,1,2",
        rates=(1e-3, 3e-3, 1e-2, 3e-2),
    )
    parser.add_argument(
        "--net", "--cell", default="gru", choices=SEQUENCE_WIDTHS, help="the baseline"
    )
    parser.add_argument(
        "--skip", default="linear", help="layers to leave alone, separated by commas"
    )
    parser.add_argument("--data", default="data", help="folder of the recordings")
    parser.add_argument("--download", action="store_true", help="fetch them if they are missing")
    args = parser.parse_args()
    args.out = f"{args.out}/{args.net}"
    with download_bar("Free Spoken Digit Dataset") as progress:
        data = spoken_digits(args.data, download=args.download, progress=progress)

    def make_arms(seed: int) -> Mapping[str, nn.Module]:
        skip = [name for name in args.skip.split(",") if name]
        return sequence_arms(data, args.net, args.channels, args.reduction, skip, seed)

    run_experiment(data, args, f"LEAN on spoken digits ({args.net})", make_arms)


if __name__ == "__main__":
    run_script(main)
