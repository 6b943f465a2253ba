import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lean_fx import costs_of
from lean_fx.errors import ArgumentError
from lean_fx.measure.costs import count_macs, count_parameters


def paper_net() -> nn.Sequential:
    layers: list[nn.Module] = []
    for c_in, c_out in ((3, 50), (50, 100), (100, 150)):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(150 * 12 * 12, 10))


def paper_macs() -> int:
    convs = 3 * 50 * 96**2 + 50 * 100 * 48**2 + 100 * 150 * 24**2
    return 9 * convs + 150 * 12 * 12 * 10


class FirstChannels(nn.Module):
    """A stand-in for a reduction: it does products of its own that must not be counted twice."""

    def __init__(self, in_channels: int, out_channels: int, macs_per_position: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.macs_per_position = macs_per_position
        self.inner = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[:, : self.out_channels]


def test_macs_of_the_papers_net_follow_the_formula() -> None:
    macs = count_macs(paper_net(), torch.zeros(1, 3, 96, 96))
    assert macs == paper_macs()
    assert round(macs / 1e6, 2) == 194.10  # the figure in the paper's reconstruction


def test_parameters_of_the_papers_net_follow_the_formula() -> None:
    weights = 9 * (3 * 50 + 50 * 100 + 100 * 150) + 150 * 12 * 12 * 10
    biases = 50 + 100 + 150 + 10
    assert count_parameters(paper_net()) == weights + biases


def test_a_shared_parameter_counts_once() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert count_parameters(nn.Sequential(first, second)) == 16


def test_macs_grow_with_the_batch() -> None:
    net = nn.Linear(6, 4)
    assert count_macs(net, torch.zeros(5, 6)) == 5 * count_macs(net, torch.zeros(1, 6))


def test_a_reduction_counts_by_its_own_formula_alone() -> None:
    net = nn.Sequential(FirstChannels(8, 2, macs_per_position=32), nn.Conv2d(2, 3, 1))
    x = torch.zeros(2, 8, 5, 7)
    positions = 2 * 5 * 7
    assert count_macs(net, x) == 32 * positions + 2 * 3 * positions


def test_a_reduction_that_is_called_by_keyword() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reduction = FirstChannels(8, 2, macs_per_position=32)

        def forward(self, x: Tensor) -> Tensor:
            return self.reduction(x=x)

    assert count_macs(Named(), torch.zeros(1, 8, 2, 2)) == 32 * 4


def test_a_reduction_that_is_called_twice_counts_twice() -> None:
    reduction = FirstChannels(8, 8, macs_per_position=3)
    assert count_macs(nn.Sequential(reduction, reduction), torch.zeros(1, 8, 2, 2)) == 2 * 3 * 4


def test_a_reduction_as_the_model_itself() -> None:
    assert count_macs(FirstChannels(8, 2, macs_per_position=32), torch.zeros(1, 8, 1, 1)) == 32


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
def test_recurrent_layers_are_counted(kind: type[nn.RNNBase], gates: int) -> None:
    net = kind(8, 16, batch_first=True)  # type: ignore[call-arg]
    assert count_macs(net, torch.zeros(1, 5, 8)) == 5 * gates * 16 * (8 + 16)


def test_a_transformer_layer_is_counted_with_its_attention() -> None:
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    length = 5
    per_token = 8 * 24 + 8 * 8 + 2 * 8 * 16
    attention = 2 * length * length * 8
    assert count_macs(net, torch.zeros(1, length, 8)) == length * per_token + attention
    assert torch.backends.mha.get_fastpath_enabled()


class Token(nn.Module):
    """Gives layers a view of a parameter to read."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.proj = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.token.expand(x.shape[0], -1, -1)) + self.proj(x)


@pytest.mark.parametrize("count", [count_macs, lambda net, x: costs_of(net, x).macs])
def test_a_layer_that_reads_a_view_of_a_parameter(count: Callable[..., int]) -> None:
    net = Token()
    assert count(net, torch.zeros(2, 3, 8)) == (2 + 2 * 3) * 8 * 4
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_several_inputs() -> None:
    net = nn.MultiheadAttention(8, 2, batch_first=True)
    query, memory = torch.zeros(1, 3, 8), torch.zeros(1, 5, 8)
    projections = (3 + 5 + 5 + 3) * 8 * 8
    assert count_macs(net, (query, memory, memory)) == projections + 2 * 3 * 5 * 8


def test_the_model_stays_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout())
    net.train()
    net[2].eval()
    before = copy.deepcopy(net.state_dict())
    count_macs(net, torch.rand(4, 3, 2, 2))
    assert [module.training for module in net] == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_inputs_that_do_not_fit_are_named() -> None:
    with pytest.raises(
        ArgumentError, match=r"count_macs: Linear fails on inputs of shape \[1, 5\]"
    ):
        count_macs(nn.Linear(3, 2), torch.zeros(1, 5))
