"""Processes that take bundles from one queue, and what is done when one of them breaks."""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

from lean_fx.errors import one_line_with_type
from support.evidence.runs import Bundle, Planner
from support.evidence.training import Bench, Settings, attempt, failed, serve


class Worker:
    """One process and what it is at."""

    def __init__(self, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, settings), daemon=True)
        self.process.start()
        theirs.close()
        self.bundle: Bundle | None = None

    def give(self, bundle: Bundle) -> None:
        """Start a bundle."""
        self.bundle = bundle
        self.connection.send(bundle)

    def take(self) -> tuple[str, Any]:
        """The answer; a process that is gone has broken."""
        try:
            answer: tuple[str, Any] = self.connection.recv()
            return answer
        except (EOFError, ConnectionResetError):
            self.process.join(5)
            return "broken", f"the process ended with status {self.process.exitcode}"

    def stop(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.terminate()
        self.process.join(10)


class Progress:
    """Lines on what has ended, and when all will have."""

    def __init__(self, planner: Planner) -> None:
        self._planner, self._start, self._done = planner, time.monotonic(), 0.0

    def say(self, bundle: Bundle, results: list[dict[str, Any]]) -> None:
        """Print a line for each run."""
        self._done += bundle.cost
        elapsed = time.monotonic() - self._start
        left = self._planner.left() * elapsed / self._done
        for result in results:
            end = result["error"] or f"{100 * result['test_accuracy'][-1]:5.1f} %"
            print(
                f"[{elapsed:6.0f} s] {result['part']} {result['arm']} {result['split']} "
                f"rate {result['rate']:g} seed {result['seed']}: {end}; about {left:.0f} s left",
                flush=True,
            )


def work(planner: Planner, settings: Settings, deadline: float, end: float) -> None:
    """Run all that is planned.

    Args:
        planner: gives the runs.
        settings: of all of them.
        deadline: no run starts after this time of ``time.monotonic()``.
        end: runs still in flight then are dropped.
    """
    progress = Progress(planner)
    if settings.workers < 1:
        _work_here(planner, settings, deadline, progress)
        return
    again: deque[Bundle] = deque()
    workers = [Worker(settings) for _ in range(settings.workers)]
    broken = 0
    try:
        while True:
            for worker in workers:
                if worker.bundle is None and time.monotonic() < deadline:
                    bundle = again.popleft() if again else planner.next()
                    if bundle is not None:
                        worker.give(bundle)
            busy = [worker for worker in workers if worker.bundle is not None]
            if not busy or time.monotonic() > end:
                return
            wait([worker.connection for worker in busy], timeout=1.0)
            for worker in busy:
                if not worker.connection.poll():
                    continue
                bundle, (kind, answer) = worker.bundle, worker.take()
                worker.bundle = None
                assert bundle is not None
                if kind == "broken":
                    broken += 1
                    worker.stop()
                    workers[workers.index(worker)] = Worker(settings)
                    retried = _retried(bundle, answer, settings) if broken < 50 else []
                    again.extend(retried)
                    if retried:
                        print(f"{bundle.arm.name}: {answer}; tried again", flush=True)
                        continue
                    kind = "refused"
                results = answer if kind == "done" else failed(settings, bundle, answer)
                for result in results:
                    planner.add(result)
                progress.say(bundle, results)
    finally:
        for worker in workers:
            worker.stop()


def _retried(bundle: Bundle, reason: str, settings: Settings) -> list[Bundle]:
    """The next try of a bundle that broke: without graphs, then one by one, then none."""
    if bundle.graph and settings.graph and settings.device != "cpu":
        return [replace(bundle, graph=False, note=f"without a graph, as with one: {reason}")]
    if len(bundle.runs) > 1:
        return [replace(bundle, runs=(run,)) for run in bundle.runs]
    return []


def _work_here(planner: Planner, settings: Settings, deadline: float, progress: Progress) -> None:
    bench = Bench(settings)
    while time.monotonic() < deadline and (bundle := planner.next()) is not None:
        try:
            kind, answer = attempt(bench, bundle)
        except Exception as error:
            kind, answer = "refused", one_line_with_type(error)
        results = answer if kind == "done" else failed(settings, bundle, answer)
        for result in results:
            planner.add(result)
        progress.say(bundle, results)
        bench.clear()
