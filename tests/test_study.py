"""Studies: what a database keeps, of one worker, of several, and of those that die."""

import json
import math
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from optuna.trial import TrialState
from torch import nn

from lean_fx.errors import ArgumentError, DataError
from lean_fx.experiment import study_worker
from lean_fx.experiment.configurations import Configuration, Space
from lean_fx.experiment.datasets import digits
from lean_fx.experiment.study import Study
from lean_fx.experiment.study_database import Row
from lean_fx.experiment.study_report import as_json, draw_fronts, front, groups, write_report
from lean_fx.experiment.training import Settings
from lean_fx.experiment.trials import Job, Outcome, TrialError, run_apart, run_here

FORK = multiprocessing.get_context("fork")
SETTINGS = Settings(epochs=2, accelerator="cpu")


def small_net(width):
    hidden = max(1, round(32 * width))
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def same_net(width):
    return small_net(1.0)


def fails(width):
    raise ValueError("no such\nnet")


def dies(width):
    os._exit(3)


def small_digits():
    data = digits()
    return type(data).of(
        "small", (data.train_x[:100], data.train_y[:100]), (data.test_x[:40], data.test_y[:40]), 10
    )


def outcome_of(configuration):
    """A figure that depends on all that a configuration is made of."""
    accuracy = (hash(configuration.key) % 1000) / 1000
    return Outcome(accuracy, 2, 1000 + hash(configuration.key) % 97, 2000, 1.0, host="here")


def untrained(job, stop):
    """Stands in for a trial: says in a file that it ran."""
    accuracies = [0.1, outcome_of(job.configuration).accuracy]
    for epoch in (1, 2):
        if stop(accuracies[:epoch]):
            break
    place = Path(job.folder).parents[1] / "ran"
    place.mkdir(exist_ok=True)
    (place / f"{os.getpid()}-{time.monotonic_ns()}").write_text(job.configuration.key)
    return outcome_of(job.configuration)


def what_ran(folder):
    return sorted(file.read_text() for file in (folder / "ran").glob("*"))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(study_worker, "run_apart", untrained)


SPACE = Space(
    arms=("baseline", "slice", "lean_damped"),
    channels=(4, 8),
    seeds=(0, 1),
    options={"damping": (0.5, 1.0)},
)


def study_in(folder, space=SPACE, **options):
    return Study(small_net, small_digits, space, folder, settings=SETTINGS, **options)


def test_a_grid_runs_each_configuration_once_and_nothing_twice(quick, tmp_path):
    rows = study_in(tmp_path).run()
    # baseline: 2 seeds; slice: 2 C' x 2 seeds; lean_damped: these x 2 dampings
    assert len(rows) == 2 + 4 + 8
    assert what_ran(tmp_path) == sorted({row.configuration.key for row in rows})
    assert [row.trial for row in study_in(tmp_path).run()] == [row.trial for row in rows]
    assert len(what_ran(tmp_path)) == len(rows)
    for row in rows:
        assert row.outcome.accuracy == outcome_of(row.configuration).accuracy


@pytest.mark.parametrize("tells", [True, False], ids=["at an epoch", "at the end"])
def test_a_worker_that_was_taken_for_dead_goes_on(tells, monkeypatch, tmp_path):
    study = study_in(tmp_path, Space(arms=("baseline", "slice")))
    asleep = []

    def sleeps(job, stop):
        if not asleep:  # and another worker gives its trial up
            database = study.database()
            (running,) = database.get_trials(states=(TrialState.RUNNING,))
            database._storage.set_trial_state_values(running._trial_id, TrialState.FAIL)
            asleep.append(job.configuration.key)
            if tells:
                stop([0.5])
        return untrained(job, stop)

    monkeypatch.setattr(study_worker, "run_apart", sleeps)
    rows = study.run()
    assert {row.configuration.arm for row in rows} == {"baseline", "slice"}
    assert [row.state for row in rows] == ["complete"] * 2


def test_another_error_of_a_worker_is_not_hidden(monkeypatch, tmp_path):
    def breaks(job, stop):
        raise ValueError("no such key")

    monkeypatch.setattr(study_worker, "run_apart", breaks)
    with pytest.raises(ValueError, match="^no such key$"):
        study_in(tmp_path, Space(arms=("baseline",))).run()


