"""torch's Transformer modules: what is inside is captured, split, reduced, and means the same."""

import contextlib
import copy
import itertools

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

import lean_fx
from cases import slow_unless
from graphs import Transformed, graph_text
from lean_fx.capture.capturing import capture
from lean_fx.passes import SplitLayers

L, S, N, E, H = 5, 4, 3, 12, 2
CAUSAL = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
EACH_HEAD = torch.where(torch.rand(N * H, L, L) + torch.eye(L) < 0.4, -torch.inf, 0.0).double()
PADDING = torch.arange(L) > torch.tensor([[4], [2], [3]])  # True where a sequence has ended


@contextlib.contextmanager
def fast_path(enabled):
    """Whether torch may take its fused calls in evaluation."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Calls(nn.Module):
    """One call of a module, with arguments that are given."""

    def __init__(self, inner, **options):
        super().__init__()
        self.inner, self.options = inner, options

    def forward(self, *inputs):
        return self.inner(*inputs, **self.options)


class CallsOne(Calls):
    def forward(self, x):
        return self.inner(x, **self.options)


class CallsTwo(Calls):
    def forward(self, tgt, memory):
        return self.inner(tgt, memory, **self.options)


def drawn(module):
    """The module in float64, none of its parameters at the value that it starts with."""
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, 0.1, 0.3)
    return module


def sequences(length, batch_first):
    return torch.randn(*((N, length) if batch_first else (length, N)), E, dtype=torch.float64)


def versions(model):
    """The model captured, and captured with its attention split."""
    captured = capture(model)
    attention = [n for n, m in captured.named_modules() if type(m) is nn.MultiheadAttention]
    split = copy.deepcopy(captured)
    assert SplitLayers(attention)(split).modified
    assert not any(isinstance(m, nn.MultiheadAttention) for m in split.modules())
    return captured, split


def check(model, *inputs, real=None):
    """Captured and split, in both modes, with gradients and without, and with torch's fast path
    and without: the numbers are the model's.

    Args:
        model: in float64, without dropout.
        inputs: of the model.
        real: the positions of ``[N, L]`` to compare; all if left out.
    """
    for training in (True, False):
        model.train(training)
        for made in versions(model):
            for gradients, mode, fast in itertools.product((True, False), repeat=3):
                model.train(mode)
                made.train(mode)
                with torch.set_grad_enabled(gradients), fast_path(fast):
                    found, wanted = made(*inputs), model(*inputs)
                    if real is not None:
                        found, wanted = found[real], wanted[real]
                    torch.testing.assert_close(found, wanted)


KINDS = {
    "post": {},
    "pre": {"norm_first": True},
    "no bias": {"bias": False},
    "gelu": {"activation": "gelu", "batch_first": True},
    "function": {"activation": F.silu, "batch_first": True},
    "module": {"activation": nn.PReLU(), "batch_first": True},
    "pre, batch first": {"norm_first": True, "batch_first": True},
    "batch first": {"batch_first": True},
    "odd heads": {"nhead": 3, "batch_first": True},
}
MASKS = {
    "none": {},
    "causal": {"src_mask": CAUSAL},
    "hint": {"src_mask": CAUSAL, "is_causal": True},
    "bool": {"src_mask": CAUSAL.isinf()},
    "each head": {"src_mask": EACH_HEAD},
    "padding": {"src_key_padding_mask": PADDING},
    "both": {"src_mask": CAUSAL.isinf(), "src_key_padding_mask": PADDING, "is_causal": True},
}


def settings(kind):
    return {"d_model": E, "nhead": H, "dim_feedforward": 16, "dropout": 0.0} | KINDS[kind]


@pytest.mark.parametrize(
    ("kind", "mask"),
    slow_unless(
        lambda kind, mask: kind in ("post", "pre, batch first") or mask in ("padding", "both"),
        itertools.product(KINDS, MASKS),
    ),
)
def test_an_encoder_layer_is_that_of_torch(kind, mask):
    if (kind, mask) == ("odd heads", "each head"):
        pytest.skip("the mask is for two heads")
    layer = drawn(nn.TransformerEncoderLayer(**settings(kind)))
    real = ~PADDING if layer.self_attn.batch_first else ~PADDING.T
    x = sequences(L, layer.self_attn.batch_first)
    check(CallsOne(layer, **MASKS[mask]), x, real=real)


def test_masks_of_any_numbers_are_added():
    # torch's fused call would take every number but 0 for True.
    mask = torch.randn(N * H, L, L, dtype=torch.float64)
    layer = drawn(nn.TransformerEncoderLayer(**settings("batch first"))).eval()
    model, x = CallsOne(layer, src_mask=mask), sequences(L, True)
    for made in versions(model):
        torch.testing.assert_close(made(x), model(x))  # with gradients: not the fused one


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("kind", "norm", "nested"),
    slow_unless(
        lambda kind, norm, nested: kind != "post" and nested == (norm is None),
        itertools.product(("post", "pre", "batch first"), (None, nn.LayerNorm(E)), (True, False)),
    ),
)
def test_an_encoder_is_that_of_torch(kind, mask, norm, nested):
    layer = nn.TransformerEncoderLayer(**settings(kind))
    encoder = drawn(nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=nested))
    batch_first = layer.self_attn.batch_first
    options = {name.replace("src_mask", "mask"): each for name, each in MASKS[mask].items()}
    real = ~PADDING if batch_first else ~PADDING.T
    check(CallsOne(encoder, **options), sequences(L, batch_first), real=real)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tgt_mask": CAUSAL},
        {"tgt_mask": CAUSAL, "tgt_is_causal": True},
        {"tgt_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING[:, :S]},
        {"memory_mask": torch.randn(L, S, dtype=torch.float64)},
    ],
)
@pytest.mark.parametrize("kind", ["post", "pre", "batch first", "no bias"])
def test_a_decoder_is_that_of_torch(kind, options):
    layer = drawn(nn.TransformerDecoderLayer(**settings(kind)))
    inputs = [sequences(n, layer.self_attn.batch_first) for n in (L, S)]
    real = ~PADDING if layer.self_attn.batch_first else ~PADDING.T
    check(CallsTwo(layer, **options), *inputs, real=real)
    decoder = drawn(nn.TransformerDecoder(layer, 2, nn.LayerNorm(E)))
    check(CallsTwo(decoder, **options), *inputs, real=real)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_whole_transformer_is_that_of_torch(batch_first):
    model = drawn(nn.Transformer(E, H, 2, 1, 16, 0.0, batch_first=batch_first))
    src, tgt = sequences(S, batch_first), sequences(L, batch_first)
    check(CallsTwo(model), src, tgt)
    check(CallsTwo(model, tgt_mask=CAUSAL, tgt_is_causal=True), src, tgt)
    check(CallsTwo(model, tgt_mask=CAUSAL, memory_mask=torch.rand(L, S).double()), src, tgt)


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_may_be_the_model_itself_and_unbatched(training):
    layer = drawn(nn.TransformerEncoderLayer(**settings("post"))).train(training)
    check(layer, sequences(L, False))
    check(layer, torch.randn(L, E, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_masks_may_be_inputs_and_computed():
    class Net(nn.Module):
        """As torch's tutorial writes it."""

        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(**settings("batch first"))
            self.embed = nn.Embedding(9, E)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, tokens, mask=None):
            if mask is None:
                mask = nn.Transformer.generate_square_subsequent_mask(
                    tokens.shape[1], dtype=torch.float64
                )
            return self.encoder(self.embed(tokens), mask, tokens == 0)

    model, tokens = drawn(Net()), torch.randint(1, 9, (N, L))
    given = capture(model, (tokens, CAUSAL))
    torch.testing.assert_close(given(tokens, CAUSAL), model(tokens, CAUSAL))
    made = capture(model, (tokens,))
    torch.testing.assert_close(made(tokens), model(tokens))
    longer = torch.randint(1, 9, (2, L + 2))
    torch.testing.assert_close(made(longer), model(longer))


