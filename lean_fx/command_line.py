"""The command line: ``lean_fx plan``, ``leanify``, ``compare`` and ``ablate``.

Each command is a call of the function of its name; it adds no meaning of its own. Results go to
stdout, lean_fx's warnings and progress to stderr. Status 0: done; 1: an error of lean_fx, in one
line; 2: the command line itself is wrong; 130: Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lean_fx
from lean_fx.command_arguments import model_and_inputs, onnx_inputs, options_of, parsed
from lean_fx.errors import ArgumentError, LeanError, LeanWarning, WriteError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: behind the program's name; None takes those of this process.

    Returns:
        The exit status.
    """
    args = parsed(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("always", LeanWarning)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # the user's code may print
                result = COMMANDS[args.command](args)
            _print(result)
        except LeanError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
    return 0


def plan(args: argparse.Namespace) -> str:
    """The plan of a model, as a table or as JSON."""
    made = lean_fx.plan(*model_and_inputs(args), **options_of(args))
    return made.to_json() if args.json else str(made)


def leanify(args: argparse.Namespace) -> str:
    """Reduce a model and write it; the plan, or a summary of what was written."""
    from lean_fx.measure.costs import count_parameters

    model, inputs = model_and_inputs(args)
    lean = lean_fx.leanify(model, inputs, **options_of(args))
    if args.out:
        lean_fx.save(lean, args.out)
    if args.onnx:
        lean_fx.export_onnx(lean, args.onnx, inputs)
    plan = lean_fx.plan_of(lean)
    counts = count_parameters(model), count_parameters(lean)
    files = [file for file in (args.out, args.onnx) if file]
    if args.json:
        return json.dumps(
            {
                "plan": json.loads(plan.to_json()),
                "parameters": counts[0],
                "parameters_reduced": counts[1],
                "files": files,
            }
        )
    return f"{plan}\n{counts[0]:,} -> {counts[1]:,} parameters, written to {' and '.join(files)}"


def compare(args: argparse.Namespace) -> str:
    """The size and the latency of ONNX files, timed in turn; the first is the baseline."""
    from lean_fx.measure.timing import time_onnx
    from lean_fx.onnx_files import onnx_bytes

    if twice := [file for file in args.files if args.files.count(file) > 1]:
        raise ArgumentError(f"compare: {twice[0]} is given twice; give another file, or a copy")
    files = {file: Path(file) for file in args.files}
    inputs = onnx_inputs(args.files[0], args.input)
    found = time_onnx(
        files,
        inputs,
        threads=args.threads,
        rounds=args.rounds,
        kernel=False if args.no_kernel else None,
        progress=_show_round if sys.stderr.isatty() else None,
    )
    base = found[args.files[0]].median_ms
    rows: list[dict[str, Any]] = [
        {
            "file": file,
            "bytes": onnx_bytes(files[file]),
            "median_ms": each.median_ms,
            "q1_ms": each.q1_ms,
            "q3_ms": each.q3_ms,
            "ratio": each.median_ms / base,
            "lean_nodes": each.lean_nodes,
        }
        for file, each in found.items()
    ]
    if args.json:
        return json.dumps(rows)
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
    note = (
        f"ONNX Runtime, CPU, {shapes}; threads {args.threads}, {args.rounds} rounds in turn; LEAN "
        f"nodes {rows[0]['lean_nodes']}; ratio: to the first, below 1 is faster"
    )
    return f"{_table(rows)}\n{note}"


def _table(rows: list[dict[str, Any]]) -> str:
    width = max(len(row["file"]) for row in rows)
    lines = [f"{'file':{width}}  {'kB':>9}  {'ms':>8}  {'quartiles':>17}  ratio"]
    for row in rows:
        quartiles = f"{row['q1_ms']:.3f} - {row['q3_ms']:.3f}"
        lines.append(
            f"{row['file']:{width}}  {row['bytes'] / 1000:9,.0f}  {row['median_ms']:8.3f}  "
            f"{quartiles:>17}  {row['ratio']:5.2f}"
        )
    return "\n".join(lines)


def ablate(args: argparse.Namespace) -> str:
    """Run what is missing of a study, and write its report."""
    from lean_fx.experiment.study_file import run_study_file
    from lean_fx.experiment.study_report import as_json, write_report

    study, rows = run_study_file(args.file, args.workers)
    report = write_report(study, rows, f"lean_fx ablate {args.file}")
    if args.json:
        return as_json(rows)
    return f"{report.read_text(encoding='utf-8')}\nwritten to {report.parent}/"


COMMANDS = {"plan": plan, "leanify": leanify, "compare": compare, "ablate": ablate}


def _print(text: str) -> None:
    """Print a result; whoever reads it may stop early, as ``head`` does.

    Raises:
        WriteError: it cannot be written, as on a full disk.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        if not isinstance(error, BrokenPipeError):
            raise WriteError(f"stdout: cannot be written ({error.strerror})") from error


def _show_round(done: int, rounds: int) -> None:
    end = "\n" if done == rounds else ""
    print(f"\rround {done} of {rounds}", end=end, file=sys.stderr, flush=True)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, LeanWarning):
        print(f"warning: {message}", file=sys.stderr)