def test_a_failed_trial_is_a_row_with_its_error(monkeypatch, tmp_path):
    def sometimes(job, stop):
        if job.configuration.arm == "slice":
            raise TrialError("ValueError: no slices today")
        return outcome_of(job.configuration)

    monkeypatch.setattr(study_worker, "run_apart", sometimes)
    space = Space(arms=("baseline", "slice"))
    rows = study_in(tmp_path, space).run()
    assert {row.configuration.arm: (row.state, row.error) for row in rows} == {
        "baseline": ("complete", ""),
        "slice": ("failed", "ValueError: no slices today"),
    }
    text = write_report(study_in(tmp_path, space), rows).read_text()
    assert "1 trials complete, 0 pruned, 1 failed" in text
    assert "- slice sqrt, rate 0.001: ValueError: no slices today" in text


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_search_of_several_objectives_ends_with_as_many_as_were_asked_for(
    quick, tmp_path, sampler
):
    study = study_in(tmp_path, objectives=("accuracy", "parameters"))
    rows = study.run(6, sampler=sampler)
    assert len(rows) == 6 == len({row.configuration.key for row in rows})
    assert len(study.run(10**6, sampler=sampler)) == len(SPACE.grid())  # no more than there are
    assert len(what_ran(tmp_path)) == len(SPACE.grid())


def test_a_trial_below_the_median_is_pruned_whatever_the_objectives(monkeypatch, tmp_path):
    ran = []

    def falls_behind(job, stop):
        accuracies = [1 - 0.1 * len(ran)] * 5
        ran.append(job.configuration)
        epochs = next((e for e in range(1, 6) if stop(accuracies[:e])), 5)
        return Outcome(accuracies[0], epochs, 10, 20, 1.0)

    monkeypatch.setattr(study_worker, "run_apart", falls_behind)
    settings = Settings(epochs=5, accelerator="cpu")
    space = Space(arms=("slice",), seeds=tuple(range(8)))
    study = Study(
        small_net, small_digits, space, tmp_path, ("accuracy", "parameters"), settings=settings
    )
    rows = study.run(prune=True)
    assert [row.state for row in rows] == ["complete"] * 5 + ["pruned"] * 3
    assert rows[-1].outcome.epochs == 3


def test_retraining_takes_the_best_and_runs_nothing_twice(quick, tmp_path):
    study = study_in(tmp_path)
    study.run()
    before = len(what_ran(tmp_path))
    best = groups(study.rows())[0]
    rows = study.retrain(top=2, epochs=7, seeds=(5, 6))
    assert [row.configuration.seed for row in rows] == [5, 6, 5, 6]
    assert rows[0].configuration.name == best.name
    again = study.retrain(top=2, epochs=7, seeds=(5, 6))
    assert [row.outcome.accuracy for row in again] == [row.outcome.accuracy for row in rows]
    assert len(what_ran(tmp_path)) == before + 4


def test_the_report_is_whole(quick, tmp_path):
    study = study_in(tmp_path)
    rows = study.run()
    text = write_report(study, rows, "python ablate.py").read_text()
    assert "```\npython ablate.py\n```" in text
    assert text.count("\n| lean_damped 4, damping 0.5") == 1
    lines = (tmp_path / "study.csv").read_text().splitlines()
    assert len(lines) == 1 + len(rows)
    for name in ("fronts", "parallel"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("most", "scale"), [(2.0, "linear"), (20.0, "log")])
def test_costs_that_are_alike_are_drawn_on_a_linear_axis(most, scale):
    costs = (1.0, most)  # a logarithmic axis of 1 to 2 has labels that overlap
    rows = [
        Row(i, "complete", each, Outcome(0.5, 1, int(1000 * cost), int(1000 * cost), 1.0))
        for i, (each, cost) in enumerate(zip(Space(arms=("slice", "mean")), costs, strict=True))
    ]
    assert [axes.get_xscale() for axes in draw_fronts(groups(rows)).axes] == [scale] * 2


def test_the_standard_error_is_that_of_the_mean():
    space = Space(arms=("slice",), seeds=(0, 1, 2))
    rows = [
        Row(i, "complete", each, Outcome(accuracy, 1, 1, 1, 1.0))
        for i, (each, accuracy) in enumerate(zip(space, (0.2, 0.4, 0.9), strict=True))
    ]
    (group,) = groups(rows)
    spread = torch.tensor([0.2, 0.4, 0.9], dtype=torch.float64)
    assert math.isclose(group.accuracy, float(spread.mean()))
    assert math.isclose(group.standard_error, float(spread.std()) / math.sqrt(3))


def test_the_front_has_only_what_no_other_beats():
    points = [(3.0, 0.5), (1.0, 0.2), (2.0, 0.5), (4.0, 0.4), (5.0, 0.9)]
    assert front(points) == [(1.0, 0.2), (2.0, 0.5), (5.0, 0.9)]


def test_a_study_of_another_configuration_is_refused_and_its_trials_stay(quick, tmp_path):
    rows = study_in(tmp_path).run()
    other = study_in(tmp_path, Space(arms=("slice", "max")))
    with pytest.raises(ArgumentError, match="study 'study': was made with choices=.*, not .*; use"):
        other.run()
    assert len(study_in(tmp_path).rows()) == len(rows)