class Net(nn.Module):
    """A stem, an encoder of two layers with a final norm, and a head."""

    def __init__(self, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **options)
        self.stem = nn.Linear(6, 32)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32))
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.encoder(self.stem(x)))


def test_the_plan():
    assert_expected_inline(
        str(lean_fx.plan(Net(), torch.rand(2, 5, 6), channels=8, skip="encoder.layers.1.linear1")),
        """\
Plan for Net: 8 reductions (lean) before 8 of 10 layers
their weights: 14,432 -> 3,096, of 17,475 parameters in all
split into single layers: encoder.layers.0.self_attn, encoder.layers.1.self_attn
value                                sign  MACs  layer                                type    channels  weights       note
stem                                 any   320   encoder.layers.0.self_attn.in_proj   Linear  32 -> 8   3,072 -> 768
encoder_layers_0_self_attn_attended  any   320   encoder.layers.0.self_attn.out_proj  Linear  32 -> 8   1,024 -> 256
encoder_layers_0_norm1               any   320   encoder.layers.0.linear1             Linear  32 -> 8   2,048 -> 512
encoder_layers_0_dropout             >= 0  256   encoder.layers.0.linear2             Linear  64 -> 8   2,048 -> 256
encoder_layers_0_norm2               any   320   encoder.layers.1.self_attn.in_proj   Linear  32 -> 8   3,072 -> 768
encoder_layers_1_self_attn_attended  any   320   encoder.layers.1.self_attn.out_proj  Linear  32 -> 8   1,024 -> 256
encoder_layers_1_dropout             >= 0  256   encoder.layers.1.linear2             Linear  64 -> 8   2,048 -> 256
encoder_norm                         any   320   head                                 Linear  32 -> 8   96 -> 24
left alone
stem                      Linear  in_channels=6 is below min_channels=16
encoder.layers.1.linear1  Linear  skip='encoder.layers.1.linear1'""",
    )


