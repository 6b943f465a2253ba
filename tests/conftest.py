"""What every test starts from."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: more threads only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_numbers_each_time():
    torch.manual_seed(0)
