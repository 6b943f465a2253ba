import copy
import itertools
import pickle
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from lean_fx import LeanReduction, lean_reduction, power_iteration_embedding
from lean_fx.errors import ArgumentError, LeanError
from lean_fx.reduction.base import divisors
from lean_fx.reduction.functional import checking_signs
from reference import algorithm_2, reduce_all

OPTIONS = {
    "normalize": ("column", "row", "none"),
    "scale": ("sum", "mean", "magnitude"),
    "layout": ("contiguous", "interleaved"),
    "iterations": (1, 2, 5),
}


@st.composite
def cases(draw):
    """Values, some positions zero, channels along any axis; a seed; whether values are signed."""
    preserved = draw(st.integers(1, 6))
    reducible = draw(st.integers(1, 5))
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    dim = draw(st.integers(0, len(shape)))
    shape.insert(dim, preserved * reducible)
    torch.manual_seed(draw(st.integers(0, 10**6)))
    x = torch.randn(shape, dtype=torch.float64)
    nonnegative = draw(st.booleans())
    x = x.relu() if nonnegative else x
    x = x * (torch.rand([1 if i == dim else n for i, n in enumerate(shape)]) > 0.2)
    matrix = draw(st.booleans())
    seed = torch.randn((preserved, reducible) if matrix else preserved, dtype=torch.float64)
    return x, seed, dim - draw(st.sampled_from([0, x.dim()])), nonnegative


def runs(x, seed, dim, **options):
    """The reduction on its two ways: hand-written where that applies, and plain as when traced."""
    yield lean_reduction(x, seed, dim, **options)
    with mock.patch("lean_fx.reduction.functional._runs_eagerly", return_value=False):
        yield lean_reduction(x, seed, dim, **options)


@given(cases(), st.fixed_dictionaries({k: st.sampled_from(v) for k, v in OPTIONS.items()}))
@settings(max_examples=200, deadline=None)
def test_equals_the_literal_algorithm(case, options):
    x, seed, dim, nonnegative = case
    expected = reduce_all(x, seed, dim, **options)
    for found in runs(x, seed, dim, nonnegative=nonnegative, **options):
        torch.testing.assert_close(found, expected)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_both_ways_have_the_same_gradient(case):
    x, seed, dim, nonnegative = case
    weights = torch.randn_like(lean_reduction(x, seed, dim))
    gradients = []
    for way in range(2):
        leaf, v = x.clone().requires_grad_(), seed.clone().requires_grad_()
        y = list(runs(leaf, v, dim, nonnegative=nonnegative))[way]
        gradients.append(torch.autograd.grad((y * weights).sum(), (leaf, v)))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_zero_positions_give_zero_forward_and_backward():
    x = torch.rand(2, 6, 4)
    x[0, :, 1] = 0
    x[1, 0:2, 2] = 0  # one preserved channel of zeros
    x.requires_grad_()
    module = LeanReduction(6, 3)
    y = module(x)
    y.square().sum().backward()
    assert y[0, :, 1].tolist() == [0, 0, 0]
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(module.seed.grad).all()


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_gradients_are_finite_at_extreme_scales(scale):
    x = (torch.rand(5, 12) * scale).requires_grad_()
    y = lean_reduction(x, torch.randn(4))
    y.square().sum().backward()
    torch.testing.assert_close(y.abs().sum(1), torch.ones(5))
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("shape", [(2, 12, 2), (3, 12), (1, 12, 2, 2)])
@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("preserved", [2, 6])
def test_gradient(shape, nonnegative, preserved):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    x = (x.abs() + 0.01 if nonnegative else x).requires_grad_()
    seed = torch.randn(preserved, dtype=torch.float64).requires_grad_()
    for way in range(2):

        def reduce(x, seed, way=way):
            return list(runs(x, seed, 1, nonnegative=nonnegative))[way]

        assert torch.autograd.gradcheck(reduce, (x, seed))


