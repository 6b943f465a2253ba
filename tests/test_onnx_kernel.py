"""The kernel for ONNX Runtime gives what the reduction gives, and is taken for the function."""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import lean_fx
from lean_fx.errors import MissingDependencyError
from lean_fx.reduction.conditioned import GatedReduction, SimplexReduction
from lean_fx.reduction.functional import lean_reduction
from lean_fx.reduction.registry import make_reduction
from side_by_side import drawn, export_side_by_side, run_side_by_side

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
    if not isinstance(module, lean_fx.LeanReduction):
        return copy.deepcopy(module).double()(x.double()).detach()
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


FORMS = [SimplexReduction, GatedReduction]
CHANNELS = [(16, 16), (16, 8), (14, 2), (34, 2), (15, 1), (30, 10), (80, 5)]


@pytest.mark.parametrize("nonnegative", [True, False])
def test_every_number_of_channels(nonnegative, tmp_path):
    inputs = [torch.rand(2, each, 33) - (0 if nonnegative else 0.5) for each, _ in CHANNELS]
    modules = [lean_fx.LeanReduction(*each, nonnegative=nonnegative) for each in CHANNELS]
    check_all(modules, inputs, tmp_path / "net.onnx")


@pytest.mark.parametrize("kind", FORMS)
def test_every_number_of_channels_of_conditioned_forms(kind, tmp_path):
    inputs = [torch.randn(2, each, 33) for each, _ in CHANNELS]
    check_all([drawn(kind, *each) for each in CHANNELS], inputs, tmp_path / "net.onnx")


def test_a_gate_of_any_height(tmp_path):
    """tanh, from where it is its argument to where it is 1."""
    x = torch.ones(1, 2, 400)
    x[:, 1] = torch.logspace(-6, 3, 200).repeat(2) * torch.tensor([1.0, -1.0]).repeat_interleave(
        200
    )
    gated = GatedReduction(2, 2)
    with torch.no_grad():
        gated.weight.fill_(1)
        gated.gate.copy_(torch.tensor([[0.0], [30.0]]))
    check(gated, x, tmp_path / "net.onnx", rtol=2e-6)
    x = torch.full((2, 2, 3), 3e36)  # u / m is infinite
    with torch.no_grad():
        gated.gate.fill_(100)
    check(gated, x, tmp_path / "net.onnx", rtol=2e-6)


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((5, 12), 1), ((2, 9, 12), -1), ((2, 12, 9), 1), ((3, 12, 3, 3), 1), ((2, 3, 12, 5, 4), 2)],
)
def test_any_axis(shape, dim, tmp_path):
    modules = [lean_fx.LeanReduction(12, 3, dim), *(drawn(kind, 12, 3, dim) for kind in FORMS)]
    check_all(modules, [torch.randn(shape)] * len(modules), tmp_path / "net.onnx")


def test_large_enough_for_several_threads(tmp_path):
    modules = [lean_fx.LeanReduction(48, 8), *(drawn(kind, 48, 8) for kind in FORMS)]
    inputs = [torch.randn(2, 48, 40, 41)] * len(modules)
    check_all(modules, inputs, tmp_path / "net.onnx")


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
@pytest.mark.parametrize(
    "kind",
    [
        lean_fx.LeanReduction,
        # Numbers that float32, the type of attributes, does not hold exactly.
        partial(lean_fx.LeanReduction, damping=0.6, norm_floor=0.3),
        *FORMS,
    ],
)
def test_other_types(kind, dtype, rtol, shape, dim, tmp_path):
    x = torch.randn(shape).to(dtype).double()
    module = In(drawn(kind, 24, 4, dim), dtype)
    path = exported(module, x, tmp_path / "net.onnx")
    exact = wanted(module.reduction, x)
    (found,) = session(path).run(None, {"input": x.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(found), exact, rtol=rtol, atol=rtol * exact.abs().max().item()
    )


def with_gain(path, gain):
    """Rewrite a file as a later version of lean_fx may: a node of another name, with one option more."""
    model = onnx.load(path)
    (function,), node = model.functions, model.graph.node[0]
    function.attribute.append("gain")
    output = function.output[0]
    for each in function.node:
        each.output[:] = ["before" if name == output else name for name in each.output]
    reference = onnx.AttributeProto(
        name="value_float", ref_attr_name="gain", type=onnx.AttributeProto.FLOAT
    )
    constant = onnx.helper.make_node("Constant", [], ["factor"])
    constant.attribute.append(reference)
    function.node.extend([constant, onnx.helper.make_node("Mul", ["before", "factor"], [output])])
    node.attribute.append(onnx.helper.make_attribute("gain", gain))
    function.name = node.op_type = "GainedLEAN"
    onnx.save(model, path)


def test_a_node_with_a_later_option_runs_by_its_function(tmp_path):
    module, x = drawn(lean_fx.LeanReduction, 12, 3), torch.randn(2, 12, 5)
    path = exported(module, x, tmp_path / "net.onnx")
    with_gain(path, 5.0)
    (found,) = session(path).run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), 5 * module(x).detach())


@pytest.mark.parametrize("kind", [partial(lean_fx.LeanReduction, nonnegative=True), *FORMS])
def test_dead_channels_and_positions_give_zeros(kind, tmp_path):
    x = torch.rand(2, 12, 6, 6)
    x[:, 0:4] = 0
    x[0, :, 2, 3] = 0
    check(drawn(kind, 12, 3), x, tmp_path / "net.onnx")
    (found,) = session(tmp_path / "net.onnx").run(None, {"input": x.numpy()})
    assert not found[:, 0].any()
    assert not found[0, :, 2, 3].any()


@pytest.mark.parametrize("kind", [lean_fx.LeanReduction, *FORMS])
def test_no_batch_and_no_positions(kind, tmp_path):
    module = kind(12, 3)
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


@pytest.mark.parametrize("name", ["lean_simplex", "lean_gated"])
def test_the_function_of_a_conditioned_form_is_not_run(name, tmp_path):
    path = exported(make_reduction(name, 12, 3, 1), torch.rand(2, 12), tmp_path / "net.onnx")
    optimised = str(tmp_path / "optimised.onnx")
    session(path, optimized_model_filepath=optimised)
    (node,) = onnx.load(optimised).graph.node
    assert node.domain == "lean_fx"


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        *((lean_fx.LeanReduction, sizes) for sizes in ([5], [3, 5], [1, 1, 12])),
        *((SimplexReduction, sizes) for sizes in ([5], [3, 4])),
        *((GatedReduction, sizes) for sizes in ([3], [3, 5])),
    ],
)
def test_parameters_that_do_not_fit_are_told(kind, sizes, tmp_path):
    path = exported(kind(12, 3), torch.rand(2, 12), tmp_path / "net.onnx")
    file = onnx.load(path)
    (node,) = (node for node in file.graph.node if node.domain == "lean_fx")
    wrong = numpy_helper.from_array(np.ones(sizes, np.float32), "wrong")
    file.graph.initializer.append(wrong)
    node.input[1] = "wrong"
    onnx.save(file, path)
    rule = f"lean_fx {node.op_type}: the parameters do not fit the channels of x"
    with pytest.raises(Exception, match=rule):
        session(path).run(None, {"input": np.ones((2, 12), np.float32)})


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
