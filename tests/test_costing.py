"""The costs of every node: by hand, by literal loops, and by PyTorch's own counter."""

import copy
import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import lean_fx
from graphs import CHANGED, Net
from lean_fx.errors import ArgumentError, CaptureError
from lean_fx.measure.costs import count_macs, count_parameters
from lean_fx.measure.counter import counting
from lean_fx.reduction.controls import GroupedSumReduction, ProjectionReduction
from mac_formulas import call_macs, nodes_that_differ


def by_operators(call):
    """What PyTorch's own counter sees."""
    with counting() as counter:
        call()
    return counter.macs


def formula(layer, *inputs, **kwargs):
    output = layer.eval()(*inputs, **kwargs)
    macs = call_macs(layer, inputs, kwargs, output)
    assert macs == by_operators(lambda: layer(*inputs, **kwargs))
    return macs


# By literal loops over every product.


def literal_conv(x, weight, stride, padding, groups):
    """The products of a 2-d convolution, one by one, those with the padding included."""
    macs = 0
    outputs = [(n + 2 * padding - k) // stride + 1 for n, k in zip(x[2:], weight[2:], strict=True)]
    for _, channel, _, _ in itertools.product(range(x[0]), range(weight[0]), *map(range, outputs)):
        group = channel // (weight[0] // groups)
        inputs = range(group * weight[1], (group + 1) * weight[1])
        assert inputs[-1] < x[1]
        macs += sum(1 for _ in itertools.product(inputs, *map(range, weight[2:])))
    return macs


@pytest.mark.parametrize(("stride", "padding", "groups"), [(1, 1, 1), (2, 0, 2), (2, 1, 4)])
def test_convolution_by_literal_loops(stride, padding, groups):
    layer = nn.Conv2d(4, 8, (3, 2), stride, padding, groups=groups)
    expected = literal_conv((2, 4, 6, 5), layer.weight.shape, stride, padding, groups)
    assert formula(layer, torch.zeros(2, 4, 6, 5)) == expected


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution_by_literal_loops(groups):
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=groups)
    # Every element that is read is multiplied with the kernel of each output of its group.
    macs = sum(3 * 3 * 6 // groups for _ in itertools.product(range(2 * 4), range(5), range(7)))
    assert formula(layer, torch.zeros(2, 4, 5, 7)) == macs


def literal_recurrent(steps, inputs, hidden, gates, layers, directions, projected):
    macs = 0
    for layer, _, _ in itertools.product(range(layers), range(directions), range(steps)):
        state = projected or hidden
        wide = inputs if layer == 0 else directions * state
        macs += gates * hidden * wide + gates * hidden * state + projected * hidden
    return macs


@pytest.mark.parametrize(
    ("kind", "gates", "projected"),
    [(nn.RNN, 1, 0), (nn.GRU, 3, 0), (nn.LSTM, 4, 0), (nn.LSTM, 4, 2)],
)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("form", ["batch first", "batch second", "unbatched", "packed"])
def test_recurrent_layers(kind, gates, projected, layers, directions, form):
    options = {"proj_size": projected} if projected else {}
    layer = kind(
        *(3, 5, layers),
        bidirectional=directions == 2,
        batch_first=form == "batch first",
        **options,
    )
    x, steps = {
        "batch first": (torch.zeros(2, 7, 3), 14),
        "batch second": (torch.zeros(7, 2, 3), 14),
        "unbatched": (torch.zeros(7, 3), 7),
        "packed": (pack_sequence([torch.zeros(4, 3), torch.zeros(1, 3)]), 5),
    }[form]
    expected = literal_recurrent(steps, 3, 5, gates, layers, directions, projected)
    assert formula(layer, x) == expected


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNNCell, 1), (nn.GRUCell, 3), (nn.LSTMCell, 4)])
def test_recurrent_cells(kind, gates):
    assert formula(kind(3, 5), torch.zeros(2, 3)) == 2 * gates * 5 * (3 + 5)


# By hand.


