"""The forms of LEAN that do not amplify noise: formulas, zeros, files, and the noise itself."""

import copy
import pickle
import threading
import time
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import lean_fx
import side_by_side
from graphs import Residual
from lean_fx.errors import ArgumentError
from lean_fx.export.sessions import open_session
from lean_fx.kernel import uses_kernel
from lean_fx.measure.costs import count_macs
from lean_fx.reduction.conditioned import GatedReduction, SimplexReduction
from lean_fx.reduction.controls import GroupedSumReduction
from lean_fx.reduction.onnx_nodes import as_onnx_nodes
from lean_fx.reduction.registry import make_reduction, reduction_factory

KINDS = [SimplexReduction, GatedReduction]
NAMES = ["lean_damped", "lean_simplex", "lean_gated"]
LAYOUTS = [((2, 12), 1), ((2, 12, 3), 1), ((2, 12, 3, 2), -3), ((2, 3, 12), -1), ((3, 12), 1)]


drawn = partial(side_by_side.drawn, dtype=torch.float64)


def literal(module, row):
    """The formula of the docstring, value by value, for one position."""
    c, r = module.out_channels, module.in_channels // module.out_channels
    x = [[float(row[i * r + k]) for k in range(r)] for i in range(c)]
    if isinstance(module, SimplexReduction):
        exp = [float(value.exp()) for value in module.logits.detach()]
        v = [value / sum(exp) for value in exp]
        t = [sum(v[i] * x[i][k] for i in range(c)) for k in range(r)]
        norm = sum(abs(value) for value in t) or 1.0
        a = [value / norm for value in t]
        y = [sum(x[i][k] * a[k] for k in range(r)) for i in range(c)]
    else:
        w, v = module.weight.tolist(), module.gate.tolist()
        mean = sum(abs(value) for line in x for value in line) / (c * r) or 1.0
        u = [sum(v[j][k] * x[j][k] for j in range(c)) for k in range(r)]
        gate = [1 + float(np.tanh(value / mean)) for value in u]
        y = [sum(w[i][k] * x[i][k] * gate[k] for k in range(r)) for i in range(c)]
    return torch.tensor(y, dtype=torch.float64)


