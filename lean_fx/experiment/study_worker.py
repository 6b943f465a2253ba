"""What a worker of a study does: it takes trials that are missing, until all are done."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lean_fx.errors import require
from lean_fx.experiment.configurations import Configuration
from lean_fx.experiment.study_database import (
    KEY,
    Known,
    free_stale_trials,
    is_behind,
    run_one,
    twin_of,
)
from lean_fx.experiment.trials import Job, Outcome, TrialError, run_apart
from lean_fx.files import make_folder, write_text

require("optuna", extra="examples", purpose="a study")
import optuna  # noqa: E402

if TYPE_CHECKING:
    from lean_fx.experiment.study import Study

#: The fields of an outcome that have other names than their objectives.
_FIELDS = {"latency": "latency_ratio", "energy": "energy_j"}


class Worker:
    """Runs trials of a study; other workers may run others at once.

    Args:
        study: what its trials have in common.
        database: of the study, with the sampler of the trials.
        prune: as in :meth:`~lean_fx.experiment.study.Study.run`.
    """

    def __init__(self, study: Study, database: optuna.Study, prune: bool) -> None:
        self._study = study
        self._database = database
        self._prune = prune
        filelock = require("filelock", extra="examples", purpose="a study")
        # SQLite gives one queued trial to two workers that ask at once.
        self._claim = filelock.FileLock(make_folder(study.folder) / ".claim.lock")

    def run(self, total: int, grid: bool, show: Callable[[int], None]) -> None:
        """Run what is missing, and wait for the trials that other workers are running.

        Args:
            total: how many configurations the study has in the end.
            grid: whether to take them from the grid, rather than from the sampler.
            show: called with the number of those that are done.
        """
        every = self._study.space.grid()
        before = -1
        while True:
            with self._claim:  # until the trial is taken
                free_stale_trials(self._database)
                known = Known.of(self._database, self._study.space)
                show(len(known.done))
                missing = [each for key, each in every.items() if key not in known.keys]
                if known.waiting or (missing and len(known.keys) < total):
                    # A sampler that has found nothing new is given something that is.
                    if not known.waiting and (grid or len(known.keys) == before):
                        self._database.enqueue_trial(random.choice(missing))
                    before = len(known.keys)
                    run_one(self._database, self._run_trial, TrialError)
                    continue
            if not known.running:
                return
            time.sleep(1)  # others are running the last ones, or have died

    def _run_trial(self, trial: optuna.Trial) -> tuple[float, ...]:
        """Run one trial, or take the values of an equal one; let other workers claim the next."""
        study = self._study
        choices = study.space.choices.items()
        chosen = {name: trial.suggest_categorical(name, each) for name, each in choices}
        configuration = study.space.configuration(chosen)
        trial.set_user_attr(KEY, configuration.key)
        earlier = self._twin(trial, configuration)
        self._claim.release()
        if earlier is not None:
            if earlier.values is None:
                raise optuna.TrialPruned
            return tuple(earlier.values)

        def stop(accuracies: Sequence[float]) -> bool:
            trial.set_user_attr("accuracies", list(accuracies))
            if self._twin(trial, configuration) is not None:
                return True
            return self._prune and is_behind(self._database, accuracies)

        job = _job_of(study, configuration, "trials", study.settings.epochs, study.held_out)
        try:
            outcome = run_apart(job, stop)
        except TrialError as error:
            trial.set_user_attr("error", str(error))
            raise
        trial.set_user_attr("outcome", _without_nan(outcome))
        shutil.rmtree(job.folder, ignore_errors=True)
        if outcome.epochs < study.settings.epochs:
            raise optuna.TrialPruned
        return tuple(getattr(outcome, _FIELDS.get(each, each)) for each in study.objectives)

    def _twin(
        self, trial: optuna.Trial, configuration: Configuration
    ) -> optuna.trial.FrozenTrial | None:
        """An earlier trial of an equal configuration; then this one is marked as its copy."""
        found = twin_of(self._database, self._study.space, trial.number, configuration.key)
        if found is not None:
            trial.set_user_attr("copy_of", found.number)
        return found


def retrained(study: Study, configuration: Configuration, epochs: int) -> Outcome:
    """Train on the whole train split and test; the outcome is kept, and is not run again.

    Raises:
        TrialError: the training failed.
    """
    job = _job_of(study, configuration, "retrained", epochs, held_out=False)
    file = make_folder(job.folder) / "outcome.json"
    if file.exists():
        return Outcome(**json.loads(file.read_text(encoding="utf-8")))
    outcome = run_apart(job, lambda _: False)
    write_text(file, json.dumps(dataclasses.asdict(outcome)))
    return outcome


def _job_of(
    study: Study, configuration: Configuration, part: str, epochs: int, held_out: bool
) -> Job:
    """What the process of a trial is given.

    Args:
        study: what its trials have in common.
        configuration: of this one.
        part: the folder, within that of the study, where its checkpoint is.
        epochs: of its training.
        held_out: as in :class:`~lean_fx.experiment.study.Study`.
    """
    name = hashlib.sha256(f"{configuration.key} {epochs}".encode()).hexdigest()[:16]
    folder = make_folder(study.folder)
    return Job(
        configuration=configuration,
        make=study.make,
        data=study.data,
        held_out=held_out,
        like=study.space.like,
        settings=dataclasses.replace(study.settings, epochs=epochs),
        folder=folder / part / name,
        lock=folder / f".timing-{socket.gethostname()}.lock",
        timed="latency" in study.objectives,
        metered="energy" in study.objectives,
    )


def _without_nan(outcome: Outcome) -> dict[str, Any]:
    """An outcome as a database's JSON takes it: what was not measured is left out."""
    values = dataclasses.asdict(outcome).items()
    return {
        name: value
        for name, value in values
        if not (isinstance(value, float) and math.isnan(value))
    }
