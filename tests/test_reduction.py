import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reduce_all

from lean_fx import LeanReduction, lean_reduction
from lean_fx.errors import ArgumentError
from lean_fx.reduction import divisors


@st.composite
def cases(draw):
    """Values of any sign, some positions zero, with their channels along any axis."""
    preserved = draw(st.integers(1, 6))
    channels = preserved * draw(st.integers(1, 5))
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    dim = draw(st.integers(0, len(shape)))
    shape.insert(dim, channels)
    torch.manual_seed(draw(st.integers(0, 10**6)))
    x = torch.randn(shape, dtype=torch.float64)
    if draw(st.booleans()):
        x = x.relu()
    x = x * (torch.rand([1 if i == dim else n for i, n in enumerate(shape)]) > 0.2)
    return x, torch.randn(preserved, dtype=torch.float64), dim - draw(st.sampled_from([0, x.dim()]))


@given(cases())
@settings(max_examples=100, deadline=None)
def test_equals_algorithm_2(case):
    x, seed, dim = case
    torch.testing.assert_close(lean_reduction(x, seed, dim), reduce_all(x, seed, dim))


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


@pytest.mark.parametrize("relu", [True, False])
def test_gradient(relu):
    x = torch.randn(3, 12, 2, dtype=torch.float64)
    x = (x.relu() + 0.01 if relu else x).requires_grad_()
    seed = torch.randn(4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lean_reduction, (x, seed))


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


def test_compiles_whole():
    module = LeanReduction(8, 2)
    x = torch.randn(3, 8, 4)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 3), "LeanReduction: out_channels=3 does not divide in_channels=8; use 1, 2, 4 or 8"),
        ((8, 0), "LeanReduction: out_channels=0 is not an int of 1 or more"),
        ((8, 2.0), "LeanReduction: out_channels=2.0 is not an int of 1 or more"),
        ((True, 1), "LeanReduction: in_channels=True is not an int of 1 or more"),
        ((1, 2), "LeanReduction: out_channels=2 does not divide in_channels=1; use 1"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ArgumentError) as caught:
        LeanReduction(*arguments)
    assert str(caught.value) == message


@given(st.integers(1, 3000))
def test_divisors(number):
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]
