"""What every test starts from."""

import copy
import functools
import os

import pytest
import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: more threads only wait for each other
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

_from_torchlib = functools.cache(ONNXRegistry.from_torchlib)


@pytest.fixture(autouse=True)
def _same_random_numbers_each_time():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _translations_are_read_once():
    """torch.onnx.export reads the sources of 497 functions of onnxscript anew at every call."""

    @staticmethod
    def from_torchlib(*args, **kwargs):
        registry = copy.copy(_from_torchlib(*args, **kwargs))
        registry.functions = {name: list(each) for name, each in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", from_torchlib)
        yield
