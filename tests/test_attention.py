"""AttentionHeads and SplitLayers against torch's own layer."""

import itertools

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import lean_fx
from graphs import graph_text
from lean_fx.capture.capturing import capture
from lean_fx.errors import PlanError
from lean_fx.layers.attention import AttentionHeads
from lean_fx.passes import SplitLayers

L, S, N, E, H = 5, 7, 3, 12, 2


class Attends(nn.Module):
    """One call of a layer, with arguments that are given."""

    def __init__(self, layer, **options):
        super().__init__()
        self.attention, self.options = layer, options

    def forward(self, query, key, value):
        return self.attention(query, key, value, **self.options)


class AttendsItself(nn.Module):
    """Self-attention."""

    def __init__(self, layer, **options):
        super().__init__()
        self.attention, self.options = layer, options

    def forward(self, x):
        return self.attention(x, x, x, **self.options)


def split(model):
    captured = capture(model)
    result = SplitLayers(["attention"])(captured)
    assert result.modified
    assert not SplitLayers(["attention"])(captured).modified
    return captured


def masks():
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    yield {}
    yield {"need_weights": False}
    yield {"average_attn_weights": False}
    yield {"attn_mask": causal, "is_causal": True, "need_weights": False}
    yield {"attn_mask": causal, "is_causal": True}
    yield {"attn_mask": causal.isinf()}
    yield {"attn_mask": torch.rand(N * H, L, L, dtype=torch.float64), "need_weights": False}
    padding = torch.arange(L) > torch.tensor([[1], [5], [3]])
    yield {"key_padding_mask": padding, "need_weights": False}
    yield {"key_padding_mask": padding, "attn_mask": causal.isinf(), "is_causal": True}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("settings", "options"),
    [
        *itertools.product(
            [
                {},
                {"batch_first": True},
                {"bias": False},
                {"add_bias_kv": True, "add_zero_attn": True},
                {"add_zero_attn": True, "batch_first": True},
            ],
            masks(),
        )
    ],
)
def test_self_attention_is_that_of_torch(settings, options, training):
    layer = nn.MultiheadAttention(E, H, **settings).double().train(training)
    if layer.in_proj_bias is not None:
        nn.init.normal_(layer.in_proj_bias)  # torch's own is zero
    x = torch.randn(*((N, L) if layer.batch_first else (L, N)), E, dtype=torch.float64)
    model = AttendsItself(layer, **options)
    made = split(model)
    assert made.attention.in_proj.weight.shape == (3 * E, E)
    found, wanted = made(x), model(x)
    torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        torch.testing.assert_close(made(x), model(x), equal_nan=True)


@pytest.mark.parametrize("settings", [{}, {"kdim": 8, "vdim": 4}, {"bias": False, "dropout": 0.3}])
def test_attention_to_another_value(settings):
    layer = nn.MultiheadAttention(E, H, **settings).double()
    inputs = [
        torch.randn(n, N, width, dtype=torch.float64)
        for n, width in ((L, E), (S, layer.kdim), (S, layer.vdim))
    ]
    model = Attends(layer)
    made = split(model)
    torch.testing.assert_close(made.eval()(*inputs), model.eval()(*inputs))
    single = [each[:, 0] for each in inputs]
    torch.testing.assert_close(made(*single), model(*single))


def test_dropout_of_weights_follows_the_mode():
    heads = AttentionHeads(nn.MultiheadAttention(E, H, dropout=0.5))
    x = torch.rand(L, N, E)
    assert heads(x, x, x)[1].eq(0).any()
    assert not heads.eval()(x, x, x)[1].eq(0).any()


@pytest.mark.parametrize("options", [{}, {"need_weights": False}, {"key_padding_mask": None}])
def test_an_empty_batch(options):
    layer = nn.MultiheadAttention(E, H, batch_first=True)
    x = torch.rand(0, L, E)
    for found, wanted in zip(
        split(AttendsItself(layer, **options))(x), layer(x, x, x, **options), strict=True
    ):
        assert wanted is None or found.shape == wanted.shape


def test_the_hint_needs_a_mask():
    heads, x = AttentionHeads(nn.MultiheadAttention(E, H)), torch.rand(L, N, E)
    with pytest.raises(RuntimeError, match="^Need attn_mask if specifying the is_causal hint"):
        heads(x, x, x, is_causal=True)