@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("dim", [1, -1])
def test_blocks_do_not_show(nonnegative, dim, monkeypatch):
    x = torch.randn(7, 12, 5) if dim == 1 else torch.randn(7, 5, 12)
    x = x.relu() if nonnegative else x
    seed = torch.randn(4)
    found = []
    for size in (1, 700, 10**9):
        monkeypatch.setattr("lean_fx.reduction.walk._BLOCK_BYTES", size)
        leaf, v = x.clone().requires_grad_(), seed.clone().requires_grad_()
        y = lean_reduction(leaf, v, dim, nonnegative=nonnegative)
        found.append((y, *torch.autograd.grad(y.square().sum(), (leaf, v))))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preserved", [2, 5, 10])
def test_what_is_kept_for_the_gradient(preserved):
    x = torch.rand(2, 50, 16, 16).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.nbytes) or t, lambda t: t
    ):
        lean_reduction(x, torch.randn(preserved), nonnegative=True)
    assert sum(kept) <= 1.5 * x.nbytes + preserved * 4  # the seed is kept too


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nonnegative", [True, False])
def test_half_precision_is_reduced_in_float32(dtype, nonnegative):
    x = torch.randn(4, 12, 6).relu().to(dtype)
    module = LeanReduction(12, 4, nonnegative=nonnegative)
    exact = module(x.float())
    half = module.to(dtype)(x)
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), exact, rtol=0.02, atol=0.02)
    half.sum().backward()
    assert torch.isfinite(module.seed.grad).all()


@pytest.mark.parametrize("nonnegative", [True, False])
def test_autocast_does_not_reach_inside(nonnegative):
    x = torch.rand(4, 12, 6)
    module = LeanReduction(12, 4, nonnegative=nonnegative)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(x)
    torch.testing.assert_close(found, module(x), rtol=0, atol=0)


@pytest.mark.parametrize("nonnegative", [True, False])
def test_vmap(nonnegative):
    x, seed = torch.rand(3, 5, 12), torch.randn(4)
    found = torch.vmap(lambda one: lean_reduction(one, seed, nonnegative=nonnegative))(x)
    torch.testing.assert_close(found, lean_reduction(x, seed, -1, nonnegative=nonnegative))


def test_signs_are_checked_only_on_demand():
    x = torch.tensor([[-1.0, 2.0]])
    lean_reduction(x, torch.ones(2), nonnegative=True)
    with pytest.raises(LeanError, match="but the least value is -1; leave"), checking_signs():
        lean_reduction(x, torch.ones(2), nonnegative=True)
    lean_reduction(x, torch.ones(2), nonnegative=True)


def test_tol_stops_early_and_late():
    x, seed = torch.rand(5, 12, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    steps = [lean_reduction(x, seed, iterations=n) for n in range(1, 60)]
    changes = [float((b - a).abs().max()) for a, b in itertools.pairwise(steps)]
    tol = 1e-3
    first = next(n for n, change in enumerate(changes) if change < tol)
    found = lean_reduction(x, seed, iterations=60, tol=tol)
    torch.testing.assert_close(found, steps[first + 1], rtol=0, atol=0)
    assert not torch.equal(found, steps[first])


def test_power_iteration_embedding_is_algorithm_1():
    matrix, seed = torch.rand(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    embedded = power_iteration_embedding(matrix, seed, iterations=3)
    expected = algorithm_2(matrix.flatten(), seed, normalize="row", iterations=3)
    torch.testing.assert_close(embedded, expected)
    converged = power_iteration_embedding(matrix, seed, tol=1e-12)
    torch.testing.assert_close(converged.abs(), torch.full((4,), 0.25, dtype=torch.float64))
    with pytest.raises(ArgumentError, match="matrix .4, 6. and seed .3. do not fit; give a matrix"):
        power_iteration_embedding(matrix, seed[:3])


@pytest.mark.parametrize("init", ["normal", "uniform", "ones"])
def test_seed_init(init):
    seed = LeanReduction(4000, 2000, seed_init=init).seed.detach()
    mean, std = {"normal": (0, 1), "uniform": (0.5, 12**-0.5), "ones": (1, 0)}[init]
    assert float(seed.mean()) == pytest.approx(mean, abs=0.1)
    assert float(seed.std()) == pytest.approx(std, abs=0.05)


def test_empty_batch():
    assert LeanReduction(8, 2)(torch.rand(0, 8, 3)).shape == (0, 2, 3)


def test_is_an_ordinary_module():
    module = LeanReduction(8, 2)
    x = torch.rand(3, 8)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(x), module(x), rtol=0, atol=0)
    other = LeanReduction(8, 2)
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(x), module(x), rtol=0, atol=0)
    assert list(module.state_dict()) == ["seed"]
    assert module.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("nonnegative", [True, False])