def test_the_graph_of_an_encoder_layer():
    layer = nn.TransformerEncoderLayer(32, 4, 64, norm_first=True, batch_first=True)
    assert_expected_inline(
        graph_text(lean_fx.leanify(layer)),
        """\
src = src()
src_mask = src_mask(None)
src_key_padding_mask = src_key_padding_mask(None)
is_causal = is_causal(False)
check_absent = check_absent(src_mask, src_mask)
check_absent_1 = check_absent(src_key_padding_mask, src_key_padding_mask)
norm1 = norm1(src)  # LayerNorm((32,), eps=1e-05, elementwise_affine=True, bias=True)
self_attn_in_proj = self_attn.in_proj(norm1)  # Linear(in_features=32, out_features=96, bias=True)
self_attn_chunk = chunk(self_attn_in_proj, 3, -1)
self_attn_q = getitem(self_attn_chunk, 0)
self_attn_k = getitem(self_attn_chunk, 1)
self_attn_v = getitem(self_attn_chunk, 2)
self_attn_heads = self_attn.heads(self_attn_q, self_attn_k, self_attn_v, attn_mask=None, key_padding_mask=None, need_weights=False, is_causal=is_causal)  # AttentionHeads(num_heads=4, dropout=0.1, batch_first=True)
self_attn_attended = getitem(self_attn_heads, 0)
reductions_self_attn_attended = reductions.self_attn_attended(self_attn_attended)  # LeanReduction(32, 4, dim=-1)
self_attn_out_proj = self_attn.out_proj(reductions_self_attn_attended)  # Linear(in_features=4, out_features=32, bias=True)
dropout1 = dropout1(self_attn_out_proj)  # Dropout(p=0.1, inplace=False)
add = add(src, dropout1)
norm2 = norm2(add)  # LayerNorm((32,), eps=1e-05, elementwise_affine=True, bias=True)
reductions_norm2 = reductions.norm2(norm2)  # LeanReduction(32, 4, dim=-1)
linear1 = linear1(reductions_norm2)  # Linear(in_features=4, out_features=64, bias=True)
relu = relu(linear1, inplace=False)
dropout = dropout(relu)  # Dropout(p=0.1, inplace=False)
reductions_dropout = reductions.dropout(dropout)  # LeanReduction(64, 8, dim=-1, nonnegative)
linear2 = linear2(reductions_dropout)  # Linear(in_features=8, out_features=32, bias=True)
dropout2 = dropout2(linear2)  # Dropout(p=0.1, inplace=False)
add_1 = add(add, dropout2)
output = output(add_1)
""",
    )


def test_shapes_of_example_inputs_do_not_matter():
    model = Net()
    with_inputs, without = lean_fx.plan(model, torch.rand(2, 5, 6)), lean_fx.plan(model)
    assert with_inputs.split_layers == without.split_layers
    assert [site.layers for site in with_inputs.sites] == [site.layers for site in without.sites]


@pytest.mark.parametrize("make", [Net, Transformed])
@pytest.mark.parametrize("training", [True, False])
def test_a_reduced_model_trains_and_follows_its_mode(make, training):
    model, inputs = make().train(training), torch.rand(4, 5, 6)
    state = {name: each.clone() for name, each in model.state_dict().items()}
    classes = [type(each) for each in model.modules()]
    lean = lean_fx.leanify(model, inputs)
    assert all(m.training is training for m in lean.modules() if not list(m.children()))
    lean.train()
    assert not torch.equal(lean(inputs), lean(inputs))
    lean(inputs).square().sum().backward()
    assert all(each.grad is not None and each.grad.any() for each in lean.parameters())
    lean.eval()
    torch.testing.assert_close(lean(inputs), lean(inputs), rtol=0, atol=0)
    again = copy.deepcopy(lean)
    torch.testing.assert_close(again(inputs), lean(inputs), rtol=0, atol=0)
    assert again.meta["lean_fx.plan"] == lean.meta["lean_fx.plan"]

    assert [type(each) for each in model.modules()] == classes
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert all(each.grad is None for each in model.parameters())


