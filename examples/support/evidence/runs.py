"""A run, its file, the choice of a learning rate, and which runs are next."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lean_fx.files import write_text
from support.evidence.arms import LIMIT, Arm, Part

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One training: what it is known by, and so what its file is called.

    Args:
        part: name of the part.
        arm: name of the arm.
        rate: the highest learning rate.
        seed: of the weights and the order of the pictures.
        epochs: how many.
        split: ``"validation"`` or ``"test"``.
        commit: of the code.
    """

    part: str
    arm: str
    rate: float
    seed: int
    epochs: int
    split: str
    commit: str

    @property
    def file(self) -> str:
        """The name of its file.

        Example:
            >>> Run("paper", "lean_gated 5/5", 0.001, 0, 50, "test", "abc").file
            'paper-lean_gated_5_5-test-0.001-s0-e50-abc.json'
        """
        arm = re.sub(r"[^A-Za-z0-9_+]", "_", self.arm)
        return (
            f"{self.part}-{arm}-{self.split}-{self.rate:g}-s{self.seed}-e{self.epochs}-"
            f"{self.commit}.json"
        )


@dataclass(frozen=True)
class Bundle:
    """Runs that differ only in rate and seed, to be trained side by side."""

    part: Part
    arm: Arm
    runs: tuple[Run, ...]
    graph: bool = True
    note: str = ""

    @property
    def cost(self) -> float:
        """Rough seconds, for the expected end."""
        return sum(cost_of(self.part, self.arm, run) for run in self.runs)


def cost_of(part: Part, arm: Arm, run: Run) -> float:
    """Rough seconds of a run."""
    heavy = part.heavy if not arm.reduction and not arm.control else 1.0
    # An epoch of a search trains on 4,000 of 5,000 pictures and judges 1,000 in place of 8,000.
    return part.seconds * heavy * run.epochs * (0.6 if run.split == "validation" else 1.0)


def write_result(folder: Path, run: Run, result: Result) -> None:
    """Write the file of a run, whole or not at all."""
    write_text(folder / run.file, json.dumps({**asdict(run), **result}) + "\n")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All files of a folder that can be read."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(result, dict) and {"part", "arm", "rate", "split"} <= result.keys():
            found.append(result)
    return found


def score(result: Result) -> float:
    """What a rate is chosen by: accuracy in validation, the mean of the last three epochs."""
    last = result["test_accuracy"][-3:]
    return float(sum(last) / len(last))


def chosen_rate(results: Iterable[Result]) -> float | None:
    """The learning rate of the best run of a search; of equal ones the lowest.

    Args:
        results: the runs of one arm on the validation pictures.

    Returns:
        None if no run went well.

    Example:
        >>> chosen_rate([{"rate": 0.1, "test_accuracy": [0.5]}, {"rate": 1, "error": "no"}])
        0.1
    """
    best = sorted((-score(result), result["rate"]) for result in results if not result.get("error"))
    return float(best[0][1]) if best else None


class Planner:
    """Which runs are next: the searches of a part, then its runs that count, part by part.

    Args:
        parts: in order of worth.
        folder: of the files.
        commit: of the code.
        seeds: of the runs that count.
        later: seeds that are run for all parts once everything else is there.
        together: the most runs of a bundle.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        folder: Path,
        commit: str,
        seeds: Sequence[int] = (0, 1, 2),
        later: Sequence[int] = (),
        together: int = 4,
    ) -> None:
        self._parts, self._folder, self._commit = parts, folder, commit
        self._seeds, self._later, self._together = tuple(seeds), tuple(later), together
        self._given: set[Run] = set()  # in this session
        self._results: dict[Run, dict[str, Any]] = {}
        for result in read_results(folder):
            if not result.get("error"):
                self.add(result)

    def add(self, result: dict[str, Any]) -> None:
        """Take note of a run that has ended, well or not."""
        run = Run(**{key: result[key] for key in Run.__dataclass_fields__})
        self._results[run] = result
        self._given.add(run)

    def next(self) -> Bundle | None:
        """The next runs that can start now; None if there are none, for the time being."""
        for part, kind, seeds in self._stages():
            for arm in part.arms:
                runs = self._searches(part, arm) if kind == "search" else None
                if runs is None:
                    runs = self._finals(part, arm, seeds)
                open_ = [run for run in runs if run not in self._given][: self._together]
                if open_:
                    self._given.update(open_)
                    return Bundle(part, arm, tuple(open_))
        return None

    def left(self) -> float:
        """Rough seconds of all runs that have no result yet."""
        total = 0.0
        for part, kind, seeds in self._stages():
            for number, arm in enumerate(part.arms):
                if kind == "search":
                    runs = self._searches(part, arm)
                else:
                    runs = self._finals(part, arm, seeds)
                    if not runs and not self._searched(part) and number < (part.best or 99):
                        runs = [self._final(part, arm, 0.0, seed) for seed in seeds]
                total += sum(cost_of(part, arm, run) for run in runs if run not in self._results)
        return total

    def _stages(self) -> list[tuple[Part, str, tuple[int, ...]]]:
        stages = []
        for part in self._parts:
            stages += [(part, "search", ()), (part, "final", self._seeds)]
        if self._later:
            stages += [(part, "final", self._later) for part in self._parts]
        return stages

    def _searches(self, part: Part, arm: Arm) -> list[Run]:
        return [
            Run(part.name, arm.name, rate, 0, part.search_epochs, "validation", self._commit)
            for rate in arm.rates
        ]

    def _final(self, part: Part, arm: Arm, rate: float, seed: int) -> Run:
        return Run(part.name, arm.name, rate, seed, part.epochs, "test", self._commit)

    def _searched(self, part: Part) -> bool:
        runs = [run for arm in part.arms for run in self._searches(part, arm)]
        return all(run in self._results for run in runs)

    def _finals(self, part: Part, arm: Arm, seeds: Sequence[int]) -> list[Run]:
        """The runs of an arm that count; none while its rate is not chosen."""
        runs = self._searches(part, arm)
        if any(run not in self._results for run in runs):
            return []
        if part.best is not None and arm not in self._best(part):
            return []
        rate = chosen_rate(self._results[run] for run in runs)
        return [] if rate is None else [self._final(part, arm, rate, seed) for seed in seeds]

    def _best(self, part: Part) -> list[Arm]:
        """The arms that did best in validation and are small enough, once all are searched."""
        if not self._searched(part):
            return []
        scores: list[tuple[float, str]] = []
        for arm in part.arms:
            results = [self._results[run] for run in self._searches(part, arm)]
            good = [each for each in results if not each.get("error")]
            if good and good[0]["parameters"] <= LIMIT:
                scores.append((-max(score(each) for each in good), arm.name))
        names = [name for _, name in sorted(scores)[: part.best]]
        return [arm for arm in part.arms if arm.name in names]
