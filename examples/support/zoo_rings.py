"""What is asked of one model of the zoo, ring by ring, from the inside out.

1. baseline: it can be built and runs; its call sites are counted;
2. captured: :func:`lean_fx.capture.capturing.capture` gives a graph;
3. leanified: :func:`lean_fx.leanify` ends, the model itself is untouched;
4. runs: at the example batch, at another batch, and at another resolution where the baseline does;
5. trains: one step of SGD reaches every parameter;
6. quick: leanify takes at most 3 times as long as torch.fx's own trace with shapes;
7. exported: ONNX Runtime gives what the module gives, where the baseline can be exported;
8. cheaper: fewer multiply-adds;
9. faster: less time in ONNX Runtime.

    python -m support.zoo_rings NAME FILE [--upto RING]

asks one model in this process, and writes the row after every ring.
"""

from __future__ import annotations

import argparse
import copy
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lean_fx.capture.capturing import capture
from lean_fx.errors import LeanError, one_line, one_line_with_type
from lean_fx.export.exporting import export_onnx
from lean_fx.export.parity import difference
from lean_fx.export.stored_plan import plan_of
from lean_fx.measure.costs import count_macs, count_parameters
from lean_fx.measure.timing import time_onnx
from lean_fx.planning.plans import Plan
from lean_fx.transform import leanify
from support.zoo_models import build, fitting_images, why_not
from support.zoo_rows import RINGS, Ring, Row, write_row
from support.zoo_sites import CallSite, find_call_sites, worth_reducing
from support.zoo_times import time_leanify


def run_rings(name: str, rings: Sequence[str], save: Callable[[Row], None]) -> Row:
    """Ask a model, ring by ring; what its code raises becomes part of the row.

    Args:
        name: as in :mod:`~support.zoo_models`.
        rings: the first of ``RINGS``, in order.
        save: called with the row before and after every ring.
    """
    row, subject = Row(name), _Subject(name)
    for ring in rings:
        row.rings[ring] = Ring("running")
        save(row)
        begun = time.perf_counter()
        row.rings[ring] = _run(ring, subject, row)
        row.rings[ring].seconds = round(time.perf_counter() - begun, 4)
    row.ended = "done"
    save(row)
    return row


class _Skipped(Exception):  # noqa: N818
    """A ring does not apply."""


class _Failed(Exception):  # noqa: N818
    """A ring does not hold."""


@dataclass
class _Subject:
    """What a ring leaves for the next."""

    name: str
    model: nn.Module | None = None
    images: Tensor = field(default_factory=lambda: torch.empty(0))
    expected: Any = None
    sites: list[CallSite] = field(default_factory=list)
    lean: nn.Module | None = None
    files: dict[str, Path] = field(default_factory=dict)
    folder: Any = None

    def both(self) -> tuple[nn.Module, nn.Module]:
        """The model and the reduced one."""
        if self.model is None or self.lean is None:
            raise _Skipped("there is no reduced model")
        return self.model, self.lean


def _run(ring: str, subject: _Subject, row: Row) -> Ring:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _ASKED[ring](subject, row)
    except _Skipped as reason:
        return Ring("skip", str(reason))
    except (_Failed, LeanError) as error:
        return Ring("fail", one_line(error))
    except Exception as error:  # whatever a model's own code, torch or a pass may raise
        return Ring("crash", one_line_with_type(error))
    return Ring("ok")


def _baseline(subject: _Subject, row: Row) -> None:
    model = build(subject.name)
    subject.images = fitting_images(model)
    subject.expected = _outputs(model, subject.images)
    subject.sites = find_call_sites(model, (subject.images,))
    subject.model = model
    row.numbers["size"] = subject.images.shape[-1]
    row.numbers["parameters"] = count_parameters(model)
    row.numbers["calls"] = len(subject.sites)
    row.numbers["sites"] = sum(map(worth_reducing, subject.sites))
    row.numbers["sites_reduced"] = 0
    row.reasons = {"the model is not leanified": int(row.numbers["sites"])}
    row.numbers |= {f"{k}_calls": n for k, n in Counter(s.kind for s in subject.sites).items()}


