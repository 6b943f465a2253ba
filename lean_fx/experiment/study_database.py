"""The trials of a study in an Optuna database: who has run what, and who has died."""

from __future__ import annotations

import json
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lean_fx.errors import ArgumentError, DataError, one_line, require
from lean_fx.experiment.configurations import Configuration, Space
from lean_fx.experiment.trials import Outcome

require("optuna", extra="examples", purpose="a study")
import optuna  # noqa: E402
import sqlalchemy  # noqa: E402
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback  # noqa: E402
from optuna.trial import FrozenTrial, TrialState  # noqa: E402

#: The attribute of a trial that holds the key of its configuration.
KEY = "key"
#: How often a trial is started again after its worker has died.
_RETRIES = 3
#: How often a worker tries to make the tables, while other workers may be making them.
_ATTEMPTS = 10


def open_database(
    url: str,
    name: str,
    made_with: Mapping[str, Any],
    directions: list[str],
    sampler: optuna.samplers.BaseSampler,
    heartbeat: int,
) -> optuna.Study:
    """Open a study, or begin it.

    Args:
        url: as SQLAlchemy reads it.
        name: of the study.
        made_with: what its trials have in common, in plain types.
        directions: of the objectives.
        sampler: of the trials that this process begins.
        heartbeat: seconds between the signs of life of a worker.

    Raises:
        ArgumentError: the study there was made with something else.
        DataError: the database cannot be reached, or holds something else.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for attempt in range(_ATTEMPTS):
        try:
            study = _create_study(url, name, directions, sampler, heartbeat)
            break
        except (sqlalchemy.exc.SQLAlchemyError, ImportError, RuntimeError) as error:
            # Workers that start at the same time all make the tables, and all but one fail.
            if _is_race(error) and attempt + 1 < _ATTEMPTS:
                time.sleep(random.uniform(0.1, 0.5))
                continue
            raise DataError(
                f"{_without_password(url)}: cannot be used as the database of a study "
                f"({one_line(error)}); check that it is there, or leave storage out for a file"
            ) from error
    made_with = json.loads(json.dumps(made_with))
    before = study.user_attrs.get("made_with")
    if before is None:
        study.set_user_attr("made_with", made_with)
    elif before != made_with:
        key = next(key for key in made_with if before.get(key) != made_with[key])
        raise ArgumentError(
            f"study {name!r}: was made with {key}={before.get(key)!r}, not {made_with[key]!r}; "
            "use that again, or give another name"
        )
    return study


def _create_study(
    url: str,
    name: str,
    directions: list[str],
    sampler: optuna.samplers.BaseSampler,
    heartbeat: int,
) -> optuna.Study:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = RDBStorage(
            url,
            engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {},
            heartbeat_interval=heartbeat,
            grace_period=3 * heartbeat,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(_RETRIES),
        )
        return optuna.create_study(
            storage=storage,
            study_name=name,
            directions=directions,
            sampler=sampler,
            load_if_exists=True,
        )


def _is_race(error: BaseException) -> bool:
    text = str(error).lower()
    return any(sign in text for sign in ("already exists", "unique", "duplicate"))


def _without_password(url: str) -> str:
    try:
        return str(sqlalchemy.engine.make_url(url).render_as_string(hide_password=True))
    except sqlalchemy.exc.ArgumentError:
        return f"storage={url.partition(':')[0]}:..."


def run_one(
    study: optuna.Study, objective: Callable[[optuna.Trial], Any], caught: type[Exception]
) -> None:
    """Run one trial; drop its result if another worker has taken it over and finished it.

    Args:
        study: the study.
        objective: what is run.
        caught: an exception that makes the trial fail, and is not raised here.
    """
    lost = False

    def run(trial: optuna.Trial) -> Any:
        nonlocal lost
        try:
            return objective(trial)
        finally:
            lost = study.get_trials(deepcopy=False)[trial.number].state.is_finished()

    try:
        study.optimize(run, n_trials=1, catch=(caught,))
    except ValueError:  # Optuna cannot finish a trial twice
        if not lost:
            raise


def free_stale_trials(study: optuna.Study) -> None:
    """Queue the trials of workers that have died."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)


