"""Training of small nets on one device, several side by side, each step one CUDA graph.

These nets are small and a step is a few hundred short kernels, so starting them one by one would
take longer than they do. A step is captured once as a CUDA graph: everything it reads lies at fixed
places on the device, the number of the step too, so that a step is one call without arguments.
Several nets that are trained alike (one arm at several rates or seeds) are replayed in turn, each
on a stream of its own, so that their kernels share the device. On a CPU, or without graphs, the
same code runs operation by operation.

Every run is trained alike: batches of 64 as elsewhere in this repository (the pictures left over
at the end of an epoch, other ones each time, are not seen), Adam as it comes, a learning rate that
rises over the first twentieth of the steps and then falls to 0 as a cosine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.evidence.pictures import Split

BATCH = 64
TEST_BATCH = 250
_WARM_UP = 3  # steps before a capture, as torch's documentation has it


def rate_schedule(rate: float, steps: int) -> Tensor:
    """The learning rate of every step.

    Example:
        >>> rate_schedule(1.0, 4)
        tensor([1.0000, 0.8536, 0.5000, 0.1464])
    """
    rising = max(1, steps // 20)
    at = torch.arange(steps, dtype=torch.float64)
    falling = 0.5 * (1 + torch.cos(math.pi * at / steps))
    return (rate * falling * ((at + 1) / rising).clamp(max=1)).float()


@dataclass
class History:
    """What a run leaves: one number an epoch in each list, and None where it was not a number."""

    train_loss: list[float | None] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_loss: list[float | None] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    train_seconds: list[float] = field(default_factory=list)
    test_seconds: list[float] = field(default_factory=list)


class Trainer:
    """One net in training; :func:`train_together` drives it.

    Args:
        net: on the device, its weights drawn.
        split: the pictures, on the device.
        rate: the highest learning rate.
        epochs: how many.
        seed: of the order of the pictures and of their augmentation.
        augment: flip and shift the training pictures.
        graph: capture the steps as CUDA graphs.
    """

    def __init__(
        self,
        net: nn.Module,
        split: Split,
        *,
        rate: float,
        epochs: int,
        seed: int,
        augment: bool = False,
        graph: bool = False,
    ) -> None:
        self.net, self.split, self.history = net, split, History()
        self.device = device = split.train_y.device
        cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream() if cuda else None  # type: ignore[no-untyped-call]
        self.batch = min(BATCH, len(split.train_y))
        self.steps = len(split.train_y) // self.batch
        self.test_steps = math.ceil(len(split.test_y) / TEST_BATCH)
        self._generator = torch.Generator().manual_seed(seed)
        self._rates = rate_schedule(rate, self.steps * epochs).to(device)
        # On a CPU the rate is a tensor too, which the fused form does not need.
        fast = {"fused": True, "capturable": True} if cuda else {"foreach": False}
        first = torch.tensor(rate, device=device)
        self.optimizer = torch.optim.Adam(net.parameters(), lr=first, **fast)  # type: ignore[arg-type]
        self._rate: Tensor = self.optimizer.param_groups[0]["lr"]
        whole = {"dtype": torch.int64, "device": device}
        self._order = torch.zeros(self.steps, self.batch, **whole)  # type: ignore[call-overload]
        self._at, self._done, self._test_at = (
            torch.zeros(1, **whole)  # type: ignore[call-overload]
            for _ in range(3)
        )
        self._augment = augment
        self._moves = torch.zeros(self.steps, self.batch, 3, **whole)  # type: ignore[call-overload]
        padded = torch.arange(self.test_steps * TEST_BATCH).view(self.test_steps, TEST_BATCH)
        self._test_order = padded.clamp(max=len(split.test_y) - 1).to(device)
        self._counted = (padded < len(split.test_y)).float().to(device)
        self._loss = torch.zeros(2, device=device)  # of training and of test
        self._hits = torch.zeros(2, device=device)
        self._replay: Callable[[], None] | None = None
        self._test_replay: Callable[[], None] | None = None
        self.graph = graph and cuda
        if self.graph:
            self._capture()
        synchronise(device)  # what was made so far was made on the usual stream

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Within it, work goes to the stream of this run."""
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            yield

    def begin_epoch(self) -> None:
        """Draw the order of the pictures and their moves, and set the sums to 0."""
        count, size = self.steps * self.batch, self.split.train_x.shape[-1]
        order = torch.randperm(len(self.split.train_y), generator=self._generator)[:count]
        self._order.copy_(order.view(self.steps, self.batch))
        if self._augment:
            shape, most = (self.steps, self.batch), size // 12
            draws = [(-most, most + 1), (-most, most + 1), (0, 2)]
            moves = [torch.randint(*draw, shape, generator=self._generator) for draw in draws]
            self._moves.copy_(torch.stack(moves, -1))
        for value in (self._at, self._test_at, self._loss, self._hits):
            value.zero_()

    def train_step(self) -> None:
        """One step of the training."""
        if self._replay is not None:
            self._replay()
        else:
            self.net.train()
            self._train_step()

    def test_step(self) -> None:
        """One batch of the other pictures."""
        if self._test_replay is not None:
            self._test_replay()
        else:
            self.net.eval()
            self._test_step()

    def end_epoch(self, train_seconds: float, test_seconds: float) -> None:
        """Read the sums, the one time an epoch that the device is asked for numbers."""
        loss, hits = self._loss.tolist(), self._hits.tolist()
        seen, judged = self.steps * self.batch, len(self.split.test_y)
        history = self.history
        history.train_loss.append(_finite(loss[0] / seen))
        history.train_accuracy.append(hits[0] / seen)
        history.test_loss.append(_finite(loss[1] / judged))
        history.test_accuracy.append(hits[1] / judged)
        history.train_seconds.append(round(train_seconds, 4))
        history.test_seconds.append(round(test_seconds, 4))

    def _train_step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self._rate.copy_(self._rates.index_select(0, self._done)[0])
        index = self._order.index_select(0, self._at)[0]
        labels = self.split.train_y.index_select(0, index)
        images = self._pictures(index)
        logits = self.net(self.split.normalised(images))
        loss = F.cross_entropy(logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        with torch.no_grad():
            self._loss[0].add_(loss.detach(), alpha=self.batch)
            self._hits[0].add_((logits.detach().argmax(1) == labels).sum())
            self._at.add_(1)
            self._done.add_(1)

    @torch.no_grad()
    def _test_step(self) -> None:
        index = self._test_order.index_select(0, self._test_at)[0]
        counted = self._counted.index_select(0, self._test_at)[0]
        labels = self.split.test_y.index_select(0, index)
        logits = self.net(self.split.normalised(self.split.test_x.index_select(0, index)))
        loss = F.cross_entropy(logits, labels, reduction="none")
        self._loss[1].add_((loss * counted).sum())
        self._hits[1].add_(((logits.argmax(1) == labels) * counted).sum())
        self._test_at.add_(1)

    def _pictures(self, index: Tensor) -> Tensor:
        """The pictures of a batch, flipped and shifted if asked; edges are repeated."""
        if not self._augment:
            return self.split.train_x.index_select(0, index)
        moves = self._moves.index_select(0, self._at)[0]
        _, channels, high, wide = self.split.train_x.shape
        device = index.device
        rows = (torch.arange(high, device=device) + moves[:, :1]).clamp(0, high - 1)
        columns = (torch.arange(wide, device=device) + moves[:, 1:2]).clamp(0, wide - 1)
        columns = torch.where(moves[:, 2:] == 1, wide - 1 - columns, columns)
        plane = torch.arange(channels, device=device)
        return self.split.train_x[
            index[:, None, None, None],
            plane[None, :, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]

    def rehearse(self) -> None:
        """Take a few steps, so that everything is allocated and chosen, and put all back."""
        state = [*self.net.parameters(), *self.net.buffers()]
        before = [value.detach().clone() for value in state]
        counts = (self._at, self._done, self._test_at)
        synchronise(self.device)
        with self.on_stream():
            for _ in range(_WARM_UP):
                for count in counts:
                    count.zero_()
                self.net.train()
                self._train_step()
            self.net.eval()
            self._test_step()
            self.optimizer.zero_grad(set_to_none=True)
        synchronise(self.device)
        with torch.no_grad():
            for value, old in zip(state, before, strict=True):
                value.copy_(old)
            for kept in self.optimizer.state.values():
                for value in kept.values():
                    if isinstance(value, Tensor):
                        value.zero_()
            for value in (*counts, self._loss, self._hits):
                value.zero_()
        synchronise(self.device)

    def _capture(self) -> None:
        """Capture a step of each kind; nothing is computed meanwhile."""
        assert self.stream is not None
        self.rehearse()
        self.net.train()
        self._replay = _captured(self._train_step, self.stream)
        self.net.eval()
        self._test_replay = _captured(self._test_step, self.stream)


def _captured(body: Callable[[], None], stream: torch.cuda.Stream) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        body()
    return graph.replay


def train_together(
    trainers: Sequence[Trainer], epochs: int, after_epoch: Callable[[int], None] = lambda _: None
) -> None:
    """Train nets of one kind side by side, and judge them after each epoch.

    Args:
        trainers: as many steps an epoch each.
        epochs: how many.
        after_epoch: called with the number of epochs that are done.
    """
    for epoch in range(epochs):
        start = time.perf_counter()
        for trainer in trainers:
            with trainer.on_stream():
                trainer.begin_epoch()
        _in_turn(trainers, trainers[0].steps, Trainer.train_step)
        trained = time.perf_counter()
        _in_turn(trainers, trainers[0].test_steps, Trainer.test_step)
        tested = time.perf_counter()
        for trainer in trainers:
            trainer.end_epoch(trained - start, tested - trained)
        after_epoch(epoch + 1)


def _in_turn(trainers: Sequence[Trainer], steps: int, step: Callable[[Trainer], None]) -> None:
    for _ in range(steps):
        for trainer in trainers:
            with trainer.on_stream():
                step(trainer)
    synchronise(trainers[0].device)


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def set_precision(tf32: bool) -> None:
    """Allow TF32 in products and convolutions, for all arms alike, or forbid it."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True


def _finite(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None
