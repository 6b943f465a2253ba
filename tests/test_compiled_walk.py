"""The default walk by the compiled library: forward, both gradients, and what it is left out of."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lean_fx.errors import ArgumentError
from lean_fx.reduction.compiled_walk import compiled_walk
from lean_fx.reduction.functional import lean_reduction
from lean_fx.reduction.library import takes
from lean_fx.reduction.options import Walk
from lean_fx.reduction.reference import reference_walk, scaled

if not takes(torch.zeros(1)):
    pytest.skip("lean_fx was installed without a compiler of C++", allow_module_level=True)

POSITIVE, ANY_SIGN = Walk(nonnegative=True), Walk()
SHAPES = [
    ((2, 12, 5, 7), 1),  # blocks that cross images
    ((1, 12, 64), 1),  # whole blocks
    ((5, 12), 1),
    ((12,), 0),
    ((3, 4, 12), 2),
    ((2, 12, 1, 1), 1),
    ((12, 3, 3), 0),
    ((0, 12, 4), 1),
    ((2, 12, 0), 1),
    ((33, 48, 3, 3), 1),
    ((37, 36), 1),  # squares of positions and channels, and what is left of both
    ((5, 20, 72), 2),
]


def by_reference(x, seed, axis, walk):
    return scaled(reference_walk(x, seed, axis, walk), x, axis, walk)


@pytest.mark.parametrize(
    ("damping", "floor", "scale"), [(0.0, 0.0, "sum"), (0.3, 0.0, "mean"), (0.3, 0.2, "magnitude")]
)
@pytest.mark.parametrize("layout", ["contiguous", "interleaved"])
@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_the_reference_in_float64(shape, axis, nonnegative, layout, damping, floor, scale):
    torch.manual_seed(0)
    walk = Walk(nonnegative, scale=scale, layout=layout, damping=damping, norm_floor=floor)
    for preserved in (1, 4, 6, shape[axis]):
        x = torch.rand(shape, dtype=torch.float64) - (0.0 if nonnegative else 0.5)
        x[x.abs() < 0.1] = 0.0
        seed = torch.randn(preserved, dtype=torch.float64)
        outs, grads = [], []
        for way in (compiled_walk, by_reference):
            inputs = [x.clone().requires_grad_(), seed.clone().requires_grad_()]
            out = way(*inputs, axis, walk)
            outs.append(out)
            weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).reshape(out.shape)
            grads.append(torch.autograd.grad((out * weights).sum(), inputs))
        torch.testing.assert_close(outs[0], outs[1])
        torch.testing.assert_close(grads[0], grads[1])
        single = compiled_walk(x.float(), seed.float(), axis, walk)
        torch.testing.assert_close(single, outs[1].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", ["sum", "magnitude"])
@pytest.mark.parametrize("nonnegative", [True, False])
def test_gradients_and_those_of_gradients(nonnegative, scale):
    torch.manual_seed(1)
    x = (torch.rand(2, 6, 3, dtype=torch.float64) + 0.1).requires_grad_()
    seed = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def call(x, seed):
        return compiled_walk(x, seed, 1, Walk(nonnegative, scale=scale))

    assert torch.autograd.gradcheck(call, (x, seed))
    assert torch.autograd.gradgradcheck(call, (x, seed))


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_a_gradient_of_one_alone(needs):
    x, seed = torch.rand(2, 8, 5), torch.rand(4)
    both = [each.clone().requires_grad_() for each in (x, seed)]
    one = [each.clone().requires_grad_(need) for each, need in zip((x, seed), needs, strict=True)]
    for inputs in (both, one):
        compiled_walk(*inputs, 1, POSITIVE).square().sum().backward()
    for each, own, need in zip(both, one, needs, strict=True):
        assert (own.grad is not None) == need
        if need:
            torch.testing.assert_close(own.grad, each.grad)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads):
    torch.manual_seed(2)
    x, seed = torch.randn(8, 64, 40, 40), torch.randn(8)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            inputs = [x.clone().requires_grad_(), seed.clone().requires_grad_()]
            out = compiled_walk(*inputs, 1, ANY_SIGN)
            results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=0, atol=0)
    torch.testing.assert_close(results[0][2], results[1][2])


def test_channels_last_memory_stays_so():
    x = torch.rand(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    seed = torch.rand(4)
    out = lean_reduction(x, seed)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, lean_reduction(x.contiguous(), seed))
    strided = torch.rand(2, 16, 5)[:, ::2]
    torch.testing.assert_close(
        lean_reduction(strided, seed), lean_reduction(strided.contiguous(), seed)
    )


def test_the_gradient_may_be_expanded_and_x_of_another_layout():
    x = torch.rand(2, 5, 8).mT.requires_grad_()
    lean_reduction(x, torch.rand(4)).sum().backward()
    assert x.grad.shape == x.shape
    assert x.grad.isfinite().all()


TAKEN = [{}, {"scale": "mean"}, {"scale": "magnitude", "damping": 1.0}]
LEFT_OUT = [
    {"iterations": 2},
    {"normalize": "row"},
    {"normalize": "none"},
    {"tol": 1e-3, "iterations": 3},
]


@pytest.mark.parametrize(
    ("nonnegative", "options"), itertools.product([True, False], [*TAKEN, *LEFT_OUT]), ids=str
)
def test_without_the_library_the_numbers_are_the_same(monkeypatch, nonnegative, options):
    torch.manual_seed(3)
    x, seed = torch.rand(3, 24, 5, 5), torch.randn(6)
    calls = []
    monkeypatch.setattr(
        "lean_fx.reduction.functional.compiled_walk",
        lambda *given: (calls.append(given), compiled_walk(*given))[1],
    )
    results = []
    for built in (True, False):
        if not built:
            monkeypatch.setattr("lean_fx.reduction.functional.takes", lambda x: False)
        inputs = [x.clone().requires_grad_(), seed.clone().requires_grad_()]
        out = lean_reduction(*inputs, nonnegative=nonnegative, **options)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert len(calls) == (options in TAKEN)


def test_what_it_is_left_out_of():
    seed = torch.rand(4)
    assert not takes(torch.rand(2, dtype=torch.float16))
    assert not takes(torch.rand(2, device="meta"))
    assert not takes(torch.rand(2, 2).to_sparse())
    half = lean_reduction(torch.rand(2, 8).bfloat16(), seed)  # it is walked in float32
    assert half.dtype is torch.bfloat16
    mapped = torch.vmap(lambda x: lean_reduction(x, seed, 0))(torch.ones(3, 8))
    torch.testing.assert_close(mapped, lean_reduction(torch.ones(3, 8), seed))
    jacobian = torch.func.jacrev(lambda x: lean_reduction(x, seed, 0))(torch.rand(8))
    assert jacobian.shape == (4, 8)


@pytest.mark.parametrize("scale", ["sum", "magnitude"])
def test_little_is_kept_for_the_gradient(scale):
    kept = []
    x, seed = torch.rand(4, 64, 16, 16, requires_grad=True), torch.rand(8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        lean_reduction(x, seed, scale=scale)
    assert sum(each.numel() for each in kept) == x.numel() + seed.numel()


def test_counters_see_the_operations():
    class Seen(TorchDispatchMode):
        names = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names += (func.name(),)
            return func(*args, **(kwargs or {}))

    x, seed = torch.rand(2, 8, 3), torch.rand(4)
    with Seen() as seen:
        out = lean_reduction(x, seed)
    assert any("mul" in name for name in seen.names)
    torch.testing.assert_close(out, lean_reduction(x, seed))


# -- as an operator of torch ---------------------------------------------------------------------


@pytest.mark.parametrize("nonnegative", [True, False])
def test_the_operators_are_sound(nonnegative):
    options = (nonnegative, "magnitude", "contiguous", 0.1, 0.2)
    x, seed = torch.rand(2, 12, 5), torch.rand(4)
    torch.library.opcheck(torch.ops.lean_fx.walk_gradient.default, (x, seed, x[:, :4], *options))
    inputs = (x.requires_grad_(), seed.requires_grad_(), *options)
    torch.library.opcheck(torch.ops.lean_fx.walk.default, inputs)


@pytest.mark.parametrize(
    ("x", "options"),
    [
        (torch.rand(2, 12, 5, 7), {"nonnegative": True, "layout": "interleaved"}),
        (torch.randn(2, 12, 5, 7).contiguous(memory_format=torch.channels_last), {}),
        (torch.randn(2, 5, 12), {"dim": -1, "damping": 0.5, "scale": "magnitude"}),
    ],
)
def test_compiled_code_calls_the_operator(x, options):
    def run(call, x):
        inputs = [x.clone().requires_grad_(), seed.clone().requires_grad_()]
        out = call(*inputs)
        weights = torch.linspace(0, 1, out.numel()).reshape(out.shape)
        return out.stride(), (out, *torch.autograd.grad((out.square() * weights).sum(), inputs))

    def reduce(x, seed):
        return lean_reduction(x, seed, **options)

    def backend(graph, inputs):
        called.extend(node.target for node in graph.graph.nodes)
        return graph

    seed, called = torch.randn(4), []
    torch.compiler.reset()
    torch.compile(reduce, backend=backend, fullgraph=True)(x, seed)
    assert torch.ops.lean_fx.walk.default in called
    compiled = torch.compile(reduce, backend="aot_eager", fullgraph=True)
    for given in (x, torch.cat([x, x])):
        found, wanted = run(compiled, given), run(reduce, given)
        assert found[0] == wanted[0]
        torch.testing.assert_close(found[1], wanted[1])


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_needs_no_library(strict):
    class Reduces(torch.nn.Module):
        def forward(self, x, seed):
            return lean_reduction(x, seed)

    program = torch.export.export(Reduces(), (torch.rand(2, 12), torch.rand(4)), strict=strict)
    assert "lean_fx" not in str(program.graph)


def test_a_call_of_the_operator_is_exported():
    class Calls(torch.nn.Module):
        def forward(self, x, seed):
            return torch.ops.lean_fx.walk(x, seed, True, "sum", "contiguous", 0.0, 0.0)

    x, seed = torch.rand(2, 12, 5), torch.rand(4)
    shapes = {"x": {0: torch.export.Dim("n")}, "seed": None}
    program = torch.export.export(Calls(), (x, seed), dynamic_shapes=shapes)
    more = torch.rand(7, 12, 5)
    torch.testing.assert_close(program.module()(more, seed), lean_reduction(more, seed))


def test_a_seed_on_another_device_is_an_error():
    with pytest.raises(RuntimeError, match="device"):
        lean_reduction(torch.randn(2, 6, 5), torch.ones(3, device="meta"))


def test_tensors_whose_numbers_are_not_in_memory_as_they_read():
    x, seed = torch.randn(2, 6, 5, requires_grad=True), torch.randn(3, requires_grad=True)
    out, grad = lean_reduction(x, seed), torch.randn(2, 3, 5)
    turned = lean_reduction(torch._neg_view(x), torch._neg_view(seed))
    torch.testing.assert_close(turned, lean_reduction(-x, -seed))
    wanted = torch.autograd.grad(out, (x, seed), -grad, retain_graph=True)
    found = torch.autograd.grad(out, (x, seed), torch._neg_view(grad), retain_graph=True)
    torch.testing.assert_close(found, wanted)
    nothing = torch._efficientzerotensor((2, 3, 5))
    assert not any(each.any() for each in torch.autograd.grad(out, (x, seed), nothing))
    none = torch._efficientzerotensor((2, 6, 5))
    torch.testing.assert_close(lean_reduction(none, seed), lean_reduction(none.clone(), seed))


@pytest.mark.parametrize(
    ("x", "seed"),
    [
        (torch.rand(2, 6, 5).double(), torch.rand(3)),
        (torch.rand(2, 6, 5), torch.rand(4)),
        (torch.rand(2, 6, 5), torch.rand(3, 2)),
        (torch.rand(2, 6, 5).half(), torch.rand(3).half()),
    ],
    ids=["dtypes", "divisor", "matrix", "half"],
)
def test_the_operator_refuses_a_seed_that_does_not_fit(x, seed):
    with pytest.raises(
        ArgumentError, match=r"^lean_fx::walk: seed=\[.*\] of torch\..* does not fit"
    ):
        torch.ops.lean_fx.walk(x, seed, True, "sum", "contiguous", 0.0, 0.0)
