"""Folders that several processes write to, and what killed ones leave."""

import multiprocessing
import os
import signal
import time

import pytest

from lean_fx.experiment.ablation import Row, _with_row, read_rows
from lean_fx.files import replacing, write_text

FORK = multiprocessing.get_context("fork")


def row(seed):
    return Row("lean", 4, seed, 1, 0.5, 10, 20, 1.0, 1.0, 1.0, 1.0, "kernel")


def test_rows_of_two_processes_are_all_kept(tmp_path):
    file = tmp_path / "ablation.csv"

    def add(first):
        for seed in range(first, first + 20):
            _with_row(file, row(seed))

    processes = [FORK.Process(target=add, args=(first,)) for first in (0, 100)]
    for each in processes:
        each.start()
    for each in processes:
        each.join()
    assert {each.seed for each in read_rows(file)} == {*range(20), *range(100, 120)}


def _write_for_ever(path, text):
    while True:
        write_text(path, text)


def _killed(target, *args, after):
    process = FORK.Process(target=target, args=args)
    process.start()
    time.sleep(after)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.mark.parametrize("after", [0.02, 0.05, 0.08])
def test_a_kill_leaves_the_file_whole_and_the_next_write_cleans_up(tmp_path, after):
    path, text = tmp_path / "a.txt", "whole" * 20_000
    write_text(path, text)
    for _ in range(5):
        _killed(_write_for_ever, path, text, after=after)
        assert path.read_text() == text
    write_text(path, text)
    assert list(tmp_path.iterdir()) == [path]


def _wait_within(path, started):
    with replacing(path) as part:
        part.write_text("half")
        started.set()
        time.sleep(60)


def test_the_folder_of_a_killed_process_goes_and_that_of_a_living_one_stays(tmp_path):
    started = FORK.Event()
    process = FORK.Process(target=_wait_within, args=(tmp_path / "a.txt", started))
    process.start()
    started.wait(20)
    write_text(tmp_path / "b.txt", "text")
    assert len(list(tmp_path.glob(".a.*"))) == 1
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    write_text(tmp_path / "b.txt", "text")
    assert list(tmp_path.glob(".*")) == []


def test_a_folder_of_the_users_own_stays(tmp_path):
    (tmp_path / ".a.hidden").mkdir()
    write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / ".a.hidden").is_dir()