@pytest.mark.parametrize("signed", [False, True], ids=["nonnegative", "signed"])
@pytest.mark.parametrize(("shape", "dim"), LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_formula(kind, shape, dim, signed):
    torch.manual_seed(0)
    module = drawn(kind, 12, 4, dim)
    x = torch.randn(shape, dtype=torch.float64)
    x = x if signed else x.relu()
    x[0] = 0
    y = module(x)
    assert y.shape == tuple(4 if n == 12 else n for n in shape)
    rows = [literal(module, row) for row in x.movedim(dim, -1).reshape(-1, 12)]
    torch.testing.assert_close(y.movedim(dim, -1).reshape(-1, 4), torch.stack(rows))
    assert (y[0] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient(kind):
    torch.manual_seed(0)
    module = drawn(kind, 12, 4)
    for x in (torch.randn(3, 12, 2), torch.rand(3, 12, 2) + 0.01):
        leaf = x.double().requires_grad_()
        parameters = dict(module.named_parameters())

        def reduce(x, *values, names=tuple(parameters)):
            return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(reduce, (leaf, *parameters.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_homogeneous_of_degree_one(kind):
    module, x = drawn(kind, 12, 4), torch.randn(5, 12, dtype=torch.float64)
    for factor in (1e-6, 1e6):
        torch.testing.assert_close(module(x * factor), module(x) * factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_give_zeros_and_finite_gradients(kind, dtype):
    module = drawn(kind, 12, 4).to(dtype)
    x = torch.randn(3, 12, 2).to(dtype)
    x[0], x[1, :3], x[2] = 0, 0, 1e-6
    x.requires_grad_()
    y = module(x)
    y.square().sum().backward()
    assert y.dtype == dtype
    assert (y[0] == 0).all()
    for tensor in (y, x.grad, *(p.grad for p in module.parameters())):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_reduced_in_float32(kind, dtype):
    module = drawn(kind, 512, 2).to(dtype)
    x = (torch.rand(3, 512) * 300).to(dtype)  # their sum is beyond float16
    expected = copy.deepcopy(module).float()(x.float()).to(dtype)
    assert torch.equal(module(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module.float()(x.float()), module(x.float()))


def test_they_start_as_what_is_known():
    """A uniform simplex; and a gate that is open, so a learned grouped sum."""
    x = torch.rand(5, 12)
    t = x.view(5, 4, 3).mean(1)
    expected = (x.view(5, 4, 3) * (t / t.sum(1, keepdim=True)).unsqueeze(1)).sum(2)
    torch.testing.assert_close(SimplexReduction(12, 4)(x), expected)
    gated, grouped = GatedReduction(12, 4), GroupedSumReduction(12, 4)
    gated.load_state_dict({**grouped.state_dict(), "gate": torch.zeros(4, 3)})
    torch.testing.assert_close(gated(x), grouped(x))
    assert (GatedReduction(12, 4).gate == 0).all()
    assert GatedReduction(400, 20).weight.std().item() == pytest.approx(20**-0.5, rel=0.2)


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [("lean_damped", 4, 84), ("lean_simplex", 4, 24), ("lean_gated", 24, 48)],
)
def test_costs(name, parameters, macs):
    module = make_reduction(name, 12, 4, 1)
    assert sum(p.numel() for p in module.parameters()) == parameters
    assert module.macs_per_position == macs
    assert count_macs(module, torch.rand(2, 12, 5)) == 2 * 5 * macs


def test_onnx(tmp_path):
    cases = [(kind, shape, dim) for kind in KINDS for shape, dim in LAYOUTS]
    modules = [drawn(kind, 12, 4, dim).float() for kind, _, dim in cases]
    inputs = [torch.randn(2, *shape[1:]) for _, shape, _ in cases]  # one batch for all
    side_by_side.check_side_by_side(modules, inputs, tmp_path / "net.onnx")
    kinds = {node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node}
    assert kinds == {"LEANSimplex", "LEANGated"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_of_other_dtypes(kind, dtype, tmp_path):
    module, x = drawn(kind, 12, 4).to(dtype), torch.rand(2, 12, 3).to(dtype)
    x[0, :, 1] = 0
    apart = 1e-12 if dtype == torch.float64 else 2e-2
    lean_fx.export_onnx(module, tmp_path / "net.onnx", x, tolerance=apart)


def ways_to_run(module, x, path):
    """What torch, the function in the file and the kernel, where it is built, give."""
    lean_fx.export_onnx(module, path, x)
    found = [module(x).detach()]
    for kernel in {False, uses_kernel(None)}:
        session = open_session("net", path, threads=1, kernel=kernel)
        found.append(torch.from_numpy(session.run(None, {"input": x.numpy()})[0]))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("kind", [*KINDS, lean_fx.LeanReduction])
def test_onnx_of_values_of_another_dtype_than_the_parameters(kind, dtype, tmp_path):
    module, x = kind(12, 4), torch.rand(2, 12, 3).to(dtype)
    eager, *files = ways_to_run(module, x, tmp_path / "net.onnx")
    for found in files:
        torch.testing.assert_close(found, eager, rtol=2e-3, atol=2e-3 * float(eager.abs().max()))


def test_weights_too_small_for_float16(tmp_path):
    """They are of the simplex, which is computed from the logits in float32."""
    module = SimplexReduction(4, 2).half()
    with torch.no_grad():
        module.logits.copy_(torch.tensor([0.0, -18.0]))
    x = torch.tensor([[0.0, 0.0, 3.0, 2.0]] * 2).half()
    eager, *files = ways_to_run(module, x, tmp_path / "net.onnx")
    assert eager[0, 1] > 2
    for found in files:
        torch.testing.assert_close(found, eager, rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-36, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_files_are_homogeneous_too(kind, scale, tmp_path):
    torch.manual_seed(0)
    module, x = drawn(kind, 12, 4).float(), torch.rand(2, 12, 3)
    for found in ways_to_run(module, x * scale, tmp_path / "net.onnx"):
        torch.testing.assert_close(found / scale, module(x).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["lean", *NAMES])
def test_other_threads_run_models_while_one_exports(name, tmp_path):
    module, x = make_reduction(name, 12, 4, 1), torch.rand(2, 12)
    expected, found, stop = module(x), [], threading.Event()

    def run():
        while not stop.is_set():
            found.append(torch.equal(module(x), expected))

    other = threading.Thread(target=run)
    other.start()
    try:
        with as_onnx_nodes():
            deadline = time.monotonic() + 0.2
            while time.monotonic() < deadline:
                pass
    finally:
        stop.set()
        other.join()
    assert found
    assert all(found)


@pytest.mark.parametrize("kind", KINDS)
def test_it_stays_what_it_is_when_it_is_taken_elsewhere(kind):
    torch.compiler.reset()
    module, x = drawn(kind, 12, 4), torch.rand(2, 12, 5, dtype=torch.float64)
    elsewhere = {
        "pickle": pickle.loads(pickle.dumps(module)),
        "compile": torch.compile(module, fullgraph=True, backend="aot_eager"),
        "trace": torch.fx.symbolic_trace(module),
        "export": torch.export.export(module, (x,)).module(),
        "vmap": torch.vmap(drawn_like(module)),
    }
    for way, other in elsewhere.items():
        torch.testing.assert_close(other(x), module(x), msg=way)
    packed = nn.utils.rnn.pack_sequence([x[0].T, x[1].T])
    torch.testing.assert_close(module(packed).data, module(packed.data), rtol=0, atol=0)


def drawn_like(module):
    """The same along the axis that it has within vmap."""
    other = type(module)(12, 4, 0).double()
    other.load_state_dict(module.state_dict())
    return other


@pytest.mark.parametrize("kind", KINDS)
def test_errors_name_the_reduction(kind):
    with pytest.raises(ArgumentError) as caught:
        kind(8, 3)
    assert str(caught.value) == (
        f"{kind.__name__}: out_channels=3 does not divide in_channels=8; use 1, 2, 4 or 8"
    )
    with pytest.raises(ArgumentError) as caught:
        kind(8, 4)(torch.rand(2, 12))
    assert str(caught.value) == (
        f"{kind.__name__}: axis 1 of [2, 12] is not in_channels=8; give such values, or another dim"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_names_it(name):
    plan = lean_fx.plan(Residual(), reduction=name)
    again = lean_fx.Plan.from_json(plan.to_json())
    assert again == plan
    lean, other = (one.apply(Residual().eval()) for one in (plan, again))
    other.load_state_dict(lean.state_dict())
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(other(x), lean(x), rtol=0, atol=0)
    reductions = [m for m in other.modules() if getattr(m, "is_lean_reduction", False)]
    made = reduction_factory(name)(12, 4)
    assert [type(module) for module in reductions] == [type(made)] * len(plan.sites)


def amplification(name, seed, depth=8, width=64, preserved=8):
    """The relative change of the outputs of a stack for noise of 1e-3 on its inputs of unit scale.

    Each of its layers is a reduction, a linear layer back to the width, brought to the scale of
    the input by batch statistics, and a ReLU. Both differences are centred over the batch.
    """
    torch.manual_seed(seed)
    reductions = [make_reduction(name, width, preserved, 1).double() for _ in range(depth)]
    for gated in (module for module in reductions if isinstance(module, GatedReduction)):
        nn.init.normal_(gated.gate, std=preserved**-0.5)  # as after training: it starts at 0
    weights = [torch.randn(width, preserved, dtype=torch.float64) for _ in range(depth)]
    x = torch.randn(256, width, dtype=torch.float64)

    def run(x):
        x = x.relu()
        for reduction, weight in zip(reductions, weights, strict=True):
            x = reduction(x) @ weight.T
            x = ((x - x.mean(0)) / x.std(0)).relu()
        return x - x.mean(0)

    with torch.no_grad():
        y, moved = run(x), run(x + 1e-3 * torch.randn_like(x))
    return float((moved - y).norm() / y.norm())


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_of_them_does_not_amplify_noise(name):
    assert max(amplification(name, seed) for seed in range(3)) < 0.02


def test_a_stack_of_the_literal_form_does():
    assert min(amplification("lean", seed) for seed in range(3)) > 0.1
