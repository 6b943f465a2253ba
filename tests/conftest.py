"""What every test starts from."""

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: more threads only wait for each other
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


@pytest.fixture(autouse=True)
def _same_random_numbers_each_time():
    torch.manual_seed(0)