def test_a_database_that_is_not_there_is_told_without_its_password(tmp_path):
    study = study_in(tmp_path, storage="postgresql://me:secret@127.0.0.1:1/none")
    with pytest.raises(DataError, match="cannot be used as the database of a study") as caught:
        study.run()
    assert str(caught.value).startswith("postgresql://me:***@127.0.0.1:1/none: cannot be used")
    assert "secret" not in str(caught.value)
    with pytest.raises(DataError, match="storage=nonsense:"):
        study_in(tmp_path, storage="nonsense").run()


def test_bad_arguments(tmp_path):
    with pytest.raises(ArgumentError, match="make cannot be sent to another process"):
        Study(lambda width: small_net(width), small_digits, SPACE, tmp_path)
    with pytest.raises(ArgumentError, match="objective='speed' is not known; use accuracy,"):
        study_in(tmp_path, objectives=("speed",))
    with pytest.raises(ArgumentError, match="trials=3 with sampler='grid'; give a number"):
        study_in(tmp_path).run(3)
    with pytest.raises(ArgumentError, match="no trial is complete yet"):
        study_in(tmp_path).retrain()
    narrow = Space(arms=("narrow",))
    with pytest.raises(ArgumentError, match=r"make\(1.0\) and make\(0.5\) have as many parameters"):
        Study(same_net, small_digits, narrow, tmp_path, settings=SETTINGS).run()


def job_in(folder, net, **options):
    configuration = Configuration("slice", learning_rate=1e-2)
    settings = Settings(epochs=1, accelerator="cpu")
    return Job(
        configuration,
        net,
        small_digits,
        False,
        "lean",
        settings,
        folder,
        folder / "lock",
        **options,
    )


def test_a_trial_trains_counts_and_times(tmp_path):
    outcome = run_here(job_in(tmp_path, small_net, timed=True), lambda _: False)
    assert outcome.parameters == 64 * 32 + 32 + 4 * 10 + 10
    assert outcome.macs == 64 * 32 + 4 * 10
    assert outcome.epochs == 1
    assert outcome.latency_ms > 0
    assert outcome.latency_ratio > 0


def test_a_trial_runs_in_a_process_of_its_own_and_tells_each_epoch(tmp_path):
    told = []
    outcome = run_apart(job_in(tmp_path, small_net), lambda each: told.append(each) or False)
    assert told == [[outcome.accuracy]]
    assert math.isnan(outcome.latency_ms)


@pytest.mark.parametrize(
    ("net", "message"),
    [(fails, "ValueError: no such net"), (dies, "its process ended with status 3")],
)
def test_what_ends_a_trial_is_told_in_a_line(tmp_path, net, message):
    with pytest.raises(TrialError) as caught:
        run_apart(job_in(tmp_path, net), lambda _: False)
    assert str(caught.value) == message


def work_slowly(folder, storage=None, seconds=0.3):
    def slow(job, stop):
        if stop([0.1]):
            return outcome_of(job.configuration)
        time.sleep(seconds)
        return untrained(job, stop)

    study_worker.run_apart = slow
    study_in(folder, storage=storage, heartbeat=1).run()


def three_workers_of_which_one_is_killed(folder, storage=None):
    doomed = FORK.Process(target=work_slowly, args=(folder, storage, 100))
    doomed.start()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:  # until it is in mid-trial
        try:
            trials = study_in(folder, storage=storage, heartbeat=1).database().get_trials()
        except (ArgumentError, DataError):
            trials = []
        if any("accuracies" in trial.user_attrs for trial in trials):
            break
        time.sleep(0.1)
    others = [FORK.Process(target=work_slowly, args=(folder, storage)) for _ in range(2)]
    for each in others:
        each.start()
    time.sleep(1)
    os.kill(doomed.pid, signal.SIGKILL)
    doomed.join()
    for each in others:
        each.join(60)
        assert each.exitcode == 0
    rows = study_in(folder, storage=storage, heartbeat=1).rows()
    assert {row.configuration.key for row in rows} == set(SPACE.grid())
    assert len(rows) == len(SPACE.grid())
    assert {row.state for row in rows} == {"complete"}
    assert what_ran(folder) == sorted(SPACE.grid())


def test_what_a_killed_worker_was_at_another_takes_up(tmp_path):
    three_workers_of_which_one_is_killed(tmp_path)


def test_what_was_not_measured_is_null_in_json(quick, tmp_path):
    rows = study_in(tmp_path).run()
    text = json.loads(as_json(rows))
    assert [each["trial"] for each in text] == [row.trial for row in rows]
    assert text[0]["outcome"]["latency_ms"] is None


def test_workers_that_start_at_once_run_nothing_twice(tmp_path):
    workers = [FORK.Process(target=work_slowly, args=(tmp_path, None, 0.05)) for _ in range(4)]
    for each in workers:
        each.start()
    for each in workers:
        each.join(60)
        assert each.exitcode == 0
    assert what_ran(tmp_path) == sorted(SPACE.grid())
