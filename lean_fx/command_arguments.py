"""The arguments of the command line, and the models and inputs that they stand for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lean_fx
from lean_fx.errors import ArgumentError, one_line, one_line_with_type
from lean_fx.importing import import_object, split_place

_EXAMPLES = """examples:
  lean_fx plan torchvision.models:resnet18 --input 1,3,224,224
  lean_fx leanify my_nets:make --input 1,3,96,96 --channels 10 -o net.safetensors --onnx net.onnx
  lean_fx compare baseline.onnx net.onnx
  lean_fx ablate study.toml
"""


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a command; ``command`` is its name.

    Args:
        arguments: behind the program's name; None takes those of this process.

    Raises:
        SystemExit: they are wrong, with status 2; or help or the version was asked for, with 0.
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.command == "leanify":
        _check_outputs(parser, args)
    return args


def _check_outputs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not (args.out or args.onnx):
        parser.error("leanify: give -o FILE.safetensors, --onnx FILE.onnx, or both")
    if args.out and args.onnx and os.path.realpath(args.out) == os.path.realpath(args.onnx):
        parser.error(f"leanify: -o and --onnx both name {args.out}; give two files")
    if args.onnx and not args.input:
        parser.error(
            "leanify: --onnx needs the shape of an example input; give --input 1,3,224,224"
        )


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
    reduced = commands.add_parser("leanify", help="reduce a model and write it to files")
    for command in (shown, reduced):
        _add_model_options(command)
    reduced.add_argument("-o", "--out", metavar="FILE", help="weights and plan, *.safetensors")
    reduced.add_argument("--onnx", metavar="FILE", help="an ONNX file of the reduced model")

    timed = commands.add_parser("compare", help="time ONNX files side by side")
    timed.add_argument("files", nargs="+", metavar="FILE", help="the first is the baseline")
    timed.add_argument(
        "--input", action="append", metavar="SHAPE", help="for each input; else those of the file"
    )
    timed.add_argument("--threads", type=int, default=1)
    timed.add_argument("--rounds", type=int, default=30)
    timed.add_argument("--no-kernel", action="store_true", help="run LEAN nodes by their function")
    ablated = commands.add_parser("ablate", help="run an ablation that a TOML file describes")
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


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of :func:`~lean_fx.plan` and :func:`~lean_fx.leanify`."""
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


def model_and_inputs(args: argparse.Namespace) -> tuple[nn.Module, tuple[Tensor, ...] | None]:
    """The model that is named, and example inputs of the shapes given; None without shapes.

    Raises:
        ArgumentError: one of them cannot be made.
    """
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
            f"{place}: cannot be made ({one_line_with_type(error)}); give a module, "
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


def onnx_inputs(file: str, shapes: Sequence[str] | None) -> dict[str, Any]:
    """Inputs for a file by name: of the shapes given, or of its own, each free size being 1.

    Raises:
        ArgumentError: there is not one shape for each input, or one cannot be made.
        DataError: ONNX Runtime cannot load the file.
    """
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
