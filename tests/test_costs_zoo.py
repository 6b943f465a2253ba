"""Costs against PyTorch's own counter and against formulas, on the models of examples/costs.py.

The models of torchvision and timm run where both are installed: ``make test-slow``.
"""

import importlib.util
import runpy
from pathlib import Path

import pytest
import torch

import lean_fx
from lean_fx.measure.costs import count_macs
from mac_formulas import nodes_that_differ

EXAMPLE = runpy.run_path(str(Path(__file__).parents[1] / "examples/costs.py"))
MODELS, SMALL = EXAMPLE["MODELS"], EXAMPLE["small_models"]()

#: Where the counts differ: the operators that FlopCounterMode takes for no work.
UNSEEN = {
    "vit_b_32": ("aten::_native_multi_head_attention",),  # the fast path of MultiheadAttention
    "timm/xcit_nano_12_p16_224": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
    "LSTM(32, 64)": ("aten::mkldnn_rnn_layer",),
    "TransformerEncoderLayer(32, 4)": ("aten::_transformer_encoder_layer_fwd",),
}


def check(name, model, inputs):
    counts = EXAMPLE["count"](model, inputs)
    assert counts.conv_macs == counts.conv_seen
    if name in UNSEEN:
        assert counts.macs > counts.seen
        assert counts.unseen == UNSEEN[name]
        assert counts.reason == ", ".join(UNSEEN[name])
    elif counts.reductions:
        assert counts.macs > counts.seen
        assert counts.reason.endswith("are LEAN's own")
    else:
        assert counts.macs == counts.seen
        assert counts.reason == ""
    # With the fused kernels off, nothing differs at all.
    assert counts.macs == count_macs(model, inputs)
    assert nodes_that_differ(lean_fx.costs_of(model, inputs), model, inputs) == []
    return counts


@pytest.mark.parametrize("name", SMALL)
def test_small_models(name):
    check(name, *SMALL[name])


def test_lean_is_all_that_the_counter_does_not_see():
    counts = EXAMPLE["count"](*SMALL["PaperNet with LEAN"])
    # Non-negative values: 4 C_in a position, before conv2, conv3 and the linear layer.
    assert counts.reductions == 4 * (50 * 48**2 + 100 * 24**2 + 150 * 12**2)
    assert counts.macs - counts.reductions <= counts.seen <= counts.macs


def test_the_table():
    counted = {"net": EXAMPLE["count"](*SMALL["GRU(32, 64)"])}
    table = EXAMPLE["markdown"](counted, "torch")
    assert f"| net | {9 * 3 * 64 * 96:,} | 0 | {9 * 3 * 64 * 96:,} | 0 | yes |  | 0 |" in table


def test_there_are_twenty_models():
    assert len(MODELS) == 20


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_of_the_zoo(name):
    for package in ("torchvision", "timm"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    torch.manual_seed(0)
    size = MODELS[name]
    model, images = EXAMPLE["build"](name).eval(), torch.rand(1, 3, size, size)
    check(name, model, images)
    costs = lean_fx.costs_of(model, images)
    assert costs.weight_bytes <= sum(
        each.nbytes for each in (*model.parameters(), *model.buffers())
    )
