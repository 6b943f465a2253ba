"""The damping of the walk and the floor of its norm: formulas, gradients, files, messages."""

import io
import itertools
from unittest import mock

import onnx
import pytest
import torch

import lean_fx
from lean_fx import LeanReduction, lean_reduction, power_iteration_embedding
from lean_fx.errors import ArgumentError
from lean_fx.reduction.registry import make_reduction
from reference import reduce_all
from side_by_side import check_side_by_side

SHAPES = [((2, 12, 2, 2), 1), ((2, 3, 12), -1)]
WALKS = list(itertools.product(("column", "row"), ("contiguous", "interleaved"), (1, 3)))


def runs(x, seed, dim, **options):
    """The reduction on its two ways: hand-written where that applies, and plain as when traced."""
    yield lean_reduction(x, seed, dim, **options)
    with mock.patch("lean_fx.reduction.functional._runs_eagerly", return_value=False):
        yield lean_reduction(x, seed, dim, **options)


def some(shape, dim, nonnegative):
    """Values with a position of zeros, and another with one preserved channel of zeros."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    x = x.relu() if nonnegative else x
    x.movedim(dim, -1)[0, 0] = 0
    x.movedim(dim, -1)[1, 0][..., :3] = 0
    return x


@pytest.mark.parametrize("scale", ["sum", "mean", "magnitude"])
@pytest.mark.parametrize("matrix", [False, True], ids=["vector", "matrix"])
@pytest.mark.parametrize("nonnegative", [True, False], ids=["nonnegative", "signed"])
@pytest.mark.parametrize(("normalize", "layout", "iterations"), WALKS)
def test_equals_the_literal_form(normalize, layout, iterations, nonnegative, matrix, scale):
    seed = torch.randn((4, 3) if matrix else 4, dtype=torch.float64)
    options = {"normalize": normalize, "layout": layout, "iterations": iterations, "scale": scale}
    added = ((0.3, 0.0), (0.0, 0.1), (1, 0.1))
    for (damping, norm_floor), (shape, dim) in itertools.product(added, SHAPES):
        x = some(shape, dim, nonnegative)
        changed = {**options, "damping": damping, "norm_floor": norm_floor}
        expected = reduce_all(x, seed, dim, **changed)
        for found in runs(x, seed, dim, nonnegative=nonnegative, **changed):
            torch.testing.assert_close(found, expected)


def test_the_floor_stands_beside_the_norm_of_a_walk_without_sums():
    x, seed = some((2, 12, 2, 2), 1, False), torch.randn(4, dtype=torch.float64)
    options = {"normalize": "none", "norm_floor": 0.5}
    expected = reduce_all(x, seed, 1, **options)
    for found in runs(x, seed, 1, **options):
        torch.testing.assert_close(found, expected)


def test_the_registered_form_is_the_one_that_was_measured():
    """y C' mean |X| / (sum |y| + 0.1) with y = G (V / (d + mean d))."""
    module = make_reduction("lean_damped", 12, 4, 1).double()
    row = torch.rand(12, dtype=torch.float64)
    x = row.view(4, 3)
    g = x @ x.T
    d = g.sum(0)
    y = g @ (module.seed / (d + d.mean()))
    expected = y * 4 * row.mean() / (y.abs().sum() + 0.1)
    torch.testing.assert_close(module(row.view(1, 12))[0], expected)


@pytest.mark.parametrize("nonnegative", [True, False], ids=["nonnegative", "signed"])
@pytest.mark.parametrize("matrix", [False, True], ids=["vector", "matrix"])
@pytest.mark.parametrize(("normalize", "layout", "iterations"), WALKS)
def test_gradient(normalize, layout, iterations, matrix, nonnegative):
    torch.manual_seed(0)
    x = torch.randn((1, 12, 2), dtype=torch.float64)
    x = (x.abs() + 0.01 if nonnegative else x).requires_grad_()
    seed = torch.randn((4, 3) if matrix else 4, dtype=torch.float64).requires_grad_()
    options = {"normalize": normalize, "layout": layout, "iterations": iterations}
    options |= {"damping": 0.7, "norm_floor": 0.2, "nonnegative": nonnegative}
    for way in range(2):

        def reduce(x, seed, way=way):
            return list(runs(x, seed, 1, **options))[way]

        assert torch.autograd.gradcheck(reduce, (x, seed))


