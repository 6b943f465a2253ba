"""An ablation on the digits: one row for every reduction, number of channels and seed.

    python examples/ablate.py --channels 4,8,16 --control slice,narrow

Trains each setting from scratch and writes accuracy, parameters, MACs and ONNX Runtime latency to
a CSV file, and a picture of accuracy over parameters. Rows that are in the file already are not
run again. LEAN and the baseline are always among the settings. Controls: the registered
reductions (slice, mean, max, grouped_sum, projection, random_projection; lean_row, lean_mean,
lean_magnitude, lean_matrix, lean_damped, lean_simplex, lean_gated), and narrow, the paper's net
made narrower to the parameter count of the LEAN net.
"""

import argparse
from pathlib import Path

from lean_fx.experiment.ablation import grid, run_grid, show_rows
from lean_fx.experiment.datasets import digits
from support.arms import ablated_net
from support.script import run_script


def main() -> None:
    """Run what is missing of the grid, then print and draw all of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--channels", default="4,8,16", help="C', separated by commas")
    parser.add_argument("--control", default="slice,narrow", help="names, separated by commas")
    parser.add_argument("--seeds", default="0", help="seeds, separated by commas")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--out", default="runs/ablation", help="folder for the CSV and the picture")
    args = parser.parse_args()

    data = digits()
    settings = grid(args.channels, args.control, args.seeds, args.epochs)
    rows = run_grid(settings, data, Path(args.out), lambda setting: ablated_net(setting, data))
    show_rows(rows, Path(args.out))


if __name__ == "__main__":
    run_script(main)
