"""What is asked of one model of another library, and its row.

    python -m support.library_rows NAME FILE

asks one model in this process and writes the row. Asked is: does leanify make a graph of it, or
keep its class; how many of the calls that multiply 16 or more channels with weights, found by
running the model, read a reduction; does the result take another batch and another size where the
model does; does a step of training reach what it reaches in the model, with finite numbers; is it
exported where the model is.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import logging
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lean_fx.capture.example_inputs import as_inputs
from lean_fx.errors import LeanError, one_line, one_line_with_type
from lean_fx.export.exporting import export_onnx
from lean_fx.export.stored_plan import plan_of
from lean_fx.files import write_text
from lean_fx.planning.plans import Plan
from lean_fx.transform import leanify
from support.library_models import MODELS
from support.zoo_models import torchvision_models
from support.zoo_rings import reason_for
from support.zoo_sites import CallSite, find_call_sites, worth_reducing

Inputs = dict[str, Any] | tuple[Any, ...]


@dataclass
class LibraryRow:
    """What is known of one model.

    Attributes:
        model: its name.
        form: what leanify made: ``"graph"`` or ``"module"``.
        sites: the calls that multiply 16 or more channels with weights.
        reduced: those of them that read a reduction.
        module_reduced: the same with ``form="module"``.
        reasons: of the others, how often each.
        batch: ``"yes"``, ``"no: why"``, or ``"-"`` if the model takes no other.
        size: the same for larger pictures or longer sequences.
        trains: the same for a step of training.
        exports: the same for ONNX.
        seconds: that leanify took.
        ended: ``"done"``, or what went wrong.
    """

    model: str
    form: str = ""
    sites: int = 0
    reduced: int = 0
    module_reduced: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    batch: str = ""
    size: str = ""
    trains: str = ""
    exports: str = ""
    seconds: float = 0.0
    ended: str = ""


def ask_library(name: str) -> LibraryRow:
    """Ask one model; what fails becomes part of the row."""
    row = LibraryRow(name)
    try:
        torch.manual_seed(0)
        model, inputs = MODELS[name]()
        model.eval()
        places = as_inputs(inputs, model)
        sites = find_call_sites(copy.deepcopy(model), places)
    except Exception as error:
        row.ended = f"the model itself does not run: {_said(error)}"
        return row
    row.sites = sum(map(worth_reducing, sites))
    try:
        begun = time.perf_counter()
        lean = leanify(model, inputs).eval()
        row.seconds = round(time.perf_counter() - begun, 2)
        plan = plan_of(lean)
        row.form = plan.form
        left = [each for each in _worth(lean, places) if not each.reads_reduction]
        row.reduced = row.sites - len(left)
        row.reasons = dict(Counter(_reason(site, plan, model) for site in left))
        kept = leanify(model, inputs, form="module").eval()
        reads = [each.reads_reduction for each in _worth(kept, places)]
        row.module_reduced = row.sites - reads.count(False)
        row.batch = _takes(model, lean, list(_batches(inputs)))
        row.size = _takes(model, lean, list(_sizes(inputs)))
        row.trains = _trains(model, lean, inputs)
        row.exports = _exports(model, lean, inputs)
        row.ended = "done"
    except Exception as error:
        row.ended = _said(error)
    return row


def _reason(site: CallSite, plan: Plan, model: nn.Module) -> str:
    """Why a plan left a call site alone: it may know a tied weight by another of its names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    same = [name for name, each in parameters.items() if each is parameters.get(site.weight)]
    named = {each.layer for each in plan.left_alone}
    for name in same:
        if (layer := name.rpartition(".")[0]) in named:
            site = dataclasses.replace(site, layer=layer, weight=name)
    return reason_for(site, plan)


def _said(error: Exception) -> str:
    return one_line_with_type(error, 200)


def _worth(model: nn.Module, inputs: tuple[Any, ...]) -> list[Any]:
    return [each for each in find_call_sites(model, inputs) if worth_reducing(each)]