@pytest.mark.parametrize("nonnegative", [True, False], ids=["nonnegative", "signed"])
def test_the_gradient_has_a_gradient(nonnegative):
    x = (torch.rand(2, 12, dtype=torch.float64) - (0 if nonnegative else 0.5)).requires_grad_()
    seed = torch.randn(4, dtype=torch.float64).requires_grad_()
    options = {"nonnegative": nonnegative, "damping": 0.7, "norm_floor": 0.2}
    assert torch.autograd.gradgradcheck(
        lambda x, seed: lean_reduction(x, seed, 1, **options), (x, seed)
    )


@pytest.mark.parametrize("nonnegative", [True, False], ids=["nonnegative", "signed"])
@pytest.mark.parametrize("normalize", ["column", "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zeros_give_zeros_and_finite_gradients(dtype, normalize, nonnegative):
    x = some((2, 12, 2, 2), 1, nonnegative).to(dtype).requires_grad_()
    seed = torch.randn(4, dtype=dtype).requires_grad_()
    for norm_floor in (0.0, 0.1):
        options = {"normalize": normalize, "damping": 1.0, "norm_floor": norm_floor}
        for y in runs(x, seed, 1, nonnegative=nonnegative, **options):
            assert y.dtype == dtype
            assert (y.movedim(1, -1)[0, 0] == 0).all()
            for gradient in torch.autograd.grad(y.square().sum(), (x, seed)):
                assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("nonnegative", [True, False], ids=["nonnegative", "signed"])
@pytest.mark.parametrize("normalize", ["column", "row", "none"])
def test_without_damping_nothing_changes(normalize, nonnegative):
    x = some((2, 12, 2, 2), 1, nonnegative).float()
    seed = torch.randn(4)
    found = []
    for options in ({}, {"damping": 0.0, "norm_floor": 0}):
        leaf = x.clone().requires_grad_()
        for y in runs(leaf, seed, 1, nonnegative=nonnegative, normalize=normalize, **options):
            found.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
    for before, now in zip(found[:2], found[2:], strict=True):
        assert all(map(torch.equal, before, now))


def test_the_gradient_of_an_almost_dead_channel_is_damped():
    x = torch.rand(1, 12, dtype=torch.float64)
    x[:, :3] *= 1e-6
    seed = torch.tensor([1.5, -0.5, 1.0, 0.3], dtype=torch.float64)
    steep = []
    for options in ({}, {"damping": 1.0, "norm_floor": 0.1}):
        leaf = x.clone().requires_grad_()
        lean_reduction(leaf, seed, nonnegative=True, **options)[0, 1].backward()
        steep.append(float(leaf.grad.abs().max()))
    assert steep[0] > 1e4
    assert steep[1] < 10


@pytest.mark.parametrize("nonnegative", [True, False], ids=["nonnegative", "signed"])
def test_compiled_and_exported(nonnegative):
    torch.compiler.reset()
    x = torch.rand(3, 12, 4)
    for damping, norm_floor in ((1.0, 0.1), (0.5, 0.2), (0.0, 0.0)):  # one code, three constants
        options = {"damping": damping, "norm_floor": norm_floor, "nonnegative": nonnegative}
        module = LeanReduction(12, 4, **options)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        found = []
        for form in (module, compiled):
            leaf = x.clone().requires_grad_()
            y = form(leaf)
            found.append((y, *torch.autograd.grad(y.square().sum(), (leaf, module.seed))))
        for eager, fused in zip(*found, strict=True):
            torch.testing.assert_close(fused, eager)
        torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))


