"""From a bundle of runs to their files."""

from __future__ import annotations

import copy
import gc
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import lean_fx
from lean_fx.errors import LeanError, one_line_with_type
from lean_fx.measure.costs import count_parameters
from support.evidence.arms import Arm, Part, make_net
from support.evidence.pictures import Pictures, Split
from support.evidence.runs import Bundle, Run, write_result
from support.evidence.steps import BATCH, Trainer, set_precision, train_together


@dataclass(frozen=True)
class Settings:
    """What all runs have in common.

    Args:
        data: see :class:`~support.evidence.pictures.Pictures`.
        folder: of the files.
        device: ``"cuda"`` or ``"cpu"``.
        graph: capture the steps where the device can.
        tf32: allow TF32 where the device has it.
        workers: processes on the device; 0 for none beside this one.
        limit: of pictures.
        threads: of each process on a CPU; 0 leaves them.
    """

    data: str
    folder: Path
    device: str = "cpu"
    graph: bool = True
    tf32: bool = True
    workers: int = 0
    limit: int | None = None
    threads: int = 0


class Bench:
    """The pictures and the device of one process; it takes bundles one after the other."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = torch.device(settings.device)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        set_precision(settings.tf32)
        self._pictures = Pictures(settings.data, settings.limit)
        self._splits: dict[tuple[str, int], Split] = {}
        self._shapes: dict[tuple[str, str], dict[str, int]] = {}
        self._last: tuple[object, torch.nn.Module] = (None, torch.nn.Module())

    def split(self, kind: str, pixels: int) -> Split:
        """A split on the device; it stays there."""
        if (kind, pixels) not in self._splits:
            self._splits[kind, pixels] = self._pictures.split(kind, pixels).to(self.device)
        return self._splits[kind, pixels]

    def facts(self) -> dict[str, Any]:
        """What a file says about all runs of this process."""
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name() if cuda else "CPU"
        return {
            "device": name,
            "torch": torch.__version__,
            "precision": "TF32" if cuda and self.settings.tf32 else "float32",
            "batch": BATCH,
            "optimizer": "Adam, betas 0.9 and 0.999, no weight decay",
            "schedule": "linear rise over 1/20 of the steps, cosine to 0 over all",
            "train_figures": "means over the epoch's own steps, made while the weights changed",
            "workers": self.settings.workers,
            "error": None,
        }

    def net(self, part: Part, arm: Arm, split: Split, seed: int) -> torch.nn.Module:
        """The net of an arm, on the CPU, its weights drawn."""
        key = (part, arm, id(split), seed)
        if self._last[0] != key:  # the rates of a search start from the same weights
            torch.manual_seed(seed)
            example = split.normalised(split.train_x[:8]).cpu()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", lean_fx.LeanWarning)
                self._last = key, make_net(part, arm, example)
        return copy.deepcopy(self._last[1])

    def trainer(self, bundle: Bundle, run: Run) -> tuple[Trainer, dict[str, int]]:
        """A run, ready to start, and what its net is."""
        part = bundle.part
        split = self.split(run.split, part.pixels)
        net = self.net(part, bundle.arm, split, run.seed)
        key = (part.name, bundle.arm.name)
        if key not in self._shapes:
            macs = lean_fx.costs_of(net, split.normalised(split.train_x[:1]).cpu()).macs
            self._shapes[key] = {"parameters": count_parameters(net), "macs": macs}
        shape = self._shapes[key]
        trainer = Trainer(
            net.to(self.device),
            split,
            rate=run.rate,
            epochs=run.epochs,
            seed=run.seed,
            augment=part.augment,
            graph=bundle.graph and self.settings.graph,
        )
        return trainer, shape

    def run(self, bundle: Bundle, after_epoch: Callable[[int], None]) -> list[dict[str, Any]]:
        """Train a bundle, and write its files once it ends."""
        start = time.perf_counter()
        made = [self.trainer(bundle, run) for run in bundle.runs]
        built = time.perf_counter()
        train_together([trainer for trainer, _ in made], bundle.runs[0].epochs, after_epoch)
        ended = time.perf_counter()
        results = []
        for run, (trainer, shape) in zip(bundle.runs, made, strict=True):
            result = {
                **asdict(run),
                **self.facts(),
                **shape,
                "pixels": bundle.part.pixels,
                "augment": bundle.part.augment,
                "graph": trainer.graph,
                "note": bundle.note,
                "side_by_side": len(made),
                "build_seconds": round(built - start, 2),
                "seconds": round(ended - built, 2),
                **asdict(trainer.history),
            }
            write_result(self.settings.folder, run, result)
            results.append(result)
        return results

    def clear(self) -> None:
        """Give the device's memory back."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def failed(settings: Settings, bundle: Bundle, text: str) -> list[dict[str, Any]]:
    """Write the files of runs that cannot be made, with their error."""
    results = []
    for run in bundle.runs:
        result = {**asdict(run), "error": text, "note": bundle.note}
        write_result(settings.folder, run, result)
        results.append(result)
    return results


def serve(connection: Any, settings: Settings) -> None:
    """Take bundles from a connection until None comes, in a process of its own.

    Answers ``("done", results)``, or ``("refused", text)`` where the net cannot be built, or
    ``("broken", text)``, after which the process ends: a device may be unusable then.
    """
    parent = os.getppid()

    def leave_if_alone(_: int) -> None:
        if os.getppid() != parent:
            os._exit(1)

    try:
        bench = Bench(settings)
        while (bundle := connection.recv()) is not None:
            connection.send(attempt(bench, bundle, leave_if_alone))
            bench.clear()
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass
    except Exception as error:
        connection.send(("broken", one_line_with_type(error)))


def attempt(
    bench: Bench, bundle: Bundle, after_epoch: Callable[[int], None] = lambda _: None
) -> tuple[str, Any]:
    """Run a bundle; the answer of :func:`serve`, but an error of the training is raised."""
    try:
        return "done", bench.run(bundle, after_epoch)
    except LeanError as error:
        return "refused", one_line_with_type(error)
