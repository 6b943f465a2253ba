"""Architecture ablations on Optuna: a grid or a search over configurations, by many workers.

Each trial trains a model from scratch in a process of its own. The database keeps every finished
trial. If a worker is killed, another resumes its trial at the last epoch. Equal configurations run
once.
"""

from __future__ import annotations

import dataclasses
import pickle
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lean_fx.checks import check_choice, check_int, check_ints
from lean_fx.errors import ArgumentError, one_line, one_line_with_type, require
from lean_fx.experiment.budget import MakeWidth
from lean_fx.experiment.configurations import Configuration, Space, choices_of
from lean_fx.experiment.study_database import Row, open_database, rows_of
from lean_fx.experiment.study_worker import Worker, retrained
from lean_fx.experiment.training import Settings
from lean_fx.experiment.trials import Data
from lean_fx.files import make_folder
from lean_fx.measure.costs import count_parameters
from lean_fx.measure.progress import counted_bar

require("optuna", extra="examples", purpose="a study")
import optuna  # noqa: E402

#: The objectives, and the direction of each.
OBJECTIVES = {
    "accuracy": "maximize",
    "parameters": "minimize",
    "macs": "minimize",
    "latency": "minimize",
    "energy": "minimize",
}
SAMPLERS = ("grid", "random", "tpe")


