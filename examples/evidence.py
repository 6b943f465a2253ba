"""The evidence on accuracy: LEAN forms, controls and narrower nets, each at its own learning rate.

On STL-10, from scratch: the paper's net at 96x96, a small residual and a small densely connected
net at 32x32, other settings of LEAN on the paper's net, a small VGG and a small MLP-Mixer at 24x24,
and the paper's net with flips and shifts.
Every arm first tries four learning rates (two in "settings") on a fixed fifth of the training
pictures held out; the best one is then run on all of them with three seeds and tested after every
epoch. Each run leaves one small file in --out; what is there is not run again, so that the same
command goes on where it was stopped.

    python examples/evidence.py --data DIR                 # train what is missing
    python examples/evidence.py --as-fast                  # widths of the nets of equal latency
    python examples/evidence.py --latency                  # time the nets; nothing else may run
    python examples/evidence.py --report                   # tables and pictures of what is there
    python examples/evidence.py --throughput --data random # how long the steps take here
    python examples/evidence.py --smoke --data random      # every arm once, tiny

Reference: Coates, Ng, Lee: An Analysis of Single-Layer Networks in Unsupervised Feature Learning,
AISTATS 2011.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import torch

from lean_fx.checks import whole_numbers
from lean_fx.errors import ArgumentError
from lean_fx.files import make_folder
from support.evidence.arms import PARTS, Part, smoke_parts
from support.evidence.pictures import Pictures
from support.evidence.runs import Planner
from support.evidence.training import Settings
from support.evidence.workers import work
from support.script import run_script

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Train, or report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", default="data", help="folder or .npz of the pictures, or random")
    parser.add_argument("--out", help="folder of the runs (default: runs/evidence)")
    parser.add_argument("--parts", default="", help=f"of {','.join(p.name for p in PARTS)}")
    parser.add_argument("--arms", default="", help="names, separated by commas; default: all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--later-seeds", default="", help="run once all else is there")
    parser.add_argument("--epochs", type=int, help="in place of each part's own")
    parser.add_argument("--search-epochs", type=int, help="likewise")
    parser.add_argument("--minutes", type=float, default=1e6, help="no run starts after so many")
    parser.add_argument("--grace", type=float, default=1.0, help="minutes more for those begun")
    parser.add_argument("--workers", type=int, default=1, help="processes; 0 for only this one")
    parser.add_argument("--together", type=int, default=4, help="runs side by side in a process")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="of each process on a CPU")
    parser.add_argument("--no-graph", action="store_true", help="run operation by operation")
    parser.add_argument("--no-tf32", action="store_true", help="float32 throughout")
    parser.add_argument("--commit", default="", help="of the code; to report, one or more")
    parser.add_argument("--smoke", action="store_true", help="every arm once, tiny")
    parser.add_argument("--throughput", action="store_true", help="time only the steps")
    parser.add_argument("--latency", action="store_true", help="time the nets in ONNX Runtime")
    parser.add_argument("--as-fast", action="store_true", help="find the nets of equal latency")
    parser.add_argument("--report", action="store_true", help="tables and pictures of --out")
    parser.add_argument("--results", default=str(ROOT / "examples/results/evidence"))
    args = parser.parse_args()
    folder = Path(args.out or ("runs/evidence-smoke" if args.smoke else "runs/evidence"))
    if args.report:
        from support.evidence.summary import report

        print(report(folder, args.results, args.commit))
        return
    parts = _parts(args)
    if args.latency or args.as_fast:
        from support.evidence.latency import as_fast_factors, time_nets

        if args.as_fast:
            as_fast_factors(parts)
        else:
            time_nets(parts, make_folder(folder))
        return
    settings = Settings(
        data=args.data,
        folder=make_folder(folder).resolve(),
        device=args.device,
        graph=not args.no_graph,
        tf32=not args.no_tf32,
        workers=args.workers,
        limit=256 if args.smoke else None,
        threads=args.threads or (1 if args.device == "cuda" else 0),
    )
    if args.throughput:
        from support.evidence.throughput import throughput

        throughput(parts, settings)
        return
    if settings.workers:
        Pictures(settings.data, settings.limit)  # here, rather than in each process, it fails
    planner = Planner(
        parts,
        settings.folder,
        args.commit or _commit(),
        whole_numbers("seeds", "0" if args.smoke else args.seeds, 0),
        whole_numbers("later-seeds", args.later_seeds, 0) if args.later_seeds else (),
        args.together,
    )
    deadline = time.monotonic() + 60 * args.minutes
    work(planner, settings, deadline, deadline + 60 * args.grace)


def _parts(args: argparse.Namespace) -> tuple[Part, ...]:
    parts = smoke_parts() if args.smoke else PARTS
    known = {part.name: part for part in parts}
    names = [name for name in args.parts.split(",") if name] or list(known)
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ArgumentError(f"parts: {wrong[0]!r} is not known; use {', '.join(known)}")
    arms = {name for name in args.arms.split(",") if name}
    return tuple(
        replace(
            part,
            epochs=args.epochs or part.epochs,
            search_epochs=args.search_epochs or part.search_epochs,
            arms=tuple(arm for arm in part.arms if not arms or arm.name in arms),
        )
        for part in (known[name] for name in names)
    )


def _commit() -> str:
    command = ["git", "rev-parse", "--short=10", "HEAD"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("LEAN_FX_COMMIT", "unknown")
    return found.stdout.strip()


if __name__ == "__main__":
    run_script(main)