FORMS = [
    ({"scale": "magnitude"}, (2, 12, 4, 3), 1),
    ({"layout": "interleaved", "seed": "matrix"}, (2, 12, 4, 3), 1),
    ({"normalize": "row", "iterations": 3, "seed": "matrix"}, (2, 12, 4, 3), 1),
    ({"normalize": "row", "layout": "interleaved", "scale": "mean"}, (2, 5, 12), -1),
    ({"iterations": 3}, (2, 12), 1),
]


@pytest.mark.parametrize("nonnegative", [True, False], ids=["nonnegative", "signed"])
def test_onnx(nonnegative, tmp_path):
    damped = {"damping": 0.3, "norm_floor": 0.1, "nonnegative": nonnegative}
    modules = [LeanReduction(12, 4, dim, **options, **damped) for options, _, dim in FORMS]
    inputs = [torch.rand(each) if nonnegative else torch.randn(each) for _, each, _ in FORMS]
    check_side_by_side(modules, inputs, tmp_path / "net.onnx", atol=1e-6)


def test_onnx_in_float64_loses_no_digits(tmp_path):
    module = LeanReduction(12, 4, damping=0.3, norm_floor=0.1).double()
    x = torch.rand(2, 12, 3, dtype=torch.float64)
    lean_fx.export_onnx(module, tmp_path / "net.onnx", x, tolerance=1e-12)


@pytest.mark.parametrize("options", [{}, {"damping": 0.25}, {"norm_floor": 0.5}])
def test_the_node_names_what_is_not_zero(options, tmp_path):
    x = torch.rand(2, 12, 3)
    lean_fx.export_onnx(LeanReduction(12, 4, **options), tmp_path / "net.onnx", x)
    (node,) = onnx.load(tmp_path / "net.onnx").graph.node
    found = {attribute.name: attribute.f for attribute in node.attribute if attribute.f}
    assert found == options
    assert {attribute.name for attribute in node.attribute} == {
        *("axis", "normalize", "scale", "layout", "iterations", "nonnegative"),
        *("matrix_shape", "output_shape"),
        *options,
    }
    assert node.overload == "_".join(["4x3", *(f"{name}{n}" for name, n in options.items())])


@pytest.mark.parametrize("name", ["damping", "norm_floor"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), True, "1", None])
def test_errors(name, value):
    rule = f"{name}={value!r} is not a finite number of 0 or more; leave it out for none"
    with pytest.raises(ArgumentError) as caught:
        LeanReduction(8, 4, **{name: value})
    assert str(caught.value) == f"LeanReduction: {rule}"
    with pytest.raises(ArgumentError) as caught:
        lean_reduction(torch.rand(2, 8), torch.ones(4), **{name: value})
    assert str(caught.value) == f"lean_reduction: {rule}"


def test_a_walk_without_sums_cannot_be_damped():
    with pytest.raises(ArgumentError) as caught:
        LeanReduction(8, 4, normalize="none", damping=0.5)
    assert str(caught.value) == (
        "LeanReduction: damping=0.5 with normalize='none' has no division to damp; use column or "
        "row, or leave damping out"
    )


def test_a_constant_seed_is_alive_where_rows_are_damped():
    module = LeanReduction(8, 4, normalize="row", seed_init="ones", damping=1.0)
    assert module(torch.rand(5, 8)).std(0).min() > 1e-3


def test_seeds_near_one():
    seed = LeanReduction(4000, 2000, seed_init="near_one").seed.detach()
    assert float(seed.mean()) == pytest.approx(1, abs=0.05)
    assert float(seed.std()) == pytest.approx(0.5, abs=0.05)


def test_it_shows_what_it_is():
    module = make_reduction("lean_damped", 12, 4, 1)
    assert repr(module) == (
        "LeanReduction(12, 4, dim=1, scale='magnitude', seed_init='near_one', damping=1.0, "
        "norm_floor=0.1)"
    )
    held = io.BytesIO()
    torch.save(module, held)
    held.seek(0)
    x = torch.rand(2, 12)
    assert torch.equal(torch.load(held, weights_only=False)(x), module(x))


def test_algorithm_1_is_not_damped():
    with pytest.raises(TypeError):
        power_iteration_embedding(torch.rand(4, 3), torch.rand(4), damping=1.0)