def test_the_graph_of_a_split_layer():
    layer = nn.MultiheadAttention(E, H, dropout=0.1, batch_first=True)
    assert_expected_inline(
        graph_text(split(AttendsItself(layer, need_weights=False))),
        """\
x = x()
attention_in_proj = attention.in_proj(x)  # Linear(in_features=12, out_features=36, bias=True)
attention_chunk = chunk(attention_in_proj, 3, -1)
attention_q = getitem(attention_chunk, 0)
attention_k = getitem(attention_chunk, 1)
attention_v = getitem(attention_chunk, 2)
attention_heads = attention.heads(attention_q, attention_k, attention_v, need_weights=False)  # AttentionHeads(num_heads=2, dropout=0.1, batch_first=True)
attention_attended = getitem(attention_heads, 0)
attention_out_proj = attention.out_proj(attention_attended)  # Linear(in_features=12, out_features=12, bias=True)
attention_weights = getitem(attention_heads, 1)
output = output((attention_out_proj, attention_weights))
""",
    )
    assert_expected_inline(
        graph_text(split(Attends(layer))),
        """\
query = query()
key = key()
value = value()
attention_q_proj = attention.q_proj(query)  # Linear(in_features=12, out_features=12, bias=True)
attention_k_proj = attention.k_proj(key)  # Linear(in_features=12, out_features=12, bias=True)
attention_v_proj = attention.v_proj(value)  # Linear(in_features=12, out_features=12, bias=True)
attention_heads = attention.heads(attention_q_proj, attention_k_proj, attention_v_proj)  # AttentionHeads(num_heads=2, dropout=0.1, batch_first=True)
attention_attended = getitem(attention_heads, 0)
attention_out_proj = attention.out_proj(attention_attended)  # Linear(in_features=12, out_features=12, bias=True)
attention_weights = getitem(attention_heads, 1)
output = output((attention_out_proj, attention_weights))
""",
    )


def test_only_torchs_own_layer_is_split():
    changed = nn.MultiheadAttention(E, H)
    changed.out_proj = nn.Linear(E, E)
    for layer in (nn.Bilinear(E, E, E), changed):
        with pytest.raises(PlanError, match="^plan: layer 'attention' is neither a stack"):
            split(AttendsItself(layer))
    (left,) = lean_fx.plan(AttendsItself(changed)).left_alone
    assert left.reason.text == "its out_proj is not torch's own"


class Block(nn.Module):
    """A block of a transformer, as vision transformers write it."""

    def __init__(self, **settings):
        super().__init__()
        self.stem = nn.Linear(6, 32)
        self.norm = nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True, **settings)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        return x + self.mlp(x + y)


def test_layers_inside_attention_are_reduced():
    model, inputs = Block(), torch.rand(2, 5, 6)
    plan = lean_fx.plan(model, inputs)
    assert plan.split_layers == ("attention",)
    assert [site.layers for site in plan.sites] == [
        ("attention.in_proj",),
        ("attention.out_proj",),
        ("mlp.0",),
        ("mlp.2",),
    ]
    assert lean_fx.Plan.from_json(plan.to_json()) == plan
    lean = plan.apply(model)
    assert lean.attention.in_proj.weight.shape == (96, 4)
    assert lean.attention.out_proj.weight.shape == (32, 4)
    for mode in (True, False):
        assert lean.train(mode)(inputs).shape == (2, 5, 32)
    lean.train()(inputs).square().sum().backward()
    assert all(parameter.grad is not None for parameter in lean.parameters())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"skip": "attention"}, "skip='attention'"),
        ({"skip": nn.MultiheadAttention}, "skip=MultiheadAttention"),
        ({"skip": "attention.*"}, "none of its layers is reduced"),
    ],
)
def test_attention_stays_whole(options, reason):
    model, inputs = Block().eval(), torch.rand(2, 5, 6)
    plan = lean_fx.plan(model, inputs, **options)
    assert plan.split_layers == ()
    (left,) = (each for each in plan.left_alone if each.layer == "attention")
    assert left.reason.text == reason
    lean = lean_fx.leanify(model, inputs, **options)
    assert type(lean.attention) is nn.MultiheadAttention


def test_shared_and_hooked_attention_is_left_alone():
    class Twice(Block):
        def forward(self, x):
            x = self.stem(x)
            return self.attention(x, x, x)[0] + self.attention(x, x, x)[0]

    (left,) = (e for e in lean_fx.plan(Twice()).left_alone if e.layer == "attention")
    assert left.reason.text == "called 2 times in one forward pass"
    model = Block()
    model.attention.register_forward_hook(lambda module, args, out: out)
    (left,) = (e for e in lean_fx.plan(model).left_alone if e.layer == "attention")
    assert left.reason.text == "it has hooks, which a rebuilt layer would lose"


def test_torchs_own_tracer_takes_a_split_layer():
    model = split(AttendsItself(nn.MultiheadAttention(E, H, batch_first=True))).eval()
    x = torch.rand(N, L, E)
    for found, wanted in zip(torch.fx.symbolic_trace(model)(x), model(x), strict=True):
        torch.testing.assert_close(found, wanted)