def test_layers_by_hand():
    assert formula(nn.Conv1d(4, 8, 3, dilation=2), torch.zeros(2, 4, 9)) == 2 * 8 * 5 * 4 * 3
    assert formula(nn.Conv1d(4, 8, 3), torch.zeros(4, 9)) == 8 * 7 * 4 * 3
    assert formula(nn.Conv3d(2, 3, 2), torch.zeros(1, 2, 3, 3, 3)) == 3 * 8 * 2 * 8
    assert formula(nn.ConvTranspose1d(4, 8, 3), torch.zeros(2, 4, 9)) == 2 * 4 * 9 * 8 * 3
    assert formula(nn.ConvTranspose3d(2, 3, 2), torch.zeros(1, 2, 3, 3, 3)) == 2 * 27 * 3 * 8
    assert formula(nn.Linear(6, 4), torch.zeros(6)) == 24
    assert formula(nn.Linear(6, 4), torch.zeros(2, 3, 5, 6)) == 30 * 24
    assert formula(nn.Bilinear(3, 4, 5), torch.zeros(2, 7, 3), torch.zeros(2, 7, 4)) == 14 * 60


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}])
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_by_hand(options, need_weights):
    layer = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True, **options)
    query, key, value = torch.zeros(3, 5, 8), torch.zeros(3, 7, 6), torch.zeros(3, 7, 4)
    length = 7 + len(options)
    expected = 3 * (5 * 2 * 8 * 8 + 7 * 8 * (6 + 4) + 2 * 5 * length * 8)
    assert formula(layer, query, key, value, need_weights=need_weights) == expected


def test_attention_without_a_batch_and_sequence_first():
    layer = nn.MultiheadAttention(8, 2)
    query, key = torch.zeros(5, 8), torch.zeros(7, 8)
    expected = 2 * (5 + 7) * 64 + 2 * 5 * 7 * 8
    assert formula(layer, query, key, key) == expected
    query, key = torch.zeros(5, 3, 8), torch.zeros(7, 3, 8)
    assert formula(layer, query, key=key, value=key) == 3 * expected


def test_transformers_by_hand():
    def encoder(length):
        return length * (4 * 64 + 2 * 8 * 16) + 2 * length * length * 8

    def decoder(length, memory):
        across = 2 * length * 64 + 2 * memory * 64 + 2 * length * memory * 8
        return encoder(length) + across

    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert formula(layer, torch.zeros(3, 5, 8)) == 3 * encoder(5)
    stack = nn.TransformerEncoder(layer, 2)
    assert formula(stack, torch.zeros(3, 5, 8)) == 6 * encoder(5)
    layer = nn.TransformerDecoderLayer(8, 2, 16)
    tgt, memory = torch.zeros(5, 3, 8), torch.zeros(7, 3, 8)
    assert formula(layer, tgt, memory) == 3 * decoder(5, 7)
    assert formula(nn.TransformerDecoder(layer, 2), tgt, memory) == 6 * decoder(5, 7)
    whole = nn.Transformer(8, 2, 2, 1, 16)
    assert formula(whole, memory, tgt) == 3 * (2 * encoder(7) + decoder(5, 7))


def test_a_transformer_is_counted_by_its_layers_also_those_that_were_replaced():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer.linear1 = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 16))
    net, x = nn.Sequential(nn.TransformerEncoder(layer, 2)), torch.zeros(1, 5, 8)
    costs = lean_fx.costs_of(net, x)
    assert costs.without_formula == ()
    assert costs.nodes[0].name == "0.layers.0.self_attn"
    assert costs.macs == count_macs(net, x) == 2 * (5 * (256 + 32 + 64 + 128) + 2 * 25 * 8)


