"""A study described by a TOML file, for ``lean_fx ablate``.

.. code-block:: toml

    make = "my_nets:make"        # called with a width in ]0, 1], gives the model
    data = "my_nets:data"        # gives a lean_fx.experiment.datasets.Dataset, or is the class
                                 # of a LightningDataModule
    folder = "runs/study"        # where the database and the report are
    objectives = ["accuracy", "latency"]
    sampler = "tpe"              # or random, or grid, which takes no trials
    trials = 40

    [space]
    arms = ["baseline", "narrow", "slice", "lean_damped"]
    channels = [4, 8]
    learning_rates = [1e-3, 3e-3]

    [space.options]
    damping = [0.5, 1.0]

    [settings]
    epochs = 15

    [retrain]                    # optional: the most accurate anew, and tested
    top = 3
    epochs = 50
    seeds = [0, 1, 2]

A module is looked for beside the file too. The keys are the arguments of
:class:`~lean_fx.experiment.study.Study`, its methods ``run`` and ``retrain``,
:class:`~lean_fx.experiment.configurations.Space` and
:class:`~lean_fx.experiment.training.Settings`.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lean_fx.checks import check_int
from lean_fx.errors import ArgumentError, DataError, one_line, one_line_with_type
from lean_fx.experiment.configurations import Space
from lean_fx.experiment.study import Study, check_retrain
from lean_fx.experiment.study_database import Row
from lean_fx.experiment.training import Settings
from lean_fx.importing import import_object, look_in, split_place

_RUN = ("trials", "sampler", "prune")
_RETRAIN = ("top", "epochs", "seeds")


def run_study_file(file: str | Path, workers: int = 1) -> tuple[Study, list[Row]]:
    """Run what is missing of a study, and retrain the best if the file says so.

    Args:
        file: the TOML file.
        workers: processes of this machine that run trials at once, 1 or more. Each trial uses as
            many threads as PyTorch takes, unless OMP_NUM_THREADS says otherwise.

    Returns:
        The study, and its rows, those of the retraining last.

    Raises:
        DataError: the file cannot be read, is not TOML, or the database cannot be reached.
        ArgumentError: as :func:`read_study_file`, or the study there is of another configuration,
            or ``workers`` is out of its range.
        TrialError: a training of the best failed.
    """
    check_int("workers", workers, 1)
    study, run, retrain = read_study_file(file)
    check_retrain(**retrain)  # not after the hours that the trials take
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_work, args=(str(file),)) for _ in range(workers - 1)]
    for other in others:
        other.start()
    rows = study.run(**run)  # it waits for the trials of the others
    for other in others:
        other.join()
    return study, [*rows, *study.retrain(**retrain)] if retrain else rows


def _work(file: str) -> None:
    """Run trials of a study beside the process that shows its progress."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (this process ends with it)
    study, run, _ = read_study_file(file)
    study.run(**run)


def read_study_file(file: str | Path) -> tuple[Study, dict[str, Any], dict[str, Any]]:
    """Read a study, and what its ``run`` and its ``retrain`` are called with.

    Raises:
        DataError: the file cannot be read, or is not TOML.
        ArgumentError: a key is missing or not known, a value is out of its range, or a name
            cannot be imported.
    """
    try:
        given = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({one_line(error)}); give a TOML file") from error
    space = _made(Space, f"{file}: space", given.pop("space", {}))
    settings = _made(Settings, f"{file}: settings", given.pop("settings", {}))
    retrain = _checked_names(f"{file}: retrain", given.pop("retrain", {}), _RETRAIN)
    run = {name: given.pop(name) for name in _RUN if name in given}
    look_in(str(Path(file).resolve().parent))
    for name in ("make", "data"):
        if name in given:
            given[name] = imported(f"{file}: {name}", given[name])
    fields = {**given, "space": space, "settings": settings}
    return _made(Study, str(file), fields, also=(*_RUN, "retrain")), run, retrain


def imported(subject: str, place: Any) -> Any:
    """The object at ``package.module:name``; modules in the working directory are found too.

    Raises:
        ArgumentError: there is none.
    """
    parts = split_place(str(place))
    if parts is None:
        raise ArgumentError(f"{subject}: {place!r} is not a MODULE:NAME such as my_nets:make")
    try:
        return import_object(*parts)
    except Exception as error:  # a user's own module may raise anything
        raise ArgumentError(
            f"{subject}: {place} cannot be imported ({one_line_with_type(error)})"
        ) from error


def _made(kind: Any, subject: str, given: Any, also: Iterable[str] = ()) -> Any:
    fields = dataclasses.fields(kind)
    _checked_names(subject, given, [field.name for field in fields], also)
    for field in fields:
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in given:
            raise ArgumentError(f"{subject}: {field.name!r} is missing")
    return kind(**{name: _tuples(value) for name, value in given.items()})


def _checked_names(
    subject: str, given: Any, known: Iterable[str], also: Iterable[str] = ()
) -> dict[str, Any]:
    """Check that a table has only known keys; the error names those in ``also`` too."""
    if not isinstance(given, dict):
        raise ArgumentError(f"{subject} is not a table; write [{subject.rpartition(' ')[2]}]")
    known = tuple(known)
    for name in given:
        if name not in known:
            raise ArgumentError(
                f"{subject}: {name!r} is not known; use {', '.join([*known, *also])}"
            )
    return given


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