@dataclass(frozen=True)
class Study:
    """An ablation: one model, one data set, and the configurations to compare.

    Args:
        make: gives the model of a width in ]0, 1], with fresh weights: a function at the top
            level of a module, so that other processes can import it.
        data: the data set or a LightningDataModule, or such a function or a class that makes it.
        space: what is chosen for a trial.
        folder: of checkpoints and reports, and of the database ``study.db``.
        objectives: one or more of ``"accuracy"``, ``"parameters"``, ``"macs"``, ``"latency"`` and
            ``"energy"``. Models are timed only for latency, and metered only for energy.
        settings: of the training; rate and seed are the space's.
        held_out: whether accuracy is that on a fifth of the train split, held out; if not, it is
            that on the test split. Choose nothing by the test split.
        storage: URL of a database that workers share, such as
            ``postgresql://user:password@host/name``. None: SQLite in the folder.
        name: of the study in the database.
        heartbeat: seconds between the signs of life of a worker, 1 or more. After three times as
            long without one, another worker takes over its trial.

    Raises:
        ArgumentError: an option is out of its range, or ``make`` or ``data`` cannot be sent to
            another process.

    Example::

        study = Study(make, digits, Space(channels=(4, 8)), "runs/study")
        for row in study.run():
            print(row.configuration.name, row.outcome)

    References:
        Akiba et al., "Optuna: A Next-generation Hyperparameter Optimization Framework", KDD 2019.
    """

    make: MakeWidth
    data: Data
    space: Space
    folder: str | Path
    objectives: tuple[str, ...] = ("accuracy",)
    settings: Settings = dataclasses.field(default_factory=Settings)
    held_out: bool = True
    storage: str | None = None
    name: str = "study"
    heartbeat: int = 60

    def __post_init__(self) -> None:
        object.__setattr__(self, "objectives", choices_of("Study: objectives", self.objectives))
        for objective in self.objectives:
            check_choice("Study: objective", objective, OBJECTIVES)
        check_int("Study: heartbeat", self.heartbeat, 1)
        check_choice("Study: held_out", self.held_out, (True, False))
        for subject, text in (("name", self.name), ("storage", self.storage or "")):
            if not isinstance(text, str):
                raise ArgumentError(f"Study: {subject}={text!r} is not a text; give one")
        for subject, value in (("make", self.make), ("data", self.data)):
            try:
                pickle.dumps(value)
            except Exception as error:  # what pickle raises is open
                raise ArgumentError(
                    f"Study: {subject} cannot be sent to another process ({one_line(error)}); "
                    "give a function at the top level of a module"
                ) from error

    def run(
        self, trials: int | None = None, *, sampler: str = "grid", prune: bool = False
    ) -> list[Row]:
        """Run what is missing; several workers may call it at once, on one machine or many.

        Args:
            trials: how many trials the study has in the end, 1 or more, and at most the grid.
                Leave it out with ``sampler="grid"``, which runs every configuration.
            sampler: ``"grid"``, ``"random"``, or ``"tpe"``, the tree-structured Parzen estimator,
                of one objective or several.
            prune: whether a trial ends early whose accuracy after an epoch, from the third on,
                lies below the median of at least five others after that epoch.

        Returns:
            All rows of the study.

        Raises:
            ArgumentError: the study there is of another configuration, or an option is out of its
                range.
            DataError: the database cannot be reached.
            SystemExit: Ctrl-C was pressed.
        """
        check_choice("Study.run: sampler", sampler, SAMPLERS)
        check_choice("Study.run: prune", prune, (True, False))
        if (trials is None) != (sampler == "grid"):
            raise ArgumentError(
                f"Study.run: trials={trials} with sampler={sampler!r}; give a number of trials, "
                "but none for a grid"
            )
        if trials is not None:
            check_int("Study.run: trials", trials, 1)
        self._check_width()
        database = self._open(sampler)
        size = len(self.space.grid())
        total = min(trials or size, size)
        try:
            with counted_bar(self.name, total) as show:
                Worker(self, database, prune).run(total, sampler == "grid", show)
                return rows_of(database, self.space)
        except KeyboardInterrupt:
            raise SystemExit("\nstopped; run the same again to go on") from None

    def database(self) -> optuna.Study:
        """The study as Optuna has it, for its own tools.

        Raises:
            ArgumentError: the study there is of another configuration.
            DataError: the database cannot be reached.
        """
        return self._open("random")

    def rows(self) -> list[Row]:
        """The finished trials, in their order; a configuration that came again is there once."""
        return rows_of(self.database(), self.space)

    def retrain(self, top: int = 3, epochs: int = 50, seeds: Sequence[int] = (0,)) -> list[Row]:
        """Train the most accurate configurations anew, on the whole train split, and test them.

        What is in ``folder/retrained`` already is not run again; the weights stay there too.
        The rows have the state ``"retrained"``.

        Args:
            top: how many configurations, seeds aside, 1 or more.
            epochs: of training, 1 or more.
            seeds: one run each.

        Raises:
            ArgumentError: no trial is complete, or a number is out of its range.
            TrialError: a training failed.
        """
        check_retrain(top, epochs, seeds)
        chosen = self._most_accurate(top)
        rows: list[Row] = []
        wanted = [dataclasses.replace(best, seed=seed) for best in chosen for seed in seeds]
        with counted_bar(f"{self.name}, retrained", len(wanted)) as show:
            for configuration in wanted:
                outcome = retrained(self, configuration, epochs)
                rows.append(Row(len(rows), "retrained", configuration, outcome))
                show(len(rows))
        return rows

    def _most_accurate(self, top: int) -> list[Configuration]:
        accuracies: dict[str, list[float]] = {}
        found = {}
        for row in self.rows():
            if row.state == "complete" and row.outcome is not None:
                key = dataclasses.replace(row.configuration, seed=0).key
                accuracies.setdefault(key, []).append(row.outcome.accuracy)
                found[key] = row.configuration
        if not found:
            raise ArgumentError(f"{self.name}: no trial is complete yet; run some first")
        ranked = sorted(found, key=lambda key: -statistics.mean(accuracies[key]))
        return [found[key] for key in ranked[:top]]

    def _check_width(self) -> None:
        """Refuse, before anything is trained, a factory that cannot give a narrower model."""
        narrow = [arm for arm in self.space.arms if arm.startswith("narrow")]
        if narrow and count_parameters(self._made(1.0)) == count_parameters(self._made(0.5)):
            raise ArgumentError(
                f"Study: make(1.0) and make(0.5) have as many parameters; {narrow[0]!r} needs a "
                "factory whose width scales the channels"
            )

    def _made(self, width: float) -> nn.Module:
        try:
            model = self.make(width)
        except Exception as error:  # the user's own code
            raise ArgumentError(
                f"Study: make({width}) fails ({one_line_with_type(error)}); give a "
                "function of a width in ]0, 1]"
            ) from error
        if not isinstance(model, nn.Module):
            raise ArgumentError(
                f"Study: make({width}) gives a {type(model).__name__}, which is not an nn.Module"
            )
        return model

    def _open(self, sampler: str) -> optuna.Study:
        folder = make_folder(self.folder)
        made = optuna.samplers.RandomSampler()
        if sampler == "tpe":
            made = optuna.samplers.TPESampler(constant_liar=True)
        return open_database(
            self.storage or f"sqlite:///{folder.resolve() / 'study.db'}",
            self.name,
            self._made_with(),
            [OBJECTIVES[objective] for objective in self.objectives],
            made,
            self.heartbeat,
        )

    def _made_with(self) -> dict[str, Any]:
        """What all trials have in common, in plain types."""
        settings = dataclasses.asdict(self.settings)
        make = getattr(self.make, "__qualname__", None)
        return {
            "choices": {name: list(each) for name, each in self.space.choices.items()},
            "like": self.space.like,
            "objectives": list(self.objectives),
            "held_out": self.held_out,
            "settings": {
                name: value
                for name, value in settings.items()
                if name not in ("learning_rate", "seed")  # those are the space's
            },
            "make": f"{self.make.__module__}.{make}" if make else type(self.make).__qualname__,
        }


def check_retrain(top: int = 3, epochs: int = 50, seeds: Sequence[int] = (0,)) -> None:
    """Check the arguments of :meth:`Study.retrain`.

    Raises:
        ArgumentError: a number is out of its range.
    """
    check_int("Study.retrain: top", top, 1)
    check_int("Study.retrain: epochs", epochs, 1)
    check_ints("Study.retrain: seeds", seeds, 0)