X = torch.zeros
FUNCTIONS = {
    "linear": (lambda m, x: F.linear(x, m.w), X(5, 2, 3), {"w": X(4, 3)}, 10 * 12),
    "linear, named": (lambda m, x: F.linear(x, weight=m.w), X(2, 3), {"w": X(4, 3)}, 24),
    "conv1d": (lambda m, x: F.conv1d(x, m.w, groups=2), X(1, 4, 9), {"w": X(6, 2, 3)}, 6 * 7 * 6),
    "conv2d": (lambda m, x: F.conv2d(x, m.w), X(2, 3, 5, 5), {"w": X(4, 3, 3, 3)}, 2 * 4 * 9 * 27),
    "conv3d": (lambda m, x: F.conv3d(x, m.w), X(1, 1, 3, 3, 3), {"w": X(2, 1, 2, 2, 2)}, 2 * 64),
    "conv_transpose2d": (
        lambda m, x: F.conv_transpose2d(x, m.w, stride=2, groups=2),
        *(X(1, 4, 5, 5), {"w": X(4, 3, 2, 2)}, 4 * 25 * 3 * 4),
    ),
    "bilinear": (lambda m, x: F.bilinear(x, x, m.w), X(5, 3), {"w": X(4, 3, 3)}, 5 * 36),
    "@": (lambda m, x: x @ m.w, X(5, 2, 3), {"w": X(3, 4)}, 10 * 12),
    "@ vector": (lambda m, x: x @ m.w, X(2, 3), {"w": X(3)}, 6),
    "matmul, batches": (lambda m, x: x.matmul(m.w), X(5, 1, 2, 3), {"w": X(6, 3, 4)}, 30 * 24),
    "mm": (lambda m, x: torch.mm(x, mat2=m.w), X(2, 3), {"w": X(3, 4)}, 24),
    "bmm": (lambda m, x: x.bmm(m.w), X(5, 2, 3), {"w": X(5, 3, 4)}, 120),
    "mv": (lambda m, x: x.mv(m.w), X(2, 3), {"w": X(3)}, 6),
    "dot": (lambda m, x: torch.dot(x, m.w), X(3), {"w": X(3)}, 3),
    "inner": (lambda m, x: torch.inner(x, m.w), X(2, 3), {"w": X(4, 3)}, 24),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), X(2, 3), {"w": X(3, 4), "b": X(4)}, 24),
    "addmv": (lambda m, x: m.b.addmv(x, m.w), X(2, 3), {"w": X(3), "b": X(2)}, 6),
    "baddbmm": (
        lambda m, x: torch.baddbmm(m.b, batch1=x, batch2=m.w),
        *(X(5, 2, 3), {"w": X(5, 3, 4), "b": X(5, 2, 4)}, 120),
    ),
    "addbmm": (
        lambda m, x: torch.addbmm(m.b, x, m.w),
        *(X(5, 2, 3), {"w": X(5, 3, 4), "b": X(2, 4)}, 120),
    ),
    "sdpa": (
        lambda m, x: F.scaled_dot_product_attention(x, m.k, m.v, is_causal=True),
        *(X(2, 3, 5, 4), {"k": X(2, 3, 7, 4), "v": X(2, 3, 7, 6)}, 6 * 5 * 7 * 10),
    ),
    "sdpa, groups of heads": (
        lambda m, x: F.scaled_dot_product_attention(x, m.k, m.k, enable_gqa=True),
        *(X(2, 6, 5, 4), {"k": X(2, 3, 7, 4)}, 12 * 5 * 7 * 8),
    ),
    "einsum": (
        lambda m, x: torch.einsum("bij, jk -> bki", x, m.w),
        *(X(5, 2, 3), {"w": X(3, 4)}, 120),
    ),
    "einsum, an axis of 1 that is broadcast": (
        lambda m, x: torch.einsum("bij,bjk->bik", x, m.w),
        *(X(4, 2, 3), {"w": X(1, 3, 5)}, 120),
    ),
    "einsum, a list": (lambda m, x: torch.einsum("i,i->", [x, m.w]), X(3), {"w": X(3)}, 3),
    "einsum, an axis summed before": (
        lambda m, x: torch.einsum("bij,jk->ik", x, m.w),
        *(X(5, 2, 3), {"w": X(3, 4)}, 24),
    ),
    "einsum, element-wise": (lambda m, x: torch.einsum("i,j->ij", x, m.w), X(3), {"w": X(4)}, 0),
    "einsum, one operand": (lambda m, x: torch.einsum("ij->ji", x), X(3, 4), {}, 0),
    "einsum, three operands": (
        lambda m, x: torch.einsum("ij,jk,kl->il", x, x, x),
        *(X(3, 3), {}, 2 * 27),
    ),
    "einsum, dots": (lambda m, x: torch.einsum("...i,ij->...j", x, x), X(3, 3), {}, 27),
    "tensordot": (lambda m, x: torch.tensordot(x, x, 1), X(3, 3), {}, 27),
    "chain_matmul": (lambda m, x: torch.linalg.multi_dot((x, x)), X(3, 3), {}, 27),
}


@pytest.mark.parametrize("call", FUNCTIONS)
def test_functions_by_hand(call):
    function, x, parameters, expected = FUNCTIONS[call]
    net = Net(function, **{name: nn.Parameter(each) for name, each in parameters.items()})
    costs = lean_fx.costs_of(net, x)
    assert costs.macs == expected == count_macs(net, x)
    assert costs.without_formula == ()


UNSEEN = {
    "vecdot": (lambda m, x: torch.linalg.vecdot(x, x), 12),
    "vecdot, an axis": (lambda m, x: torch.linalg.vecdot(x[:, :1], x, dim=0), 12),
    "vecdot, an axis of 1": (lambda m, x: torch.linalg.vecdot(x[:, :1], y=x), 12),
    "vdot": (lambda m, x: torch.vdot(x[0], x[1]), 3),
    "sparse.mm": (lambda m, x: torch.sparse.mm(x.to_sparse(), x.t()), 3 * 4),
}


