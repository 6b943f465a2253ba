"""The nets for sequences, each against its formula, and their arms."""

import pytest
import torch
from torch import nn

from lean_fx.errors import ArgumentError
from lean_fx.experiment.datasets import Dataset
from lean_fx.experiment.training import Settings, train
from lean_fx.measure.costs import count_parameters
from support.arms import sequence_arms
from support.sequence_nets import (
    SEQUENCE_WIDTHS,
    Conv1dNet,
    FullyConnectedNet,
    RecurrentNet,
    sequence_net,
)


def sequences(channels: int = 20, frames: int = 16, count: int = 70) -> Dataset:
    """Classes that differ in the channel that is loud."""
    labels = torch.arange(count) % 3
    x = torch.randn(count, channels, frames) + 4 * torch.eye(channels)[labels].unsqueeze(2)
    return Dataset.of("sequences", (x, labels), (x[:30], labels[:30]), classes=3)


@pytest.mark.parametrize(("cell", "step"), [("gru", nn.GRUCell), ("lstm", nn.LSTMCell)])
def test_a_recurrent_net_reads_both_ways_and_takes_the_mean(cell, step):
    net = RecurrentNet(cell, hidden=3, layers=2, in_channels=4, classes=2).double()
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    frames = list(x.unbind(2))
    for layer in (0, 1):
        ways = []
        for suffix in ("", "_reverse"):
            one = step(frames[0].shape[1], 3).double()
            one.load_state_dict(
                {k: getattr(net.rnn, f"{k}_l{layer}{suffix}") for k in one.state_dict()}
            )
            state, outputs = None, []
            for frame in reversed(frames) if suffix else frames:
                state = one(frame, state)
                outputs.append(state if cell == "gru" else state[0])
            ways.append(outputs[::-1] if suffix else outputs)
        frames = [torch.cat(both, 1) for both in zip(*ways, strict=True)]
    expected = torch.stack(frames).mean(0) @ net.linear.weight.T + net.linear.bias
    torch.testing.assert_close(net(x), expected)


def test_a_fully_connected_net_reads_the_mean_of_each_eighth():
    net = FullyConnectedNet((5, 6), in_channels=2, frames=16, classes=3)
    x = torch.randn(4, 2, 16)
    features = torch.stack([x[:, c, 2 * k : 2 * k + 2].mean(1) for c in (0, 1) for k in range(8)])
    hidden = (features.T @ net.linear1.weight.T + net.linear1.bias).relu()
    hidden = (hidden @ net.linear2.weight.T + net.linear2.bias).relu()
    torch.testing.assert_close(net(x), hidden @ net.linear.weight.T + net.linear.bias)


def test_a_convolutional_net_computes_its_formula():
    net = Conv1dNet((3,), in_channels=2, classes=2)
    x = torch.randn(4, 2, 9)
    padded = torch.cat([torch.zeros(4, 2, 2), x, torch.zeros(4, 2, 2)], 2)
    conv = torch.stack(
        [torch.einsum("nck,ock->no", padded[:, :, t : t + 5], net.conv1.weight) for t in range(9)],
        2,
    )
    hidden = (conv + net.conv1.bias.view(-1, 1)).relu()[:, :, :8].unflatten(2, (4, 2)).amax(3)
    torch.testing.assert_close(net(x), hidden.mean(2) @ net.linear.weight.T + net.linear.bias)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RecurrentNet("rnn"), "RecurrentNet: cell='rnn' is not known; use gru or lstm"),
        (lambda: RecurrentNet(hidden=0), "RecurrentNet: hidden=0 is not an int of 1 or more"),
        (lambda: RecurrentNet(layers=0), "RecurrentNet: layers=0 is not an int of 1 or more"),
        (lambda: FullyConnectedNet(frames=20), "FullyConnectedNet: frames=20 is not a multiple"),
        (lambda: FullyConnectedNet((4, 0)), r"FullyConnectedNet: widths=\(4, 0\) is not a list of"),
        (lambda: Conv1dNet(()), r"Conv1dNet: widths=\(\) is not a list of ints of 1 or more"),
        (lambda: Conv1dNet(classes=0), "Conv1dNet: classes=0 is not an int of 1 or more"),
        (
            lambda: sequence_net("cnn", (4,), in_channels=4, frames=8, classes=2),
            "sequence_net: kind='cnn' is not known; use gru, lstm, fc or conv1d",
        ),
        (
            lambda: sequence_arms(sequences(), "cnn"),
            "net='cnn' is not known; use gru, lstm, fc or conv1d",
        ),
    ],
)
def test_what_makes_no_net_is_refused(make, message):
    with pytest.raises(ArgumentError, match=f"^{message}"):
        make()


@pytest.mark.parametrize("net", SEQUENCE_WIDTHS)
def test_arms_share_the_first_layer_and_the_budget(net):
    data = sequences()
    baseline, lean, narrow = sequence_arms(data, net, skip=(), seed=5).values()
    counts = [count_parameters(model) for model in (baseline, lean, narrow)]
    assert counts[1] < counts[0]
    assert abs(counts[2] - counts[1]) < 0.05 * counts[1]
    first = next(iter(baseline.state_dict().values()))
    assert torch.equal(next(iter(lean.state_dict().values())), first)
    for model in (baseline, lean, narrow):
        assert model(data.train_x[:2]).shape == (2, 3)


@pytest.mark.parametrize(
    ("net", "reduced"),
    [
        ("fc", ["linear2", "linear3"]),
        ("conv1d", ["conv2", "conv3"]),
        ("gru", ["rnn.1", "rnn.2"]),
        ("lstm", ["rnn.1", "rnn.2"]),
    ],
)
def test_the_first_and_the_last_layer_are_left_alone(net, reduced):
    lean = sequence_arms(sequences(), net)["lean"]
    sites = lean.meta["lean_fx.plan"].sites
    assert [layer for site in sites for layer in site.layers] == reduced
    assert {site.out_channels for site in sites} == {16}


def test_a_recurrent_net_trains_on_sequences(tmp_path):
    data = sequences(frames=8)
    torch.manual_seed(0)
    model = RecurrentNet(hidden=6, layers=1, in_channels=20, classes=3)
    settings = Settings(epochs=3, batch_size=16, learning_rate=0.03, accelerator="cpu")
    history = train(model, data, settings, tmp_path)
    assert history[-1].test_accuracy > 0.8
