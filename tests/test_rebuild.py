import pytest
import torch
from torch import nn

from lean_fx.errors import PassError
from lean_fx.layers.gains import Gains
from lean_fx.layers.kinds import input_channels, input_weights
from lean_fx.layers.rebuild import rebuild

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
    with pytest.raises(PassError, match="^rebuild: Bilinear is not a layer that can be rebuilt$"):
        rebuild(nn.Bilinear(8, 8, 4), 4)


RECURRENT = [
    nn.RNN(8, 6, 2, nonlinearity="relu", bias=False),
    nn.LSTM(8, 6, 2, bidirectional=True, dropout=0.5, batch_first=True),
    nn.LSTM(8, 6, proj_size=3),
    nn.GRU(8, 6, bidirectional=True).double(),
    nn.RNNCell(8, 6, nonlinearity="relu"),
    nn.LSTMCell(8, 6, bias=False),
    nn.GRUCell(8, 6),
]


@pytest.mark.parametrize("layer", RECURRENT, ids=str)
def test_all_of_a_recurrent_layer_but_its_input_weights_stays(layer):
    with torch.no_grad():
        for value in layer.parameters():
            value.mul_(3)  # an initialisation that is not torch's own
    made = rebuild(layer, 4, gains=Gains(2.0))
    assert str(made) == str(layer).replace("(8, 6", "(4, 6")
    assert vars(made).get("dropout") == vars(layer).get("dropout")
    drawn = input_weights(layer)
    for name, value in layer.named_parameters():
        new = made.get_parameter(name)
        assert new.dtype == value.dtype
        if name in drawn:
            wanted = value.square().mean().sqrt() * 2 * 2**0.5
            torch.testing.assert_close(new.square().mean().sqrt(), wanted)
        else:
            assert torch.equal(new, value)
    x = torch.rand(2, 4, dtype=value.dtype)
    assert torch.utils._pytree.tree_leaves(made(x))[0].shape[-1] == (
        6 if "proj" not in str(layer) else 3
    ) * (2 if getattr(layer, "bidirectional", False) else 1)


def test_the_scale_of_a_cell_of_rectified_units_is_that_of_its_weights():
    for seed in range(50):  # without the rule some of these were scaled twice
        torch.manual_seed(seed)
        cell = nn.RNNCell(8, 6, nonlinearity="relu")
        nn.init.zeros_(cell.bias_ih)
        nn.init.zeros_(cell.bias_hh)
        made = rebuild(cell, 4, gains=Gains(2.0))
        wanted = cell.weight_ih.square().mean().sqrt() * 2 * 2**0.5
        torch.testing.assert_close(made.weight_ih.square().mean().sqrt(), wanted)
