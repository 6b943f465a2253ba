import pytest
import torch

from lean_fx import register_reduction
from lean_fx.controls import (
    GroupedSumReduction,
    MaxReduction,
    MeanReduction,
    ProjectionReduction,
    RandomProjectionReduction,
    SliceReduction,
)
from lean_fx.errors import ArgumentError
from lean_fx.registry import reduction_factory, reduction_name, reductions, unregister_reduction


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


def test_errors_name_the_control():
    with pytest.raises(ArgumentError, match="^MaxReduction: out_channels=5 does not divide"):
        MaxReduction(12, 5)


def test_registry():
    register_reduction("mine", MeanReduction)
    try:
        assert reduction_factory("mine") is MeanReduction
        with pytest.raises(ArgumentError, match="^register_reduction: 'mine' is taken"):
            register_reduction("mine", MaxReduction)
    finally:
        unregister_reduction("mine")
    assert reduction_name(MeanReduction) == "mean"
    with pytest.raises(ArgumentError, match="cannot be called"):
        register_reduction("mine", 3)
    with pytest.raises(ArgumentError, match="is not a name"):
        register_reduction("", MeanReduction)
    with pytest.raises(ArgumentError, match="is neither a name nor a module class"):
        reduction_factory(MeanReduction(4, 2))
