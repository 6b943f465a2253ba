"""How fast the nets of the evidence are in ONNX Runtime, timed in turn."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lean_fx
from lean_fx.experiment.budget import equal_width
from lean_fx.export.exporting import export_onnx
from lean_fx.files import write_text
from lean_fx.measure.machines import machine
from lean_fx.measure.timing import time_onnx
from support.evidence.arms import BESIDE, NETS, PARTS, Arm, Net, Part, make_net


def time_nets(parts: Sequence[Part], folder: Path, rounds: int = 30) -> None:
    """Time all nets of each part in turn; write ``latency-PART.json`` for each.

    The weights are as drawn, the inputs noise: neither changes what is computed. A call takes one
    picture on one thread. Let nothing else run meanwhile.

    Args:
        parts: whose nets.
        folder: of the files.
        rounds: samples of each net, 2 or more.
    """
    for part in parts:
        torch.manual_seed(0)
        example = torch.randn(2, 3, part.pixels, part.pixels)
        files = {}
        with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
            warnings.simplefilter("ignore", lean_fx.LeanWarning)
            for number, arm in enumerate([*_beside(part), *part.arms]):
                files[arm.name] = Path(place) / f"{number}.onnx"
                export_onnx(make_net(part, arm, example).eval(), files[arm.name], example)
            times = time_onnx(files, example[:1].numpy(), rounds=rounds)
        by = next(iter(times.values())).lean_nodes
        found = {
            "machine": machine(),
            "lean_nodes": by,
            "rounds": rounds,
            "ms": {name: [t.q1_ms, t.median_ms, t.q3_ms] for name, t in times.items()},
        }
        write_text(folder / f"latency-{part.name}.json", json.dumps(found) + "\n")
        print(f"{part.name}: {len(times)} nets timed, LEAN nodes {by}", flush=True)


def as_fast_factors(parts: Sequence[Part]) -> dict[str, float]:
    """The width of each net at which it is as fast as its ``lean_damped`` net.

    Let nothing else run meanwhile.

    Args:
        parts: whose nets.

    Returns:
        A factor of all widths for each net, by name.
    """
    found = {}
    for part in parts:
        torch.manual_seed(0)
        example, net = torch.randn(2, 3, part.pixels, part.pixels), NETS[part.net]
        of = make_net(part, Arm("lean_damped", "lean_damped", net.channels), example).eval()

        def make(factor: float, net: Net = net, pixels: int = part.pixels) -> nn.Module:
            return net.make(factor, pixels).eval()

        found[part.net] = equal_width(make, example, of=of, by="latency")
        print(f"{part.net}: {found[part.net]:.4f}", flush=True)
    return found


def _beside(part: Part) -> list[Arm]:
    """The arms that a report puts beside those of a part."""
    return [
        arm
        for other in PARTS
        if other.name == part.baseline
        for arm in other.arms
        if arm.name in BESIDE
    ]


def read_latencies(folder: Path, part: str) -> Mapping[str, Any]:
    """What :func:`time_nets` wrote of a part; empty if it has not."""
    path = folder / f"latency-{part}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def shares(found: Mapping[str, Any]) -> dict[str, float]:
    """Each net's median latency as a share of the baseline's, by arm; empty without a baseline.

    Example:
        >>> shares({"ms": {"baseline": [3.9, 4.0, 4.1], "lean": [0.9, 1.0, 1.1]}})
        {'baseline': 1.0, 'lean': 0.25}
    """
    medians = {name: quartiles[1] for name, quartiles in found.get("ms", {}).items()}
    if "baseline" not in medians:
        return {}
    return {name: median / medians["baseline"] for name, median in medians.items()}