@pytest.mark.parametrize("call", UNSEEN)
def test_products_that_flop_counter_mode_does_not_see(call):
    function, expected = UNSEEN[call]
    costs = lean_fx.costs_of(Net(function), torch.eye(4, 3))
    assert costs.macs == expected
    assert costs.without_formula == ()


WITHOUT_FORMULA = {
    "inverse": lambda m, x: torch.linalg.inv(x),
    "transform": lambda m, x: torch.fft.rfft(x).real,
    "distances": lambda m, x: torch.cdist(x, x),
}


@pytest.mark.parametrize("call", WITHOUT_FORMULA)
def test_what_has_no_formula_is_told(call):
    costs = lean_fx.costs_of(Net(WITHOUT_FORMULA[call]), torch.eye(3))
    assert costs.macs == 0
    assert len(costs.without_formula) == 1
    assert costs.without_formula[0] in costs.footnotes()[-1]


class MyConv(nn.Conv2d):
    """Twice the work that its type says."""

    def forward(self, x):
        return super().forward(x) + super().forward(x)


def test_a_subclass_and_a_hook_are_counted_by_operators_and_told():
    net = nn.Sequential(MyConv(3, 4, 1), nn.Conv2d(4, 5, 1))
    net[1].register_forward_hook(lambda layer, args, output: output + layer.forward(*args))
    costs = lean_fx.costs_of(net, X(1, 3, 2, 2))
    assert [node.macs for node in costs.nodes] == [2 * 4 * 12, 2 * 4 * 20]
    assert costs.without_formula == ("0", "1")


def test_a_reduction_without_a_count_is_told():
    class Mine(nn.Module):
        def __init__(self, in_channels, out_channels, dim):
            super().__init__()
            self.out_channels = out_channels

        def forward(self, x):
            return x[:, : self.out_channels] * 2

    net = lean_fx.leanify(nn.Sequential(nn.Linear(3, 64), nn.Linear(64, 4)), reduction=Mine)
    assert lean_fx.costs_of(net, X(1, 3)).without_formula == ("reductions._0",)


def test_threads_that_count_leave_the_kernels_switched_on():
    def switches():
        return torch.backends.mkldnn.enabled, torch.backends.mha.get_fastpath_enabled()

    before, net = switches(), nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 4))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: count_macs(net, X(2, 8)), range(40)))
    assert set(found) == {2 * (8 * 32 + 32 * 4)}
    assert switches() == before


def test_a_reduction_of_a_users_own_counts_by_operators_unless_it_tells():
    class Halved(lean_fx.Reduction):
        def __init__(self, in_channels, out_channels, dim=1):
            super().__init__(in_channels, out_channels, dim)
            self.weight = nn.Parameter(torch.rand(out_channels, in_channels))

        def reduce(self, x):
            return F.linear(x, self.weight)

    class Counted(Halved):
        @property
        def macs_per_position(self):
            return 7

    net = nn.Sequential(nn.Linear(3, 64), nn.Linear(64, 4))
    for reduction, macs in ((Halved, 64 * 8), (Counted, 7)):
        lean = lean_fx.leanify(net, X(2, 3), reduction=reduction, channels=8)
        costs = lean_fx.costs_of(lean, X(2, 3))
        assert [each.macs for each in costs.nodes] == [2 * 3 * 64, 2 * macs, 2 * 8 * 4]
    assert lean_fx.plan(net, reduction=Halved).sites[0].macs is None


# Reductions.


@pytest.mark.parametrize("reduction", lean_fx.reductions())
def test_reductions_count_by_their_own_formula(reduction):
    net = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 4, 1))
    x = torch.zeros(2, 3, 5, 5)
    lean = lean_fx.leanify(net, x, channels=8, reduction=reduction)
    (module,) = lean.reductions.children()
    costs = lean_fx.costs_of(lean, x)
    (node,) = (each for each in costs.nodes if each.name.startswith("reductions."))
    assert node.macs == module.macs_per_position * 50
    assert node.parameters == count_parameters(module)
    held = sum(4 * each.numel() for each in (*module.parameters(), *module.buffers()))
    if reduction == "slice":
        assert node.moved_bytes == 0
    else:
        assert node.read_bytes == 4 * 50 * 64 + held
        assert node.written_bytes == 4 * 50 * 8
    assert costs.macs == count_macs(lean, x)
    assert costs.without_formula == ()


