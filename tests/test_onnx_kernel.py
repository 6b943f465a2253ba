"""The kernel for ONNX Runtime gives what the reduction gives, and is taken for the function."""

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import lean_fx
from lean_fx.errors import MissingDependencyError
from lean_fx.reduction.functional import lean_reduction
from side_by_side import export_side_by_side, run_side_by_side

try:
    KERNEL = lean_fx.onnx_kernel()
except MissingDependencyError:
    pytest.skip("the kernel is not built: no compiler", allow_module_level=True)


def session(path, *, kernel=True, threads=1, **entries):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    for key, value in entries.items():
        setattr(options, key, value)
    if kernel:
        options.register_custom_ops_library(KERNEL)
    return onnxruntime.InferenceSession(path, options)


def exported(module, x, path, **options):
    lean_fx.export_onnx(module, path, x, tolerance=None, **options)
    return path


def wanted(module, x):
    """The reduction in float64."""
    given = {name: getattr(module, name) for name in ("normalize", "scale", "layout", "iterations")}
    given |= {name: getattr(module, name) for name in ("nonnegative", "damping", "norm_floor")}
    return lean_reduction(x.double(), module.seed.detach().double(), module.dim, **given)


def assert_exact(module, x, found, rtol):
    exact = wanted(module, x)
    torch.testing.assert_close(
        found.double(),
        exact,
        rtol=rtol,
        atol=rtol * exact.abs().max().item(),
        msg=lambda text: f"{module}: {text}",
    )


def check(module, x, path, rtol=1e-5):
    exported(module, x, path)
    for threads in (1, 2):
        (found,) = session(path, threads=threads).run(None, {"input": x.numpy()})
        assert_exact(module, x, torch.from_numpy(found), rtol)


OPTIONS = [
    {},
    {"normalize": "row"},
    {"normalize": "none"},
    {"scale": "mean"},
    {"scale": "magnitude"},
    {"seed": "matrix"},
    {"seed": "matrix", "normalize": "row"},
    {"layout": "interleaved"},
    {"iterations": 3},
    {"iterations": 2, "seed": "matrix", "layout": "interleaved", "normalize": "none"},
    {"damping": 0.5},
    {"norm_floor": 0.25},
    {"damping": 0.1, "norm_floor": 0.1, "normalize": "row", "iterations": 2, "scale": "magnitude"},
]


def check_all(modules, inputs, path, rtol=1e-5):
    export_side_by_side(modules, inputs, path, tolerance=None)
    for threads in (1, 2):
        found = run_side_by_side(session(path, threads=threads), inputs)
        for module, x, y in zip(modules, inputs, found, strict=True):
            assert_exact(module, x, y, rtol)


@pytest.mark.parametrize("nonnegative", [True, False])
def test_every_option(nonnegative, tmp_path):
    x = torch.rand(3, 24, 7, 5) - (0 if nonnegative else 0.5)
    make = partial(lean_fx.LeanReduction, 24, 4, nonnegative=nonnegative)
    check_all([make(**each) for each in OPTIONS], [x] * len(OPTIONS), tmp_path / "net.onnx")


CHANNELS = [(16, 16), (16, 8), (14, 2), (34, 2), (15, 1), (30, 10), (80, 5)]


@pytest.mark.parametrize("nonnegative", [True, False])
def test_every_number_of_channels(nonnegative, tmp_path):
    inputs = [torch.rand(2, each, 33) - (0 if nonnegative else 0.5) for each, _ in CHANNELS]
    modules = [lean_fx.LeanReduction(*each, nonnegative=nonnegative) for each in CHANNELS]
    check_all(modules, inputs, tmp_path / "net.onnx")


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((5, 12), 1), ((2, 9, 12), -1), ((2, 12, 9), 1), ((3, 12, 3, 3), 1), ((2, 3, 12, 5, 4), 2)],
)
def test_any_axis(shape, dim, tmp_path):
    check(lean_fx.LeanReduction(12, 3, dim=dim), torch.randn(shape), tmp_path / "net.onnx")


def test_large_enough_for_several_threads(tmp_path):
    check(lean_fx.LeanReduction(48, 8), torch.randn(2, 48, 40, 41), tmp_path / "net.onnx")


class In(nn.Module):
    """A reduction in another type: numpy knows no bfloat16."""

    def __init__(self, reduction, dtype):
        super().__init__()
        self.reduction, self.dtype = reduction.to(dtype), dtype

    def forward(self, x):
        return self.reduction(x.to(self.dtype)).to(x.dtype)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize(("shape", "dim"), [((3, 24, 7, 5), 1), ((5, 9, 24), -1)])
def test_other_types(dtype, rtol, shape, dim, tmp_path):
    x = torch.randn(shape).to(dtype).double()
    module = In(lean_fx.LeanReduction(24, 4, dim), dtype)
    path = exported(module, x, tmp_path / "net.onnx")
    exact = wanted(module.reduction, x)
    (found,) = session(path).run(None, {"input": x.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(found), exact, rtol=rtol, atol=rtol * exact.abs().max().item()
    )


def test_dead_channels_and_positions_give_zeros(tmp_path):
    x = torch.rand(2, 12, 6, 6)
    x[:, 0:4] = 0
    x[0, :, 2, 3] = 0
    module = lean_fx.LeanReduction(12, 3, nonnegative=True)
    check(module, x, tmp_path / "net.onnx")
    (found,) = session(tmp_path / "net.onnx").run(None, {"input": x.numpy()})
    assert not found[:, 0].any()
    assert not found[0, :, 2, 3].any()


def test_no_batch_and_no_positions(tmp_path):
    module = lean_fx.LeanReduction(12, 3)
    path = exported(
        module,
        torch.rand(2, 12, 6),
        tmp_path / "net.onnx",
        dynamic_shapes=({0: "batch", 2: "length"},),
    )
    for shape in ((0, 12, 6), (2, 12, 0)):
        (found,) = session(path).run(None, {"input": np.zeros(shape, np.float32)})
        assert found.shape == (shape[0], 3, shape[2])


def test_the_function_is_not_run(tmp_path):
    x = torch.rand(2, 3, 12, 12)
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU())
    lean = lean_fx.leanify(net, x)
    path = exported(lean, x, tmp_path / "net.onnx")
    results = []
    for kernel in (True, False):
        optimised = str(tmp_path / f"{kernel}.onnx")
        made = session(path, kernel=kernel, optimized_model_filepath=optimised)
        results.append(made.run(None, {"input": x.numpy()})[0])
        kinds = [node.op_type for node in onnx.load(optimised).graph.node]
        assert ("LEAN" in kinds) == kernel
        assert kernel or len(kinds) > 8
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-5)


def test_a_library_that_is_registered_twice_is_told(tmp_path):
    path = exported(lean_fx.LeanReduction(12, 3), torch.rand(2, 12), tmp_path / "net.onnx")
    options = onnxruntime.SessionOptions()
    for _ in range(2):
        options.register_custom_ops_library(KERNEL)
    with pytest.raises(Exception, match="Domain already set in registry"):
        onnxruntime.InferenceSession(path, options)


def test_without_it_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setattr(lean_fx.kernel, "EXTENSION_SUFFIXES", [])
    with pytest.raises(MissingDependencyError, match="its kernel is not built; install g\\+\\+ or"):
        lean_fx.onnx_kernel()


def test_it_is_in_the_package():
    assert Path(KERNEL).parent == Path(lean_fx.__file__).parent / "kernel"
