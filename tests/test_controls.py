import pickle

import pytest
import torch

import lean_fx
from lean_fx import register_reduction
from lean_fx.errors import ArgumentError
from lean_fx.measure.costs import count_macs
from lean_fx.reduction.controls import (
    GroupedSumReduction,
    MaxReduction,
    MeanReduction,
    ProjectionReduction,
    RandomProjectionReduction,
    SliceReduction,
)
from lean_fx.reduction.registry import (
    reduction_factory,
    reduction_name,
    reductions,
    unregister_reduction,
)


def literal(module, row):
    """What the docstring says, channel by channel, for one position."""
    c, r = module.out_channels, module.in_channels // module.out_channels
    group = [row[i * r : (i + 1) * r] for i in range(c)]
    if isinstance(module, SliceReduction):
        return row[:c]
    if isinstance(module, MeanReduction):
        return torch.stack([g.sum() / r for g in group])
    if isinstance(module, MaxReduction):
        return torch.stack([max(g) for g in group])
    if isinstance(module, GroupedSumReduction):
        return torch.stack(
            [sum(module.weight[i, k] * group[i][k] for k in range(r)) for i in range(c)]
        )
    return torch.stack(
        [sum(w * x for w, x in zip(module.weight[i], row, strict=True)) for i in range(c)]
    )


CONTROLS = [name for name in reductions() if not name.startswith("lean")]
KINDS = [lean_fx.LeanReduction, *map(reduction_factory, CONTROLS)]


@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("name", CONTROLS)
def test_formula(name, dim):
    module = reduction_factory(name)(12, 4, dim=dim).double()
    x = torch.randn((2, 12, 3) if dim == 1 else (2, 3, 12), dtype=torch.float64)
    y = module(x).movedim(dim, -1)
    assert y.shape == (2, 3, 4)
    rows = [literal(module, row) for row in x.movedim(dim, -1).reshape(-1, 12)]
    torch.testing.assert_close(y.reshape(-1, 4), torch.stack(rows))


PARAMETERS = {"lean": 4, "slice": 0, "mean": 0, "max": 0, "grouped_sum": 12}
PARAMETERS |= {"projection": 48, "random_projection": 0}


@pytest.mark.parametrize(
    ("name", "parameters"),
    list(PARAMETERS.items()),
)
def test_parameters(name, parameters):
    module = reduction_factory(name)(12, 4)
    assert sum(p.numel() for p in module.parameters()) == parameters


def test_random_projection_is_kept_in_the_state():
    module, other = RandomProjectionReduction(12, 4), RandomProjectionReduction(12, 4)
    other.load_state_dict(module.state_dict())
    x = torch.randn(2, 12)
    torch.testing.assert_close(other(x), module(x), rtol=0, atol=0)


def test_learned_controls_keep_the_scale():
    torch.manual_seed(0)
    x = torch.randn(4000, 400)
    for kind in (GroupedSumReduction, ProjectionReduction):
        assert kind(400, 20)(x).std().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((12, 5), "out_channels=5 does not divide in_channels=12; use 1, 2, 3, 4, 6 or 12"),
        ((12.0, 4), "in_channels=12.0 is not an int of 1 or more"),
        ((12, 4, "x"), "dim='x' is not an int"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_errors_name_the_reduction(kind, arguments, message):
    with pytest.raises(ArgumentError) as caught:
        kind(*arguments)
    assert str(caught.value) == f"{kind.__name__}: {message}"


@pytest.mark.parametrize(
    ("shape", "dim", "message"),
    [
        ((2, 12), 1, "axis 1 of [2, 12] is not in_channels=8; give such values, or another dim"),
        ((8, 4), -1, "axis -1 of [8, 4] is not in_channels=8; give such values, or another dim"),
        ((2, 8), 2, "dim=2 is not an axis of [2, 8]; give values of more axes, or another dim"),
        ((8,), -2, "dim=-2 is not an axis of [8]; give values of more axes, or another dim"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_values_of_another_width_are_refused(kind, shape, dim, message):
    module = kind(8, 4, dim)
    with pytest.raises(ArgumentError) as caught:
        module(torch.rand(shape))
    assert str(caught.value) == f"{kind.__name__}: {message}"


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_reduced_in_their_data(kind):
    module = kind(8, 4)
    packed = torch.nn.utils.rnn.pack_sequence([torch.rand(3, 8), torch.rand(2, 8)])
    out = module(packed)
    torch.testing.assert_close(out.data, module(packed.data), rtol=0, atol=0)
    assert out.batch_sizes.tolist() == packed.batch_sizes.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_it_stays_what_it_is_when_it_is_taken_elsewhere(kind, tmp_path):
    torch.compiler.reset()  # each case compiles the same code anew, of which torch keeps eight
    module, x = kind(12, 4).eval(), torch.rand(2, 12, 5)
    y = module(x)
    elsewhere = {
        "pickle": pickle.loads(pickle.dumps(module)),
        "compile": torch.compile(module, fullgraph=True, backend="eager"),
        "trace": torch.fx.symbolic_trace(module),
        "export": torch.export.export(module, (x,)).module(),
    }
    for way, other in elsewhere.items():
        torch.testing.assert_close(other(x), y, msg=way)
    torch.compiler.reset()
    lean_fx.export_onnx(module, tmp_path / "net.onnx", x)  # compares the file with the module
    macs = {GroupedSumReduction: 12, ProjectionReduction: 48, RandomProjectionReduction: 48}
    macs[lean_fx.LeanReduction] = 2 * 12 + 4 * 12
    assert module.macs_per_position == macs.get(kind, 0)
    assert count_macs(module, x) == 2 * 5 * macs.get(kind, 0)


def test_registry():
    register_reduction("mine", MeanReduction)
    try:
        assert reduction_factory("mine") is MeanReduction
        with pytest.raises(ArgumentError, match="^register_reduction: 'mine' is taken"):
            register_reduction("mine", MaxReduction)
    finally:
        unregister_reduction("mine")
    before = lean_fx.reductions()
    for name in ("mine", "lean"):  # unknown, and one of lean_fx's own
        unregister_reduction(name)
    assert lean_fx.reductions() == before
    assert reduction_name(MeanReduction) == "mean"
    for value, kind in ((3, "int"), ("lean", "str"), (MeanReduction(4, 2), "MeanReduction")):
        with pytest.raises(ArgumentError) as caught:
            register_reduction("mine", value)
        assert str(caught.value) == (
            f"register_reduction: 'mine': {kind} object is not a factory; give a module class, which "
            "is made anew for each site"
        )
    assert "mine" not in reductions()
    with pytest.raises(ArgumentError, match="is not a name"):
        register_reduction("", MeanReduction)
    with pytest.raises(ArgumentError, match="is neither a name nor a module class"):
        reduction_factory(MeanReduction(4, 2))