def _captured(subject: _Subject, row: Row) -> None:
    if subject.model is None:
        raise _Skipped("there is no baseline")
    capture(subject.model, (subject.images,))


def _leanified(subject: _Subject, row: Row) -> None:
    if subject.model is None:
        raise _Skipped("there is no baseline")
    lean: Any = leanify(subject.model, subject.images)
    subject.lean = lean.eval()
    plan = plan_of(lean)
    left = [
        site
        for site in find_call_sites(lean, (subject.images,))
        if worth_reducing(site) and not site.reads_reduction
    ]
    row.numbers["reductions"] = len(plan.sites)
    row.numbers["sites_reduced"] = max(0, int(row.numbers["sites"]) - len(left))
    row.numbers["parameters_lean"] = count_parameters(lean)
    row.reasons = dict(Counter(reason_for(site, plan) for site in left))
    again = _outputs(subject.model, subject.images)
    for before, after in zip(subject.expected, again, strict=True):
        if difference(before, after) > 1e-5:
            raise _Failed("the model itself gives something else after leanify")


def reason_for(site: CallSite, plan: Plan) -> str:
    """Why a plan left a call site alone, without names and numbers, so that it can be counted.

    Example:
        >>> from lean_fx.skip_reason import LeftAlone
        >>> from lean_fx.skip_reason import SkipReason
        >>> left = LeftAlone("conv", "Conv2d", SkipReason("nothing_to_reduce", "in_channels=1"))
        >>> reason_for(CallSite("conv", "conv", 64, 4), Plan("Net", (), (left,)))
        'in_channels=N'
    """
    known = {each.layer: each.reason.text for each in plan.left_alone}
    parts = site.layer.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    names.insert(0, site.weight)  # a weight of no layer
    reason = next((known[name] for name in names if name in known), "")
    if not reason:  # a call with no parameter has the name of its node
        calls = (each.reason.text for each in plan.left_alone if each.kind.startswith(site.kind))
        reason = next(calls, f"{site.kind}: the plan does not name it")
    reason = re.sub(r"(used elsewhere).*", r"\1", reason)
    reason = re.sub(r"^\S+ (stands between)", r"a value \1", reason)
    return re.sub(r"\b\d+", "N", reason)


def _runs(subject: _Subject, row: Row) -> None:
    model, lean = subject.both()
    images = subject.images
    _check_alike("the example inputs", subject.expected, lean, images)
    more = torch.rand(5, *images.shape[1:])
    if not why_not(model, more):
        _check_alike("batch 5", _outputs(model, more), lean, more)
    larger = torch.rand(2, 3, images.shape[2] + 32, images.shape[3] + 32)
    row.numbers["sizes"] = 1
    if not why_not(model, larger):
        row.numbers["sizes"] = 2
        _check_alike(f"size {larger.shape[-1]}", _outputs(model, larger), lean, larger)


def _check_alike(where: str, expected: list[Tensor], lean: nn.Module, images: Tensor) -> None:
    """Check that the reduced model gives the shapes of the other, and finite numbers."""
    try:
        found = _outputs(lean, images)
    except Exception as error:
        raise _Failed(f"at {where}: {one_line_with_type(error)}") from error
    wanted, given = ([tuple(each.shape) for each in values] for values in (expected, found))
    if wanted != given:
        raise _Failed(f"at {where}: its outputs are {given}, not {wanted}")
    for before, after in zip(expected, found, strict=True):
        if before.isfinite().all() and not after.isfinite().all():
            raise _Failed(f"at {where}: its outputs are not finite")


def _trains(subject: _Subject, row: Row) -> None:
    model, lean = subject.both()
    try:
        missed = _step(copy.deepcopy(model), subject.images)
    except Exception as error:
        raise _Skipped(f"the baseline cannot take a training step: {one_line(error)}") from error
    if missed is None:
        raise _Skipped("the baseline has nothing to train")
    unreached = _step(copy.deepcopy(lean), subject.images)
    if unreached is None:
        raise _Failed("it has no loss to go down")
    new = sorted(unreached - missed)
    row.numbers["unreached"] = len(new)
    if new:
        raise _Failed(f"{len(new)} parameters get no gradient: {', '.join(new[:5])}")


