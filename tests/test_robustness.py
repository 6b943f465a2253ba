"""What many calls and large models must not do."""

import gc
import linecache

import pytest
import torch
from torch import nn

import lean_fx


def small_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 4 * 4, 10)),
    )


def objects_after(calls: int) -> int:
    """How many objects Python keeps after so many leanifies of one model.

    The source of every GraphModule that was ever compiled is left out: torch.fx keeps that for
    tracebacks, whoever made the GraphModule.
    """
    model, inputs = small_cnn(), torch.rand(2, 3, 8, 8)
    for _ in range(calls):
        lean_fx.leanify(model, inputs)
    for name in [name for name in linecache.cache if name.startswith("<eval_with_key>")]:
        del linecache.cache[name]
    gc.collect()
    return len(gc.get_objects())


def test_leanify_keeps_nothing():
    objects_after(5)  # what is made once
    before = objects_after(1)
    assert objects_after(31) - before < 30


@pytest.mark.slow
def test_a_thousand_leanifies_keep_nothing():
    objects_after(5)
    before = objects_after(1)
    assert objects_after(1001) - before < 30


@pytest.mark.parametrize("given", [False, True], ids=["without inputs", "with inputs"])
def test_a_billion_parameters_are_planned_without_memory(given):
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(2560, 32, 10240, batch_first=True)
        model, inputs = nn.TransformerEncoder(layer, 13), torch.rand(2, 16, 2560)
    assert sum(parameter.numel() for parameter in model.parameters()) > 10**9
    plan = lean_fx.plan(model, inputs if given else None)
    assert len(plan.sites) == 51