def _call(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    leaves = pytree.tree_leaves(dict(out) if isinstance(out, dict) else out)
    return [each for each in leaves if isinstance(each, Tensor)]


def _batches(inputs: Inputs) -> Iterator[Inputs]:
    """The inputs with one sample more."""
    first = next(each for each in _values(inputs) if isinstance(each, Tensor))

    def more(value: Any) -> Any:
        same = isinstance(value, Tensor) and value.dim() and len(value) == len(first)
        return torch.cat([value, value[:1]]) if same else value

    yield _each(inputs, more)


def _sizes(inputs: Inputs) -> Iterator[Inputs]:
    """The inputs with larger pictures, or longer sequences on one axis or the other."""
    ways = ((4, (2, 3)), (5, (2, 3, 4)), (2, (1,)), (3, (1,)), (3, (2,)))
    for dim, axes in ways:

        def more(value: Any, dim: int = dim, axes: tuple[int, ...] = axes) -> Any:
            if isinstance(value, Tensor) and value.dim() == dim:
                for axis in axes:
                    value = torch.cat([value, value], axis)
            return value

        changed = _each(inputs, more)
        shapes = [[v.shape for v in _values(i) if isinstance(v, Tensor)] for i in (inputs, changed)]
        if shapes[0] != shapes[1]:
            yield changed


def _values(inputs: Inputs) -> list[Any]:
    return list(inputs.values() if isinstance(inputs, dict) else inputs)


def _each(inputs: Inputs, change: Any) -> Inputs:
    if isinstance(inputs, dict):
        return {name: change(value) for name, value in inputs.items()}
    return tuple(map(change, inputs))


def _takes(model: nn.Module, lean: nn.Module, candidates: list[Inputs]) -> str:
    """Whether the result takes the first of the inputs that the model takes."""
    for inputs in candidates:
        with torch.no_grad():
            try:
                wanted = _call(copy.deepcopy(model), inputs)
            except Exception:  # the model does not take them
                continue
            try:
                found = _call(lean, inputs)
            except Exception as error:
                return f"no: {_said(error)}"
        if [each.shape for each in found] != [each.shape for each in wanted]:
            return "no: other shapes"
        return "yes"
    return "-"


def _trains(model: nn.Module, lean: nn.Module, inputs: Inputs) -> str:
    try:
        missed = _missed(copy.deepcopy(model), inputs)
    except Exception:  # it needs labels, or more
        return "-"
    try:
        new = _missed(copy.deepcopy(lean), inputs) - missed
    except Exception as error:
        return f"no: {_said(error)}"
    new = {name for name in new if name.rpartition(".reduction.")[0] + ".weight" not in missed}
    return f"no: {sorted(new)[:3]} get no gradient" if new else "yes"


def _missed(model: nn.Module, inputs: Inputs) -> set[str]:
    """The parameters that a step of training leaves without a gradient, or with no finite one."""
    torch.manual_seed(0)  # of layers that are dropped
    values = [each for each in _call(model.train(), inputs) if each.requires_grad]
    torch.stack([each.float().square().mean() for each in values]).sum().backward()  # type: ignore[no-untyped-call]
    parameters = dict(model.named_parameters())
    return {
        name
        for name, each in parameters.items()
        if each.grad is None or not bool(each.grad.isfinite().all())
    }


def _exports(model: nn.Module, lean: nn.Module, inputs: Inputs) -> str:
    with tempfile.TemporaryDirectory() as folder:
        for batch in ("dynamic", "static"):
            try:
                export_onnx(model, Path(folder) / "model.onnx", inputs, batch=batch)
            except LeanError:
                continue
            try:
                export_onnx(lean, Path(folder) / "lean.onnx", inputs, batch=batch)
            except LeanError as error:
                return f"no: {one_line(error, 200)}"
            return "yes"
    return "-"


def read_library_row(file: Path) -> LibraryRow:
    """The row in a file."""
    return LibraryRow(**json.loads(file.read_text()))


def write_library_row(row: LibraryRow, file: Path) -> None:
    """Write a row as JSON, whole or not at all.

    Raises:
        WriteError: the file cannot be written.
    """
    write_text(file, json.dumps(dataclasses.asdict(row), indent=1))


def main() -> None:
    """Ask one model in this process."""
    parser = argparse.ArgumentParser(description="Ask one model of another library.")
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torchvision_models()  # many import it, and it must be before them
    write_library_row(ask_library(args.name), args.file)


if __name__ == "__main__":
    main()