def _step(model: nn.Module, images: Tensor) -> set[str] | None:
    """Take a step in train mode; the parameters that it misses, None if there are no gradients."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    values = [value for value in pytree.tree_leaves(model(images)) if isinstance(value, Tensor)]
    loss = torch.stack([value.square().mean() for value in values]).sum()
    if not loss.requires_grad:
        return None
    loss.backward()  # type: ignore[no-untyped-call]
    missed = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    optimizer.step()
    return missed


def _quick(subject: _Subject, row: Row) -> None:
    model, _ = subject.both()
    times = time_leanify(model, subject.images)
    row.numbers |= times
    if "trace_s" not in times:
        raise _Skipped("torch.fx alone cannot trace it")
    ratio = times["leanify_s"] / times["trace_s"]
    if ratio > 3:
        raise _Failed(f"leanify takes {ratio:.1f} times as long as torch.fx with shapes")


def _exported(subject: _Subject, row: Row) -> None:
    model, lean = subject.both()
    subject.folder = tempfile.TemporaryDirectory()
    folder = Path(subject.folder.name)
    files = {"baseline": folder / "baseline.onnx", "lean": folder / "lean.onnx"}
    for batch in ("dynamic", "static"):
        try:
            export_onnx(model, files["baseline"], subject.images, batch=batch)
            break
        except LeanError as error:
            reason = one_line(error)
    else:
        raise _Skipped(f"the baseline cannot be exported: {reason}")
    row.numbers["dynamic_batch"] = int(batch == "dynamic")
    export_onnx(lean, files["lean"], subject.images, batch=batch)
    subject.files = files


def _cheaper(subject: _Subject, row: Row) -> None:
    model, lean = subject.both()
    _ask_for_sites(row)
    row.numbers["macs"] = count_macs(model, subject.images[:1])
    row.numbers["macs_lean"] = count_macs(lean, subject.images[:1])
    ratio = row.numbers["macs_lean"] / row.numbers["macs"]
    if ratio >= 1:
        raise _Failed(f"its multiply-adds are {ratio:.2f} of the baseline's")


def _faster(subject: _Subject, row: Row) -> None:
    if not subject.files:
        raise _Skipped("there are no two ONNX files")
    _ask_for_sites(row)
    images = subject.images[: 1 if row.numbers["dynamic_batch"] else None]
    taken = time_onnx(subject.files, images.numpy(), rounds=7)
    row.numbers["median_ms"] = taken["baseline"].median_ms
    row.numbers["median_ms_lean"] = taken["lean"].median_ms
    ratio = row.numbers["median_ms_lean"] / row.numbers["median_ms"]
    if ratio >= 1:
        raise _Failed(f"its latency is {ratio:.2f} of the baseline's")


def _ask_for_sites(row: Row) -> None:
    if not row.numbers["reductions"]:
        raise _Skipped("nothing was reduced")


def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [each for each in pytree.tree_leaves(model(images)) if isinstance(each, Tensor)]


_ASKED: dict[str, Callable[[_Subject, Row], None]] = {
    "baseline": _baseline,
    "captured": _captured,
    "leanified": _leanified,
    "runs": _runs,
    "trains": _trains,
    "quick": _quick,
    "exported": _exported,
    "cheaper": _cheaper,
    "faster": _faster,
}


def main() -> None:
    """Ask one model in this process."""
    parser = argparse.ArgumentParser(description="Ask one model of the zoo.")
    parser.add_argument("name")
    parser.add_argument("file", type=Path)
    parser.add_argument("--upto", choices=RINGS, default=RINGS[-1])
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run_rings(
        args.name,
        RINGS[: RINGS.index(args.upto) + 1],
        lambda row: write_row(row, args.file),
    )


if __name__ == "__main__":
    main()