def test_macs_of_lean_by_hand():
    net = nn.Sequential(lean_fx.LeanReduction(64, 8, nonnegative=True))
    assert lean_fx.costs_of(net, X(2, 64, 5, 5)).macs == 4 * 64 * 50
    assert lean_fx.costs_of(nn.Sequential(GroupedSumReduction(64, 8)), X(2, 64)).macs == 128
    assert lean_fx.costs_of(nn.Sequential(ProjectionReduction(64, 8)), X(2, 64)).macs == 1024


@pytest.mark.parametrize("model", CHANGED)
def test_both_ways_to_count_agree(model):
    make, shape = CHANGED[model]
    net, x = make(), torch.rand(shape)
    for each in (net, lean_fx.leanify(net, x)):
        costs = lean_fx.costs_of(each, x)
        assert costs.macs == count_macs(each, x)
        assert nodes_that_differ(costs, each, x) == []
        assert costs.parameters == count_parameters(each)


# The whole.


def test_the_model_stays_as_it_was():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout())
    net.train()[3].eval()
    before, x = copy.deepcopy(net.state_dict()), torch.rand(4, 3, 2, 2)
    kept, state = x.clone(), torch.get_rng_state()
    lean_fx.costs_of(net, x)
    assert [module.training for module in net] == [True, True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_it_is_counted_in_eval_mode():
    class Mode(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = F.batch_norm(x, X(4), torch.ones(4), training=self.training)
            return self.other(self.layer(x)) if self.training else self.layer(x)

    assert lean_fx.costs_of(Mode().train(), X(1, 4)).macs == 16


def test_inputs_within_a_list_stay_as_they_were():
    inputs = [torch.ones(3), torch.ones(3)]
    costs = lean_fx.costs_of(Net(lambda m, x: x[0].add_(x[1])), (inputs,))
    assert costs.moved_bytes == 3 * 12
    assert torch.equal(inputs[0], torch.ones(3))


def test_it_counts_in_inference_mode():
    with torch.inference_mode():
        assert lean_fx.costs_of(nn.Sequential(nn.ReLU(inplace=True)), X(4)).moved_bytes == 32


def test_a_layer_alone_is_a_model_too():
    lean, x = lean_fx.LeanReduction(64, 8), X(2, 64)
    assert lean_fx.costs_of(lean, x).macs == count_macs(lean, x) == 2 * (2 + 8) * 64
    attention, x = nn.MultiheadAttention(8, 2), X(5, 1, 8)
    (node,) = lean_fx.costs_of(attention, (x, x, x)).nodes
    assert (node.name, node.kind) == ("layer", "MultiheadAttention")
    assert node.macs == count_macs(attention, (x, x, x))
    assert node.read_bytes == 4 * (3 * 40 + count_parameters(attention))


def test_costs_add_up_and_are_shown():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(200, 10))
    costs = lean_fx.costs_of(net, X(1, 3, 5, 5))
    head, conv, linear, total = costs.rows()  # the flatten costs nothing
    assert head == (
        "",
        "kind",
        "parameters",
        "weights, kB",
        "MACs, million",
        "read, kB",
        "written, kB",
    )
    assert conv == ("0", "Conv2d", "224", "0.896", "0.00540", "1.20", "0.800")
    assert linear == ("2", "Linear", "2,010", "8.04", "0.00200", "8.84", "0.0400")
    assert total == ("total", "", "2,234", "8.94", "0.00740", "10.0", "0.840")
    assert costs.macs == 5400 + 2000
    assert costs.parameters == count_parameters(net)
    assert costs.weight_bytes == 4 * costs.parameters
    assert costs.moved_bytes == 4 * (75 + 224 + 200 + 200 + 2010 + 10)
    assert "| 2 | Linear | 2,010 |" in costs.to_markdown()
    assert costs.table().title.plain == "Sequential"
    told = json.loads(costs.to_json())
    assert told["nodes"][0]["macs"] == 5400
    assert told["macs"] == costs.macs
    assert told["moved_bytes"] == costs.moved_bytes


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_errors():
    with pytest.raises(CaptureError, match="Branches: torch.fx cannot trace its forward"):
        lean_fx.costs_of(Branches(), X(3))
    with pytest.raises(
        ArgumentError, match=r"costs_of: Linear fails on inputs of shape \[1, 5\] \("
    ):
        lean_fx.costs_of(nn.Linear(3, 2), X(1, 5))
    with pytest.raises(ArgumentError, match="example_inputs=int object is neither a tensor nor"):
        lean_fx.costs_of(nn.Linear(3, 2), 3)
    with pytest.raises(ArgumentError, match="model=int object is not a torch.nn.Module"):
        lean_fx.costs_of(3, X(3))
