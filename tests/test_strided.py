"""1 x 1 convolutions of a stride and few channels are trained in contiguous memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lean_fx
from lean_fx.layers.rebuild import rebuild
from lean_fx.layers.strided import StridedConv2d

MALLOC = Path("/lib/x86_64-linux-gnu/libc_malloc_debug.so.0")


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 16, 3, 2, padding=1)
        self.c = nn.Conv2d(32, 16, 1, stride=2)

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.b(x) + self.c(x)


@pytest.mark.parametrize(
    ("conv", "strided"),
    [
        (nn.Conv2d(32, 16, 1, stride=2), True),
        (nn.Conv2d(32, 16, 1, stride=(1, 3), groups=2), True),
        (nn.Conv2d(32, 16, 1), False),
        (nn.Conv2d(32, 16, 3, stride=2), False),
    ],
)
def test_which_are(conv, strided):
    assert type(rebuild(conv, 4)) is (StridedConv2d if strided else nn.Conv2d)
    assert type(rebuild(conv, 16)) is nn.Conv2d
    made = rebuild(conv, 4)
    plain = nn.Conv2d(4, 16, made.kernel_size, made.stride, made.padding, groups=made.groups)
    plain.load_state_dict(made.state_dict())
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(made(x), plain(x))


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_torch_is_given_contiguous_memory(channels, monkeypatch):
    seen = []

    def convolve(self, x, weight, bias):
        seen.append((x.stride(), weight.stride()))
        return nn.Conv2d._conv_forward(self, x, weight, bias)

    monkeypatch.setattr(StridedConv2d, "_conv_forward", convolve, raising=False)
    conv = rebuild(nn.Conv2d(28, 6, 1, stride=2), channels).to(memory_format=torch.channels_last)
    x = torch.randn(2, channels, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    conv(x).sum().backward()
    assert seen == [((36 * channels, 36, 6, 1), (channels, 1, 1, 1))]
    assert x.grad.shape == x.shape


@pytest.mark.skipif(not MALLOC.exists(), reason="needs glibc's library that checks the heap")
def test_the_heap_stays_whole():
    code = """
import torch, lean_fx
from test_strided import Shortcut
torch.set_num_threads(1)
lean = lean_fx.leanify(Shortcut(), torch.rand(2, 3, 8, 8), channels=4)
lean = lean.to(memory_format=torch.channels_last)
for _ in range(10):
    x = torch.rand(2, 3, 12, 12).to(memory_format=torch.channels_last)
    lean(x).square().sum().backward()
"""
    env = {"LD_PRELOAD": str(MALLOC), "GLIBC_TUNABLES": "glibc.malloc.check=3"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-500:]


def test_it_is_reduced_again_and_exported(tmp_path):
    x = torch.rand(2, 3, 8, 8)
    lean = lean_fx.leanify(Shortcut(), x, channels=4)
    assert type(lean.c) is StridedConv2d
    lean_fx.export_onnx(lean, tmp_path / "net.onnx", x)
    assert "StridedConv2d" not in str(lean_fx.plan(Shortcut(), x))
    conv = StridedConv2d(32, 16, 1, stride=2)
    assert rebuild(conv, 4).in_channels == 4
