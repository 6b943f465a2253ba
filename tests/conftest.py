"""What every test starts from."""

import copy
import functools
import gc
import os
import typing

import pytest
import torch
import torch._export.utils
from torch.onnx._internal.exporter._registration import ONNXRegistry

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: more threads only wait for each other
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


@pytest.fixture(autouse=True)
def _same_random_numbers_each_time():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _garbage_is_not_looked_for_among_what_is_imported():
    """A collection takes half a second else, and some tests make many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _torch_exports_without_repeating_itself():
    """What torch.onnx.export does anew at every call, and which takes half of its time.

    It reads the sources of 497 functions of onnxscript, looks up every operator of the C++
    dispatcher in each namespace, and makes the types of thousands of annotations.
    """
    from_torchlib = functools.cache(ONNXRegistry.from_torchlib)

    @staticmethod
    def copied(*args, **kwargs):
        registry = copy.copy(from_torchlib(*args, **kwargs))
        registry.functions = {name: list(each) for name, each in registry.functions.items()}
        return registry

    look_up = functools.cache(torch._export.utils._materialize_cpp_cia_ops)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", copied)
        patch.setattr(torch._export.utils, "_materialize_cpp_cia_ops", look_up)
        patch.setattr(torch._ops, "Callable", typing.Callable)  # it remembers what it made
        yield
