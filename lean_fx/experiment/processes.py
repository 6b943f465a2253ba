"""The processes that train one model together: one, or as many as torchrun has started."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from lean_fx.errors import ArgumentError


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those that train together.

    Args:
        rank: its place, from 0.
        count: how many there are, on all machines.
        per_machine: how many each machine has.

    Raises:
        ArgumentError: the machines do not have equally many.

    Example:
        >>> Processes(rank=5, count=8, per_machine=4).machines
        2
    """

    rank: int = 0
    count: int = 1
    per_machine: int = 1

    def __post_init__(self) -> None:
        if self.count % self.per_machine:
            raise ArgumentError(
                f"torchrun: {self.count} processes in all are not a multiple of the "
                f"{self.per_machine} on this machine; start equally many on each"
            )

    @property
    def machines(self) -> int:
        """How many machines there are."""
        return self.count // self.per_machine


def processes() -> Processes:
    """Read from the environment what torchrun says; without torchrun it is one process.

    Raises:
        ArgumentError: the machines do not have equally many.

    Example:
        >>> processes()
        Processes(rank=0, count=1, per_machine=1)

    References:
        https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # other launchers set RANK and its like, too
        return Processes()
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    return Processes(*(int(os.environ[name]) for name in names))


def is_first_process() -> bool:
    """Whether this is the one process that tests, writes and reports.

    Example:
        >>> is_first_process()
        True
    """
    return processes().rank == 0


def leave_to_first_process() -> None:
    """Close the group of processes; all but the first exit.

    Call it in every process, after the last training.

    Raises:
        SystemExit: of status 0, in all processes but the first.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not is_first_process():
        raise SystemExit(0)