@pytest.mark.parametrize(
    ("skip", "reduced"),
    [
        ("encoder.*", {"head"}),
        (nn.TransformerEncoderLayer, {"head"}),
        (nn.TransformerEncoder, {"head"}),
        (["encoder.layers.*.linear?", "*.out_proj"], {"head", "0.in_proj", "1.in_proj"}),
        ([nn.Linear], set()),
        (["encoder.layers.0.*", nn.MultiheadAttention], {"head", "1.linear1", "1.linear2"}),
    ],
)
def test_skip(skip, reduced):
    plan = lean_fx.plan(Net(), torch.rand(2, 5, 6), skip=skip)
    names = {layer for site in plan.sites for layer in site.layers}
    found = {name.removeprefix("encoder.layers.").replace("self_attn.", "") for name in names}
    assert found == reduced
    assert set(plan.split_layers) == {
        name.rpartition(".")[0] for name in names if name.endswith("_proj")
    }


def test_names_of_parameters_are_kept():
    model = Net()
    lean = lean_fx.leanify(model)
    split = {".in_proj_weight": ".in_proj.weight", ".in_proj_bias": ".in_proj.bias"}
    names = list(model.state_dict())
    for old, new in split.items():
        names = [name.replace(old, new) for name in names]
    kept = [name for name in lean.state_dict() if not name.startswith("reductions.")]
    assert sorted(kept) == sorted(names)
    whole = capture(model)
    assert sorted(whole.state_dict()) == sorted(model.state_dict())


@pytest.mark.parametrize("make", [Net, Transformed])
def test_onnx_runtime_computes_the_same_for_any_batch(make, tmp_path):
    lean = lean_fx.leanify(make(), torch.rand(2, 5, 6), channels=8).eval()
    path = tmp_path / "lean.onnx"
    lean_fx.export_onnx(lean, path, torch.rand(2, 5, 6))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 7):
        x = torch.rand(batch, 5, 6)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(found, lean(x).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("name", ["encoder", "encoder.layers.0"])
def test_a_module_with_hooks_stays_whole(name):
    model = Net()
    seen = []
    model.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(1))
    plan = lean_fx.plan(model, torch.rand(2, 5, 6))
    (left,) = (each for each in plan.left_alone if each.layer == name)
    assert left.reason.text == "it has hooks or a forward of its own, so it stays whole"
    assert not any(layer.startswith(name) for site in plan.sites for layer in site.layers)
    lean = plan.apply(model)
    seen.clear()
    lean(torch.rand(2, 5, 6))
    assert seen == [1]
    assert type(lean.get_submodule(name)) is type(model.get_submodule(name))


def test_a_layer_with_hooks_of_the_gradient_stays_whole():
    model = Net()
    seen = []
    model.encoder.layers[1].register_full_backward_hook(lambda *arguments: seen.append(1))
    lean = lean_fx.leanify(model)
    assert type(lean.get_submodule("encoder.layers.1")) is nn.TransformerEncoderLayer
    lean(torch.rand(2, 5, 6)).sum().backward()
    assert seen == [1]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_layers_beside_what_cannot_be_traced_reduce_their_own_input():
    def activation(x):
        return x if x.sum() > 0 else -x

    model, inputs = Net(norm_first=True, activation=activation), torch.rand(2, 5, 6)
    plan = lean_fx.plan(model, inputs)
    within = ["self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"]
    reduced = {layer for site in plan.sites if not site.value for layer in site.layers}
    assert reduced == {f"encoder.layers.{index}.{name}" for index in (0, 1) for name in within}
    lean = plan.apply(model, inputs)
    for training in (True, False):
        assert lean.train(training)(inputs).shape == (2, 5, 3)


def test_in_a_model_that_cannot_be_traced_layers_reduce_their_own_input():
    class Loop(Net):
        def forward(self, x):
            x = self.stem(x)
            while x.square().sum() < 1e3:
                x = x * 2
            return self.head(self.encoder(x))

    model, inputs = Loop().eval(), torch.rand(2, 5, 6)
    with pytest.warns(lean_fx.LeanWarning, match="each layer reduces its own input"):
        lean = lean_fx.leanify(model, inputs)
    names = {layer for site in lean.meta["lean_fx.plan"].sites for layer in site.layers}
    assert {"encoder.layers.0.linear1", "encoder.layers.1.linear2", "head"} <= names
    assert type(lean) is Loop
    assert lean.encoder.layers[0].linear1.weight.shape == (64, 4)
    for training in (True, False):
        with torch.no_grad():
            assert lean.train(training)(inputs).shape == (2, 5, 3)