def test_compiles_and_exports_whole(nonnegative):
    module = LeanReduction(8, 2, nonnegative=nonnegative)
    x = torch.rand(3, 8, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "interleaved"])
@pytest.mark.parametrize(("shape", "dim"), [((3, 8, 5), 1), ((2, 3, 8), -1), ((3, 8), 1)])
def test_compiled_gradients_are_the_eager_ones(shape, dim, layout, nonnegative):
    x = torch.rand(shape, dtype=torch.float64) if nonnegative else torch.randn(shape).double()
    x.movedim(dim, 0)[:, 0] = 0  # a position of zeros
    x.movedim(dim, 0)[::2, 1] = 0  # and, interleaved, channels of zeros
    module = LeanReduction(8, 2, dim, layout=layout, nonnegative=nonnegative).double()
    torch.compiler.reset()  # each case compiles the same code anew, of which torch keeps eight
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = []
    for form in (compiled, module):
        given = x.clone().requires_grad_()
        out = form(given)
        loss = (out * torch.arange(out.numel()).view_as(out)).sum()
        found.append((out, *torch.autograd.grad(loss, (given, module.seed))))
    for compiled_value, eager_value in zip(*found, strict=True):
        torch.testing.assert_close(compiled_value, eager_value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 3), "LeanReduction: out_channels=3 does not divide in_channels=8; use 1, 2, 4 or 8"),
        ((8, 0), "LeanReduction: out_channels=0 is not an int of 1 or more"),
        ((8, 2.0), "LeanReduction: out_channels=2.0 is not an int of 1 or more"),
        ((True, 1), "LeanReduction: in_channels=True is not an int of 1 or more"),
        ((8, 4, True), "LeanReduction: dim=True is not an int"),
        ((1, 2), "LeanReduction: out_channels=2 does not divide in_channels=1; use 1"),
        ({"scale": "max"}, "LeanReduction: scale='max' is not known; use sum, mean or magnitude"),
        ({"normalize": 1}, "LeanReduction: normalize=1 is not known; use column, row or none"),
        ({"seed": "all"}, "LeanReduction: seed='all' is not known; use vector or matrix"),
        (
            {"layout": "odd"},
            "LeanReduction: layout='odd' is not known; use contiguous or interleaved",
        ),
        (
            {"seed_init": "x"},
            "LeanReduction: seed_init='x' is not known; use normal, uniform, ones or near_one",
        ),
        ({"tol": 0}, "LeanReduction: tol=0 is not a finite number above 0; leave it out for none"),
        (
            {"seed_init": "ones", "normalize": "row"},
            "LeanReduction: seed_init='ones' with normalize='row' is a dead layer, as the walk keeps a "
            "constant seed; use normal, uniform or near_one",
        ),
        ({"iterations": 0}, "LeanReduction: iterations=0 is not an int of 1 or more"),
    ],
)
def test_errors(arguments, message):
    options = arguments if isinstance(arguments, dict) else {}
    with pytest.raises(ArgumentError) as caught:
        LeanReduction(*(arguments if not options else (8, 4)), **options)
    assert str(caught.value) == message


@given(st.integers(1, 3000))
def test_divisors(number):
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


FUNCTION_ERRORS = [
    ({"x": [1.0]}, "x is a list; give a tensor"),
    ({"x": torch.arange(12)}, "x is torch.int64; give floating-point values"),
    ({"seed": torch.randn(4).cfloat()}, "seed is torch.complex64; give floating-point values"),
    (
        {"dim": 2},
        "dim=2 is not an axis of x, which has 2; give the axis of its channels",
    ),
    ({"dim": 1.0}, "dim=1.0 is not an int"),
    *(
        (
            {"seed": torch.randn(shape)},
            f"seed {list(shape)} does not fit the 12 channels of x; give [C'] with a C' that "
            "divides them, or [C', C''] with as many values",
        )
        for shape in ((5,), (4, 2), (4, 3, 1), (), (0,))
    ),
    ({"normalize": "colum"}, "normalize='colum' is not known; use column, row or none"),
    ({"scale": "foo"}, "scale='foo' is not known; use sum, mean or magnitude"),
    ({"layout": None}, "layout=None is not known; use contiguous or interleaved"),
    ({"iterations": 0}, "iterations=0 is not an int of 1 or more"),
    ({"iterations": True}, "iterations=True is not an int of 1 or more"),
    ({"tol": -1.0}, "tol=-1.0 is not a finite number above 0; leave it out for none"),
]