def configured_key(trial: FrozenTrial, space: Space) -> str | None:
    """The key of a trial's configuration, which is known once the trial is queued."""
    if KEY in trial.user_attrs:
        return str(trial.user_attrs[KEY])
    chosen = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    if chosen.keys() != space.choices.keys():
        return None
    return space.configuration(chosen).key


def is_done(trial: FrozenTrial) -> bool:
    """Whether the trial itself has ended, not only its worker."""
    return trial.state.is_finished() and (
        trial.state != TrialState.FAIL or "error" in trial.user_attrs
    )


def twin_of(study: optuna.Study, space: Space, number: int, key: str) -> FrozenTrial | None:
    """An earlier trial of an equal configuration that is running or done."""
    for trial in study.get_trials(deepcopy=False):
        if trial.number >= number or trial.user_attrs.get("copy_of") is not None:
            continue
        if (trial.state == TrialState.RUNNING or is_done(trial)) and (
            configured_key(trial, space) == key
        ):
            return trial
    return None


@dataclass(frozen=True)
class Known:
    """The configurations of a study's trials, by key.

    Attributes:
        done: complete, pruned or failed.
        running: that a worker is running, or was running when it died.
        waiting: how many trials are queued.
        keys: all of them.
    """

    done: frozenset[str]
    running: frozenset[str]
    waiting: int
    keys: frozenset[str]

    @classmethod
    def of(cls, study: optuna.Study, space: Space) -> Known:
        """Read them from the database."""
        done, running, waiting = set(), set(), set()
        queued = 0
        for trial in study.get_trials(deepcopy=False):
            key = configured_key(trial, space)
            if trial.state == TrialState.WAITING:
                queued += 1
            if key is None or trial.user_attrs.get("copy_of") is not None:
                continue
            if trial.state == TrialState.WAITING:
                waiting.add(key)
            elif trial.state == TrialState.RUNNING:
                running.add(key)
            elif is_done(trial):
                done.add(key)
        return cls(frozenset(done), frozenset(running), queued, frozenset(done | running | waiting))


def is_behind(database: optuna.Study, accuracies: Sequence[float]) -> bool:
    """Whether a trial is below the median of the others after as many epochs.

    Optuna's own pruners take only one objective.
    """
    epoch = len(accuracies)
    others = [
        trial.user_attrs["accuracies"][epoch - 1]
        for trial in database.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(trial.user_attrs.get("accuracies", ())) >= epoch
    ]
    return epoch >= 3 and len(others) >= 5 and accuracies[-1] < statistics.median(others)


@dataclass(frozen=True)
class Row:
    """A trial and its result.

    Attributes:
        trial: its number in the study.
        state: ``"complete"``, ``"pruned"`` or ``"failed"``; or ``"retrained"`` by
            :meth:`~lean_fx.experiment.study.Study.retrain`, then ``trial`` counts only these.
        configuration: of the model.
        outcome: what was measured; None of a trial that failed.
        error: of a trial that failed, in one line.
    """

    trial: int
    state: str
    configuration: Configuration
    outcome: Outcome | None = None
    error: str = ""


def rows_of(study: optuna.Study, space: Space) -> list[Row]:
    """The finished trials, in their order; a configuration that came again is there once."""
    rows = []
    for trial in study.get_trials(deepcopy=False):
        if trial.user_attrs.get("copy_of") is not None or not trial.state.is_finished():
            continue
        if "outcome" not in trial.user_attrs and "error" not in trial.user_attrs:
            continue  # its worker died; the trial was taken up under another number
        error = trial.user_attrs.get("error", "")
        outcome = trial.user_attrs.get("outcome")
        rows.append(
            Row(
                trial.number,
                "failed" if error else trial.state.name.lower(),
                space.configuration(trial.params),
                Outcome(**outcome) if outcome else None,
                error,
            )
        )
    return rows
