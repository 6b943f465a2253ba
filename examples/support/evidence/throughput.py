"""How long steps take here, with and without graphs, alone and side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from lean_fx.errors import one_line_with_type
from support.evidence.arms import Arm, Part
from support.evidence.runs import Bundle, Run
from support.evidence.steps import Trainer, synchronise
from support.evidence.training import Bench, Settings

_TIMED = ("baseline", "lean", "lean_gated", "narrow", "lean_magnitude 10/10/10")


def throughput(parts: Sequence[Part], settings: Settings, steps: int = 30) -> None:
    """Print milliseconds of a training step and of a batch of tests.

    The last columns are seconds of an epoch of one run on all pictures, with graphs and side by
    side, and rough seconds of everything that the part plans.

    Args:
        parts: whose baseline, literal LEAN net, narrower net and one more arm are timed.
        settings: of the runs.
        steps: that are timed.
    """
    bench = Bench(settings)
    print("part arm: how, ms a train step and a test batch of each run; build s", flush=True)
    for part in parts:
        per_epoch: dict[str, float] = {}
        for arm in part.arms:
            if arm.name not in _TIMED:
                continue
            for graph, together in ((False, 1), (True, 1), (True, 4)):
                if not graph and settings.device != "cpu" and arm.name != "lean":
                    continue
                if graph and settings.device == "cpu":
                    continue
                label = f"{part.name} {arm.name}: {'graph' if graph else 'eager'} x{together}"
                try:
                    train, test, build = _times(bench, part, arm, graph, together, steps)
                except Exception as error:
                    print(f"{label} {one_line_with_type(error)}", flush=True)
                    continue
                per_epoch[arm.name] = train * 78 + test * 32
                print(
                    f"{label} {1e3 * train:.2f} {1e3 * test:.2f} {build:.1f}; "
                    f"epoch {per_epoch[arm.name]:.3f} s",
                    flush=True,
                )
                bench.clear()
        if per_epoch:
            usual = [value for name, value in per_epoch.items() if name != "baseline"]
            mean = sum(usual or per_epoch.values()) / len(usual or per_epoch)
            total = 0.0
            for arm in part.arms:
                epoch = per_epoch.get(arm.name, mean)
                total += epoch * (0.6 * len(arm.rates) * part.search_epochs)
                if part.best is None:
                    total += epoch * 3 * part.epochs
            total += mean * 3 * part.epochs * (part.best or 0)
            print(f"{part.name}: all that is planned, one process: about {total:.0f} s", flush=True)


def _times(
    bench: Bench, part: Part, arm: Arm, graph: bool, together: int, steps: int
) -> tuple[float, float, float]:
    run = Run(part.name, arm.name, 1e-3, 0, 50, "test", "")
    bundle = Bundle(part, arm, tuple(replace(run, seed=seed) for seed in range(together)), graph)
    begun = time.perf_counter()
    trainers = [bench.trainer(bundle, run)[0] for run in bundle.runs]
    build = time.perf_counter() - begun
    times = []
    for step, most in (
        (Trainer.train_step, trainers[0].steps),
        (Trainer.test_step, trainers[0].test_steps),
    ):
        for count in (min(3, most), min(steps, most)):  # the first are not timed
            for trainer in trainers:
                with trainer.on_stream():
                    trainer.begin_epoch()
            synchronise(bench.device)
            start = time.perf_counter()
            _in_turn(trainers, count, step)
            synchronise(bench.device)
        times.append((time.perf_counter() - start) / count / together)
    return times[0], times[1], build


def _in_turn(trainers: list[Trainer], count: int, step: object) -> None:
    for _ in range(count):
        for trainer in trainers:
            with trainer.on_stream():
                step(trainer)  # type: ignore[operator]