@pytest.mark.parametrize(("changed", "message"), FUNCTION_ERRORS)
def test_errors_of_the_function(changed, message):
    arguments = {"x": torch.rand(2, 12), "seed": torch.randn(4), **changed}
    with pytest.raises(ArgumentError) as caught:
        lean_reduction(**arguments)
    assert str(caught.value) == f"lean_reduction: {message}"


@pytest.mark.parametrize(
    ("matrix", "seed", "message"),
    [
        ([[1.0, 2.0]], torch.rand(1), "matrix is a list; give a tensor"),
        (torch.rand(1, 2), [1.0], "seed is a list; give a tensor"),
        (torch.ones(2, 2).long(), torch.rand(2), "matrix is torch.int64; give floating-point val"),
    ],
)
def test_what_is_no_matrix_or_seed(matrix, seed, message):
    with pytest.raises(ArgumentError, match=f"^power_iteration_embedding: {message}"):
        power_iteration_embedding(matrix, seed)


def test_errors_of_power_iteration_embedding():
    with pytest.raises(ArgumentError, match="seed holds 1 alone, which the walk keeps; give"):
        power_iteration_embedding(torch.rand(4, 3), torch.ones(4))
    with pytest.raises(ArgumentError, match="iterations=0 is not an int of 1 or more"):
        power_iteration_embedding(torch.rand(4, 3), torch.rand(4), iterations=0)


@pytest.mark.parametrize("nonnegative", [True, False])
def test_the_gradient_has_a_gradient(nonnegative):
    x = torch.rand(12, dtype=torch.float64) - (0 if nonnegative else 0.5)
    seed = torch.randn(4, dtype=torch.float64)

    def energy(x, seed):
        return lean_reduction(x, seed, 0, nonnegative=nonnegative).pow(2).sum()

    hessian = torch.autograd.functional.hessian(energy, (x, seed))
    expected = torch.func.hessian(energy, (0, 1))(x, seed)  # by the plain formulas
    for ours, theirs in zip(hessian, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)
    assert hessian[0][0].abs().max() > 0.1
    assert torch.autograd.gradgradcheck(
        lambda x: lean_reduction(x, seed, 0, nonnegative=nonnegative), x.requires_grad_()
    )


def test_the_output_may_be_changed_in_place():
    x = torch.randn(2, 12, 3, requires_grad=True)
    seed = torch.randn(4)
    lean_reduction(x, seed).relu_().sum().backward()
    changed, x.grad = x.grad, None
    lean_reduction(x, seed).relu().sum().backward()
    assert torch.equal(changed, x.grad)


def test_on_the_meta_device():
    reduced = lean_reduction(torch.empty(2, 12, device="meta"), torch.empty(4, device="meta"))
    assert reduced.shape == (2, 4)


def test_a_negative_value_is_found_beside_nan():
    x = torch.tensor([[float("nan"), -1.0]])
    with checking_signs(), pytest.raises(LeanError, match="the least value is -1"):
        lean_reduction(x, torch.ones(2), nonnegative=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_takes_other_shapes():
    traced = torch.jit.trace(LeanReduction(12, 4), torch.rand(2, 12, 5))
    assert traced(torch.rand(3, 12, 7)).shape == (3, 4, 7)


@pytest.mark.parametrize("options", [{}, {"nonnegative": True}, {"normalize": "row"}])
def test_forward_mode(options):
    x, tangent = torch.rand(2, 12).double(), torch.randn(2, 12).double()
    seed = torch.rand(4).double()

    def reduce(value):
        return lean_reduction(value, seed, 1, **options)

    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(reduce(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, torch.func.jvp(reduce, (x,), (tangent,))[1])
