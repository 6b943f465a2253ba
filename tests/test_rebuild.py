import pytest
import torch
from torch import nn

from lean_fx.errors import PassError
from lean_fx.rebuild import input_channels, rebuild

LAYERS = [
    (nn.Conv1d(8, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 16)),
    (nn.Conv2d(8, 6, (1, 3), padding="same", bias=False, padding_mode="circular"), (2, 4, 5, 5)),
    (nn.Conv3d(8, 6, 2), (2, 4, 3, 3, 3)),
    (nn.ConvTranspose1d(8, 6, 3, stride=2, output_padding=1), (2, 4, 5)),
    (nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, bias=False), (2, 4, 5, 5)),
    (nn.ConvTranspose3d(8, 6, 2, dilation=2), (2, 4, 3, 3, 3)),
    (nn.Linear(8, 6), (2, 5, 4)),
    (nn.Linear(8, 6, bias=False), (2, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: type(v).__name__)
def test_everything_but_the_input_channels_stays(layer, shape):
    made = rebuild(layer, 4)
    assert input_channels(made) == 4
    assert type(made) is type(layer)
    kept = set(layer.__constants__) - {"in_channels", "in_features"}
    assert {name: getattr(made, name) for name in kept} == {
        name: getattr(layer, name) for name in kept
    }
    assert (made.bias is None) == (layer.bias is None)
    wide = [8 if n == 4 else n for n in shape]
    assert made(torch.rand(shape)).shape == layer(torch.rand(wide)).shape


def test_mode_dtype_and_frozen_parameters_are_kept():
    layer = nn.Linear(8, 6).double().eval()
    layer.bias.requires_grad_(False)
    made = rebuild(layer, 2)
    assert not made.training
    assert made.weight.dtype == torch.float64
    assert made.weight.requires_grad
    assert not made.bias.requires_grad


def test_unknown_layer():
    with pytest.raises(PassError, match="^rebuild: GRU is not a layer that can be rebuilt$"):
        rebuild(nn.GRU(8, 8), 4)
