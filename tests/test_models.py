"""PaperNet: its counts, its names, and the control of equal budget."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from lean_fx.errors import ArgumentError
from support.models import PaperNet, narrow_widths, parameters_of

widths_lists = st.lists(st.integers(1, 12), min_size=1, max_size=4)


def count(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def test_the_papers_count_follows_from_its_shapes():
    convolutions = (27 * 50 + 50) + (9 * 50 * 100 + 100) + (9 * 100 * 150 + 150)
    linear = 150 * 12 * 12 * 10 + 10
    assert count(PaperNet()) == convolutions + linear == 397_660


@settings(max_examples=30, deadline=None)
@given(widths_lists, st.integers(1, 4), st.integers(16, 40), st.integers(1, 5))
def test_parameters_of_counts_the_real_net_and_the_net_runs(widths, channels, size, classes):
    shape = {"in_channels": channels, "image_size": size, "classes": classes}
    net = PaperNet(widths, **shape)
    assert parameters_of(widths, **shape) == count(net)
    assert net(torch.rand(2, channels, size, size)).shape == (2, classes)


def test_a_graph_reads_layer_by_layer():
    graph = fx.symbolic_trace(PaperNet((2, 3), image_size=8)).graph
    assert [node.name for node in graph.nodes] == [
        *("x", "conv1", "relu1", "pool1", "conv2", "relu2", "pool2"),
        *("flatten", "linear", "output"),
    ]


def test_the_net_computes_its_formula():
    net = PaperNet((2,), in_channels=1, image_size=5, classes=3)
    x = torch.randn(4, 1, 5, 5)
    hidden = torch.nn.functional.conv2d(x, net.conv1.weight, net.conv1.bias, padding=1).relu()
    pooled = hidden[:, :, :4, :4].unflatten(2, (2, 2)).unflatten(4, (2, 2)).amax(dim=(3, 5))
    torch.testing.assert_close(net(x), pooled.flatten(1) @ net.linear.weight.T + net.linear.bias)


@settings(max_examples=30, deadline=None)
@given(widths_lists, st.integers(1, 3000), st.integers(16, 40))
def test_no_other_factor_comes_nearer_to_the_budget(widths, budget, size):
    shape = {"in_channels": 3, "image_size": size, "classes": 10}
    found = narrow_widths(budget, widths=widths, **shape)
    factors = [step / 1000 for step in range(1, 1001)]
    # Halves are left to the search: floats round them either way.
    nets = {
        tuple(max(1, round(factor * width)) for width in widths)
        for factor in factors
        if not any(math.isclose(factor * width % 1, 0.5) for width in widths)
    }
    nearest = min(abs(parameters_of(net, **shape) - budget) for net in nets)
    assert abs(parameters_of(found, **shape) - budget) <= nearest
    assert all(1 <= narrow <= width for narrow, width in zip(found, widths, strict=True))


def test_a_budget_out_of_reach_gives_the_nearest_end():
    assert narrow_widths(10**9) == (50, 100, 150)
    assert narrow_widths(1) == (1, 1, 1)


def test_a_picture_that_the_poolings_would_empty_is_refused():
    assert parameters_of((1, 1, 1), image_size=8) == 3 * 9 + 1 + 2 * (9 + 1) + 10 * (1 + 1)
    with pytest.raises(ArgumentError) as error:
        PaperNet(image_size=7)
    assert str(error.value) == (
        "PaperNet: image_size=7 does not survive 3 poolings of 2x2; use 8 or more, or fewer widths"
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"widths": ()}, r"widths=\(\) is not a list of ints of 1 or more"),
        ({"widths": (4, 0)}, r"widths=\(4, 0\) is not a list of ints of 1 or more"),
        ({"in_channels": 0}, "in_channels=0 is not an int of 1 or more"),
        ({"classes": -1}, "classes=-1 is not an int of 1 or more"),
    ],
)
def test_numbers_that_make_no_net_are_refused(wrong, message):
    for build in (PaperNet, parameters_of):
        with pytest.raises(ArgumentError, match=f"^PaperNet: {message}"):
            build(**wrong)
    with pytest.raises(ArgumentError, match=f"^PaperNet: {message}"):
        narrow_widths(100, **wrong)


def test_a_budget_below_one_is_refused():
    with pytest.raises(ArgumentError, match="^narrow_widths: parameters=0 is not an int of 1 or m"):
        narrow_widths(0)
