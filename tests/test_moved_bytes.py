"""The bytes that every node reads and writes, by hand."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lean_fx
from graphs import Net

X = torch.zeros


def moved(net, x):
    return [
        (node.kind, node.read_bytes, node.written_bytes) for node in lean_fx.costs_of(net, x).nodes
    ]


def test_bytes_by_hand():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)
    )
    weights, statistics = 4 * (8 * 27 + 8), 4 * 4 * 8 + 8
    assert moved(net, X(2, 3, 6, 6)) == [
        ("Conv2d", 4 * 216 + weights, 4 * 256),
        ("BatchNorm2d", 4 * 256 + statistics, 4 * 256),
        ("ReLU", 4 * 256, 4 * 256),
        ("MaxPool2d", 4 * 256, 4 * 64),
    ]
    assert moved(net.half(), X(2, 3, 6, 6, dtype=torch.float16))[0] == (
        *("Conv2d", 2 * 216 + weights // 2, 2 * 256),
    )


MOVED = {
    "a view": (lambda m, x: x.transpose(0, 1), 0),
    "a view by reshape": (lambda m, x: x.reshape(12), 0),
    "a copy by reshape": (lambda m, x: x.t().reshape(12), 48 + 48),  # of the reshape
    "parts": (lambda m, x: x.chunk(2), 0),
    "an item": (lambda m, x: x[0], 0),
    "a size": (lambda m, x: x.size(0) * x, 96),
    "read twice": (lambda m, x: x * x, 96),
    "two views of one": (lambda m, x: x[:, :2] * x[:, 2:], 24 + 24 + 24),
    "expanded": (lambda m, x: x[:1].expand(3, 4) + 0, 16 + 48),
    "in place": (lambda m, x: x.add_(1), 96),
    "in place, a view of what is read": (lambda m, x: x[0].add_(x[1]), 16 + 16 + 16),
    "in place, an item": (lambda m, x: operator.setitem(x, 0, x[1]), 48 + 16 + 48),
    "dropout": (lambda m, x: F.dropout(x, training=m.training), 0),
    "contiguous already": (lambda m, x: x.contiguous(), 0),
    "several results": (lambda m, x: x.max(1), 48 + 12 + 24),
    "made": (lambda m, x: torch.zeros(5), 0),  # no node: it does not depend on the input
}


@pytest.mark.parametrize("call", MOVED)
def test_bytes_of_functions(call):
    function, expected = MOVED[call]
    costs = lean_fx.costs_of(Net(function), torch.ones(3, 4))
    assert costs.moved_bytes == expected
    assert costs.macs == 0


def test_a_look_up_reads_its_rows():
    index = torch.zeros(2, 5, dtype=torch.long)
    expected = ("Embedding", 8 * 10 + 10 * 12, 10 * 12)
    assert moved(nn.Sequential(nn.Embedding(100, 3)), index) == [expected]
    net = Net(lambda m, x: F.embedding(x, m.table), table=nn.Parameter(X(100, 3)))
    assert moved(net, index) == [("embedding", *expected[1:])]
    costs = lean_fx.costs_of(net, index)
    assert (costs.parameters, costs.weight_bytes) == (300, 1200)
    assert moved(nn.Sequential(nn.EmbeddingBag(100, 3)), index) == [
        ("EmbeddingBag", 8 * 10 + 10 * 12, 2 * 12)
    ]


def test_weights_count_where_they_are_first_read_and_are_read_each_time():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.place = nn.Linear(4, 4), nn.Parameter(X(9, 4))
            self.unread = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x)) + self.place[:3]

    nodes = lean_fx.costs_of(Twice(), X(3, 4)).nodes
    assert [node.parameters for node in nodes if node.kind == "Linear"] == [20, 0]
    assert [node.read_bytes for node in nodes if node.kind == "Linear"] == [48 + 80] * 2
    assert [(n.parameters, n.read_bytes) for n in nodes if n.kind == "getitem"] == [(0, 0)]
    assert [(n.parameters, n.read_bytes) for n in nodes if n.kind == "add"] == [(36, 96)]


def test_recurrent_layers_move_their_states_too():
    (lstm,) = lean_fx.costs_of(nn.Sequential(nn.LSTM(3, 5, batch_first=True)), X(2, 7, 3)).nodes
    weights = 4 * 5 * (3 + 5 + 2)
    assert lstm.parameters == weights
    assert lstm.read_bytes == 4 * (2 * 7 * 3 + weights)
    assert lstm.written_bytes == 4 * (2 * 7 * 5 + 2 * 5 + 2 * 5)
