"""What every test starts from."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_numbers_each_time():
    torch.manual_seed(0)
