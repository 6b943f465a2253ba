"""F.multi_head_attention_forward is seen as the layers whose weights it is given."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lean_fx
from lean_fx.capture.capturing import capture

X = torch.rand(5, 2, 64)


class Separate(nn.Module):
    """CLIP's AttentionPool2d."""

    def __init__(self, drops=0.0, **options):
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.q, self.k, self.v, self.c = (nn.Linear(64, 64) for _ in range(4))
        self.drops, self.options = drops, options

    def forward(self, x, mask=None):
        x = torch.relu(self.a(x))
        bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        return F.multi_head_attention_forward(
            *(x[:1], x, x, x.shape[-1], 4, None, bias, None, None, False, self.drops),
            *(self.c.weight, self.c.bias),
            training=self.training,
            attn_mask=mask,
            use_separate_proj_weight=True,
            q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight,
            v_proj_weight=self.v.weight,
            **self.options,
        )


class OneWeight(nn.Module):
    def __init__(self, key=False):
        super().__init__()
        self.a, self.qkv, self.c = nn.Linear(64, 64), nn.Linear(64, 192), nn.Linear(64, 64)
        self.key = key

    def forward(self, x):
        x = torch.relu(self.a(x))
        out, weights = F.multi_head_attention_forward(
            *(x, 2 * x if self.key else x, x, 64, 4, self.qkv.weight, self.qkv.bias),
            *(None, None, True, 0.0, self.c.weight, self.c.bias),
            training=self.training,
        )
        return out + weights.mean()


@pytest.mark.parametrize(
    ("model", "inputs", "reduced"),
    [
        (Separate(), (X,), "qkvc"),
        (Separate(need_weights=False), (X,), "qkvc"),
        (Separate(average_attn_weights=False), (X, torch.rand(1, 5)), "qkvc"),
        (Separate(), (X, torch.arange(5)[None] > 2), "qkvc"),
        (OneWeight(), (X,), ["qkv", "c"]),
    ],
)
def test_it_computes_the_same_and_its_layers_are_reduced(model, inputs, reduced):
    captured = capture(model, inputs)
    for mode in (True, False):
        torch.testing.assert_close(captured.train(mode)(*inputs), model.train(mode)(*inputs))
    made = lean_fx.plan(model, inputs)
    assert {name for site in made.sites for name in site.layers} == set(reduced)
    torch.manual_seed(0)
    lean = made.apply(model, inputs)
    torch.manual_seed(0)
    torch.testing.assert_close(lean(*inputs), lean_fx.leanify(model, inputs)(*inputs))
    assert lean.get_submodule("c").in_features < 64


@pytest.mark.parametrize("model", [Separate(drops=0.1), OneWeight(key=True)])
def test_what_it_cannot_write_out_stays(model):
    captured = capture(model, (X,))
    targets = {node.target for node in captured.graph.nodes}
    assert F.multi_head_attention_forward in targets or len(targets) > 3
    torch.testing.assert_close(captured.eval()(X), model.eval()(X))
    with pytest.warns(lean_fx.LeanWarning):
        lean_fx.leanify(model, X)


def test_it_exports(tmp_path):
    lean = lean_fx.leanify(Separate(need_weights=False), X)
    lean_fx.export_onnx(lean, tmp_path / "net.onnx", X, dynamic_shapes=({1: "batch"},))
