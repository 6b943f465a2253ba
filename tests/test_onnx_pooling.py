"""1-D max pooling in a file keeps sequences of any length."""

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lean_fx
from lean_fx.export.pooling import PoolsAnyLength

POOLS = {
    "module": nn.MaxPool1d(3, stride=2, padding=1, ceil_mode=True),
    "functional": lambda x: F.max_pool1d(x, 2, dilation=2),
    "torch": lambda x: torch.max_pool1d(x, 3, 2),
}


class Pooled(nn.Module):
    """Unpadded convolutions, each with pooling: the length has a least size."""

    def __init__(self, pool) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(1, 16, 9, stride=2)
        self.conv2 = nn.Conv1d(16, 4, 3)
        self.pool = pool

    def forward(self, x):
        return self.pool(self.conv2(self.pool(F.relu(self.conv1(x))))).mean(2)


@pytest.mark.parametrize("name", POOLS)
def test_the_length_stays_free(name, tmp_path):
    net = Pooled(POOLS[name]).eval()
    path, shapes = tmp_path / "net.onnx", ({0: "batch", 2: "length"},)
    lean_fx.export_onnx(net, path, torch.randn(2, 1, 128), dynamic_shapes=shapes)
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert nodes == ["Conv", "Relu", "MaxPool", "Conv", "MaxPool", "ReduceMean"]
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape == ["batch", 1, "length"]
    for batch, length in ((1, 40), (5, 129)):
        x = torch.randn(batch, 1, length)
        (found,) = session.run(None, {"input": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), net(x).detach())


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("shape", [(2, 3, 11), (3, 10)])
def test_it_gives_what_pooling_gives(name, shape):
    x = torch.randn(shape)
    expected = POOLS[name](x)
    with PoolsAnyLength():
        assert torch.equal(POOLS[name](x), expected)


def test_indices_that_are_asked_for_are_given():
    x = torch.randn(2, 3, 8)
    expected = F.max_pool1d(x, 2, return_indices=True)
    with PoolsAnyLength():
        found = F.max_pool1d(x, 2, return_indices=True)
    assert all(map(torch.equal, found, expected))
