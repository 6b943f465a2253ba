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
from typing import Any, TextIO

import torch
from torch import Tensor, nn

import lean_fx
from lean_fx.errors import ArgumentError, LeanError, LeanWarning, WriteError, one_line
from lean_fx.importing import import_object, split_place

_EXAMPLES = """examples:
  lean_fx plan torchvision.models:resnet18 --input 1,3,224,224
  lean_fx leanify my_nets:make --input 1,3,96,96 --channels 10 -o net.safetensors --onnx net.onnx
  lean_fx compare baseline.onnx net.onnx
  lean_fx ablate study.toml
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: behind the program's name; None takes those of this process.

    Returns:
        The exit status.
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.command == "leanify" and not (args.out or args.onnx):
        parser.error("leanify: give -o FILE.safetensors, --onnx FILE.onnx, or both")
    if args.command == "leanify" and args.out and args.onnx and _is_same(args.out, args.onnx):
        parser.error(f"leanify: -o and --onnx both name {args.out}; give two files")
    if args.command == "leanify" and args.onnx and not args.input:
        parser.error(
            "leanify: --onnx needs the shape of an example input; give --input 1,3,224,224"
        )
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("always", LeanWarning)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # the user's code may print
                result = args.run(args)
            _print(result)
        except LeanError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
    return 0


def _is_same(file: str, other: str) -> bool:
    return os.path.realpath(file) == os.path.realpath(other)


def plan(args: argparse.Namespace) -> str:
    """The plan of a model, as a table or as JSON."""
    made = lean_fx.plan(*_model_and_inputs(args), **_options(args))
    return made.to_json() if args.json else str(made)


def leanify(args: argparse.Namespace) -> str:
    """Reduce a model and write it; the plan, or a summary of what was written."""
    from lean_fx.measure.costs import count_parameters

    model, inputs = _model_and_inputs(args)
    lean = lean_fx.leanify(model, inputs, **_options(args))
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
    inputs = _onnx_inputs(args.files[0], args.input)
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
    width = max(len(file) for file in args.files)
    lines = [f"{'file':{width}}  {'kB':>9}  {'ms':>8}  {'quartiles':>17}  ratio"]
    for row in rows:
        quartiles = f"{row['q1_ms']:.3f} - {row['q3_ms']:.3f}"
        lines.append(
            f"{row['file']:{width}}  {row['bytes'] / 1000:9,.0f}  {row['median_ms']:8.3f}  "
            f"{quartiles:>17}  {row['ratio']:5.2f}"
        )
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
    lines.append(
        f"ONNX Runtime, CPU, {shapes}; threads {args.threads}, {args.rounds} rounds in turn; LEAN "
        f"nodes {rows[0]['lean_nodes']}; ratio: to the first, below 1 is faster"
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lean_fx",
        description="LEAN reductions before the layers of a PyTorch model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lean_fx {lean_fx.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    shown = commands.add_parser("plan", help="print what would be reduced, and why not more")
    shown.set_defaults(run=plan)
    reduced = commands.add_parser("leanify", help="reduce a model and write it to files")
    reduced.set_defaults(run=leanify)
    for command in (shown, reduced):
        _add_model_options(command)
    reduced.add_argument("-o", "--out", metavar="FILE", help="weights and plan, *.safetensors")
    reduced.add_argument("--onnx", metavar="FILE", help="an ONNX file of the reduced model")

    timed = commands.add_parser("compare", help="time ONNX files side by side")
    timed.set_defaults(run=compare)
    timed.add_argument("files", nargs="+", metavar="FILE", help="the first is the baseline")
    timed.add_argument(
        "--input", action="append", metavar="SHAPE", help="for each input; else those of the file"
    )
    timed.add_argument("--threads", type=int, default=1)
    timed.add_argument("--rounds", type=int, default=30)
    timed.add_argument("--no-kernel", action="store_true", help="run LEAN nodes by their function")
    ablated = commands.add_parser("ablate", help="run an ablation that a TOML file describes")
    ablated.set_defaults(run=ablate)
    ablated.add_argument("file", metavar="STUDY.toml", help="see lean_fx.experiment.study_file")
    ablated.add_argument("--workers", type=int, default=1, help="processes that run trials at once")
    for command in (shown, reduced, timed, ablated):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model", metavar="MODULE:FACTORY", help="a module, or what makes one without arguments"
    )
    command.add_argument(
        "--input",
        action="append",
        metavar="SHAPE",
        help="of an example input: 1,3,224,224, or 8,16:int64 for zeros of another dtype",
    )
    command.add_argument("--channels", default="sqrt", help="10, 0.1, sqrt or tenth")
    command.add_argument("--reduction", default="lean", help="a registered name")
    command.add_argument("--min-channels", type=int, default=16)
    command.add_argument("--round-to", type=int)
    command.add_argument("--skip", action="append", default=[], metavar="LAYER")
    command.add_argument("--keep", default="all", help="all, saving or measured")
    command.add_argument("--form", default="graph", help="graph or module")
    command.add_argument("--seed", type=int, default=0, help="of torch, for all weights")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "channels": _number(args.channels),
        "reduction": args.reduction,
        "min_channels": args.min_channels,
        "round_to": args.round_to,
        "skip": args.skip,
        "keep": args.keep,
        "form": args.form,
    }


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _model_and_inputs(args: argparse.Namespace) -> tuple[nn.Module, tuple[Tensor, ...] | None]:
    try:
        torch.manual_seed(args.seed)
    except (ValueError, RuntimeError, OverflowError) as error:
        raise ArgumentError(f"--seed {args.seed} is not an int of 64 bits; give 0") from error
    model = _model(args.model)
    return model, tuple(map(_tensor, args.input)) if args.input else None


def _model(place: str) -> nn.Module:
    """The module at ``package.module:name``, or what the factory there makes."""
    parts = split_place(place)
    if parts is None:
        raise ArgumentError(
            f"{place!r} is not a MODULE:FACTORY such as torchvision.models:resnet18"
        )
    try:
        found = import_object(*parts)
        model = found if isinstance(found, nn.Module) else found()
    except Exception as error:  # a user's own code may raise anything
        raise ArgumentError(
            f"{place}: cannot be made ({type(error).__name__}: {one_line(error)}); give a module, "
            "or what makes one without arguments"
        ) from error
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{place}: makes a {type(model).__name__}, which is not an nn.Module")
    return model


def _tensor(text: str) -> Tensor:
    """A tensor of a shape: random numbers, or zeros of the dtype behind a colon."""
    sizes, _, dtype = text.partition(":")
    kind = getattr(torch, dtype or "float32", None)
    try:
        shape = [int(size) for size in sizes.split(",")]
        if not isinstance(kind, torch.dtype) or min(shape) < 0:
            raise ValueError
    except ValueError:
        raise ArgumentError(
            f"--input {text!r} is not a shape; give 1,3,224,224, or 8,16:int64 with a dtype of "
            "torch"
        ) from None
    try:
        return (
            torch.rand(shape).to(kind) if kind.is_floating_point else torch.zeros(shape, dtype=kind)
        )
    except (RuntimeError, NotImplementedError) as error:
        raise ArgumentError(f"--input {text!r} cannot be made ({one_line(error, 100)})") from error


def _onnx_inputs(file: str, shapes: Sequence[str] | None) -> dict[str, Any]:
    """Inputs for a file by name: of the shapes given, or of its own, each free size being 1."""
    from lean_fx.export.sessions import open_session
    from lean_fx.kernel import uses_kernel

    wanted = open_session(file, Path(file), 1, kernel=uses_kernel(None)).get_inputs()
    if shapes is not None and len(shapes) != len(wanted):
        raise ArgumentError(
            f"--input is given {len(shapes)} times; {file} has {len(wanted)} inputs: "
            f"{', '.join(value.name for value in wanted)}"
        )
    kinds = {"float": "float32", "double": "float64"}  # other names are the same in torch
    inputs = {}
    for place, value in enumerate(wanted):
        own = ",".join(str(size if isinstance(size, int) else 1) for size in value.shape)
        kind = value.type.removeprefix("tensor(").removesuffix(")")
        given = shapes[place] if shapes is not None else f"{own}:{kinds.get(kind, kind)}"
        inputs[value.name] = _tensor(given).numpy()
    return inputs


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


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, LeanWarning):
        print(f"warning: {message}", file=sys.stderr)
