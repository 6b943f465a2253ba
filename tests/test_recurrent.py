"""Recurrent layers: split, reduced, packed."""

import copy
import itertools
import json
import pickle

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

import lean_fx
from graphs import graph_text
from lean_fx.capture.capturing import capture
from lean_fx.errors import BranchError, PlanError
from lean_fx.measure.timing import Latency
from lean_fx.passes import SplitLayers
from lean_fx.reduction.packed import with_data
from lean_fx.skip_reason import LeftAlone, SkipReason

OPTIONS = [
    {},
    {"batch_first": True},
    {"bidirectional": True},
    {"bias": False, "batch_first": True},
    {"bidirectional": True, "batch_first": True, "dropout": 0.5},
]
KINDS = [(nn.RNN, {}), (nn.RNN, {"nonlinearity": "relu"}), (nn.LSTM, {}), (nn.GRU, {})]
KINDS += [(nn.LSTM, {"proj_size": 4})]
STACKS = [
    (kind, {"num_layers": layers, **own, **options})
    for (kind, own), options, layers in itertools.product(KINDS, OPTIONS, (2, 3))
]


class Whole(nn.Module):
    """A stack, given states or none, whose result is returned as it is."""

    def __init__(self, kind, **options):
        super().__init__()
        self.stack = kind(6, 8, **options)

    def forward(self, x, states=None):
        return self.stack(x, states)


def states_of(stack, batch):
    directions = 2 if stack.bidirectional else 1
    widths = [stack.proj_size or stack.hidden_size, stack.hidden_size]
    made = [torch.randn(stack.num_layers * directions, *batch, width) for width in widths]
    return tuple(made) if isinstance(stack, nn.LSTM) else made[0]


def pack(x, lengths, *, batch_first=False, **options):
    return pack_padded_sequence(x, torch.tensor(lengths), batch_first=batch_first, **options)


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "options"), STACKS, ids=str)
def test_a_split_stack_is_the_stack_exactly(kind, options):
    model = Whole(kind, **options).eval()
    split = {}
    for given in (False, True):
        states = states_of(model.stack, (3,)) if given else None
        module = capture(model, (torch.rand(1), states) if given else ())
        assert SplitLayers(["stack"])(module).modified
        split[given] = module
        x = torch.randn(3, 3, 6)
        assert_equal(module(x, states), model(x, states))
        flat = states_of(model.stack, ()) if given else None
        assert_equal(module(x[0], flat), model(x[0], flat))  # without a batch
    packed = pack(x, [3, 1, 2], batch_first=model.stack.batch_first, enforce_sorted=False)
    assert_equal(split[True](packed, states), model(packed, states))
    packed = pack(x, [3, 2, 1], batch_first=model.stack.batch_first)
    assert_equal(split[False](packed), model(packed))


def test_gradients_of_a_split_stack_are_those_of_the_stack():
    model = Whole(nn.GRU, num_layers=2, bidirectional=True)
    split = SplitLayers(["stack"])(capture(model)).graph_module
    x = torch.randn(4, 3, 6)
    for module in (model, split):
        module(x)[0].square().sum().backward()
    for name, value in model.stack.named_parameters():
        layer = name.partition("_l")[2][0]
        mine = split.get_parameter(f"stack.{layer}.{name.replace(f'_l{layer}', '_l0')}")
        torch.testing.assert_close(mine.grad, value.grad)


def test_dropout_between_split_layers_acts_in_training_alone():
    model = Whole(nn.GRU, num_layers=2, dropout=0.5)
    split = SplitLayers(["stack"])(capture(model)).graph_module
    x = torch.ones(50, 40, 6)
    seen = []
    split.stack.dropout.register_forward_hook(
        lambda module, given, out: seen.append((given[0], out))
    )
    for value in (x, pack(x, [50] * 40)):
        split.train()(value)
        split.eval()(value)
    for (given, training), (same, evaluated) in (seen[:2], seen[2:]):
        given, training, same, evaluated = (
            v.data if isinstance(v, PackedSequence) else v
            for v in (given, training, same, evaluated)
        )
        assert_equal(evaluated, same)
        kept = training != 0
        assert 0.45 < kept.float().mean() < 0.55
        torch.testing.assert_close(training[kept], 2 * given[kept])


class Reads(nn.Module):
    """A stack of which only one thing is read."""

    def __init__(self, kind, read):
        super().__init__()
        self.stack = kind(6, 8, 2)
        self.read = read

    def forward(self, x):
        return self.read(self.stack(x))


@pytest.mark.parametrize(
    "read",
    [
        lambda result: result[0],
        lambda result: result[-1],
        lambda result: result[1][0],
        lambda result: (result, result[1]),
        lambda result: {"all": result},
    ],
)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_however_the_result_is_read(kind, read):
    model = Reads(kind, read).eval()
    x = torch.randn(4, 3, 6)
    module = SplitLayers(["stack"])(capture(model)).graph_module
    found = torch.utils._pytree.tree_leaves(module(x))
    for mine, own in zip(found, torch.utils._pytree.tree_leaves(model(x)), strict=True):
        assert_equal(mine, own)


class Tagger(nn.Module):
    """Packed sequences through a stack to a class for every step."""

    def __init__(self, kind=nn.GRU):
        super().__init__()
        self.embed = nn.Linear(6, 32)
        self.stack = kind(32, 24, 2, batch_first=True, bidirectional=True, dropout=0.1)
        self.head = nn.Linear(48, 5)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(
            self.embed(x), lengths, batch_first=True, enforce_sorted=False
        )
        packed, states = self.stack(packed)
        padded, _ = pad_packed_sequence(packed, batch_first=True)
        return self.head(padded), states


def test_the_graph_of_a_reduced_stack():
    lean = lean_fx.leanify(Tagger(), channels=8)
    assert_expected_inline(
        graph_text(lean),
        """\
x = x()
lengths = lengths()
embed = embed(x)  # Linear(in_features=6, out_features=32, bias=True)
pack_padded_sequence = pack_padded_sequence(embed, lengths, batch_first=True, enforce_sorted=False)
getattr_1 = getattr(pack_padded_sequence, data)
reductions_pack_padded_sequence = reductions.pack_padded_sequence(getattr_1)  # LeanReduction(32, 8, dim=-1)
with_data = with_data(pack_padded_sequence, reductions_pack_padded_sequence)
stack_0 = stack.0(with_data)  # GRU(8, 24, batch_first=True, bidirectional=True)
stack_0_output = getitem(stack_0, 0)
stack_dropout = stack.dropout(stack_0_output)  # SequenceDropout(p=0.1, inplace=False)
getattr_2 = getattr(stack_dropout, data)
reductions_stack_dropout = reductions.stack_dropout(getattr_2)  # LeanReduction(48, 8, dim=-1)
with_data_1 = with_data(stack_dropout, reductions_stack_dropout)
stack_1 = stack.1(with_data_1)  # GRU(8, 24, batch_first=True, bidirectional=True)
stack_1_output = getitem(stack_1, 0)
stack_0_state = getitem(stack_0, 1)
stack_1_state = getitem(stack_1, 1)
stack_states = cat([stack_0_state, stack_1_state])
pad_packed_sequence = pad_packed_sequence(stack_1_output, batch_first=True)
getitem_2 = getitem(pad_packed_sequence, 0)
getitem_3 = getitem(pad_packed_sequence, 1)
reductions_getitem_2 = reductions.getitem_2(getitem_2)  # LeanReduction(48, 8, dim=-1)
head = head(reductions_getitem_2)  # Linear(in_features=8, out_features=5, bias=True)
output = output((head, stack_states))
""",
    )
    assert_expected_inline(
        str(lean.meta["lean_fx.plan"]),
        """\
Plan for Tagger: 3 reductions (lean) before 3 of 4 layers
their weights: 11,760 -> 2,344, of 19,477 parameters in all
split into single layers: stack
value                 sign  MACs  layer    type    channels  weights         note
pack_padded_sequence  any   320   stack.0  GRU     32 -> 8   4,608 -> 1,152
stack_dropout         any   480   stack.1  GRU     48 -> 8   6,912 -> 1,152
getitem_2             any   480   head     Linear  48 -> 8   240 -> 40
left alone
embed  Linear  in_channels=6 is below min_channels=16""",
    )


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_padding_reaches_no_reduction(kind):
    """Each of several packed sequences gives what it gives alone."""
    x, lengths = torch.randn(3, 7, 6), torch.tensor([2, 7, 4])
    lean = lean_fx.leanify(Tagger(kind), (x, lengths)).eval()
    plan = lean.meta["lean_fx.plan"]
    assert [site.packed for site in plan.sites] == [True, True, False]
    out, states = lean(x, lengths)
    x[0, 2:] = float("nan")  # what is padding
    x[2, 4:] = float("nan")
    assert_equal(lean(x, lengths)[0], out)
    for row, length in enumerate(lengths):
        alone, own = lean(x[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(out[row, :length], alone[0])
        for found, expected in zip(
            torch.utils._pytree.tree_leaves(states),
            torch.utils._pytree.tree_leaves(own),
            strict=True,
        ):
            torch.testing.assert_close(found[:, row : row + 1], expected)


def test_packed_sequences_as_inputs():
    model = Whole(nn.LSTM, num_layers=2)
    packed = pack(torch.randn(5, 3, 6), [5, 4, 1])
    lean = lean_fx.leanify(model, packed, min_channels=4, reduce_inputs=True, channels=2)
    (first, second) = lean.meta["lean_fx.plan"].sites
    assert (first.value, first.packed, second.packed) == ("x", True, True)
    out, _ = lean(packed)
    assert isinstance(out, PackedSequence)
    assert_equal(out.batch_sizes, packed.batch_sizes)


def test_with_data_keeps_the_order_of_the_sequences():
    x = torch.randn(5, 3, 6)
    packed = pack(x, [2, 5, 4], enforce_sorted=False)
    doubled, lengths = pad_packed_sequence(with_data(packed, packed.data * 2))
    padded, _ = pad_packed_sequence(packed)
    assert_equal(doubled, padded * 2)
    assert_equal(lengths, torch.tensor([2, 5, 4]))


def test_a_stack_of_which_nothing_inside_is_reduced_stays_whole():
    for options in ({"skip": ["stack"]}, {"min_channels": 60}, {"skip": [nn.GRU]}):
        plan = lean_fx.plan(Tagger(), **options)
        assert plan.split_layers == ()
        assert isinstance(plan.apply(Tagger()).stack, nn.GRU)


def test_a_stack_that_is_not_worth_splitting_says_so():
    model = nn.Sequential(nn.Linear(8, 64), nn.GRU(64, 16, 2))
    for channels in ({"1": 8}, {"1.0": 8, "1.1": 8}, {"1*": 8}):
        plan = lean_fx.plan(model, torch.rand(10, 3, 8), channels=channels)
        assert plan.split_layers == ("1",)
        assert [site.out_channels for site in plan.sites] == [8, 8]
    plan = lean_fx.plan(model, torch.rand(10, 3, 8), channels={"1.0": 8, "1": 4}, min_channels=32)
    assert plan.split_layers == ()
    assert plan.sites[0].layers == ("1",)
    assert [each for each in plan.left_alone if each.layer == "1.1"] == [
        LeftAlone(
            "1.1",
            "GRU",
            SkipReason("within_stack", "stays within 1: in_channels=16 is below min_channels=32"),
        )
    ]


def test_a_stack_that_is_slower_split_and_reduced_stays_whole(monkeypatch):
    def time_onnx(files, value, **options):
        return {name: Latency((2.0 if name == "with" else 1.0,) * 2, 1, 1) for name in files}

    monkeypatch.setattr("lean_fx.measure.timing.time_onnx", time_onnx)
    model, x = nn.Sequential(nn.Linear(8, 20), nn.GRU(20, 32, 2)), torch.rand(5, 2, 8)
    plan = lean_fx.plan(model, x, keep="measured")
    assert (plan.sites, plan.split_layers) == ((), ())
    assert (
        LeftAlone("1", "GRU", SkipReason("keep", "measured 2 ms with it, 1 ms without"))
        in plan.left_alone
    )
    text = "stays within 1: measured 2 ms with it, 1 ms without"
    assert LeftAlone("1.1", "GRU", SkipReason("within_stack", text)) in plan.left_alone


def test_the_values_of_an_rnn_of_relus_are_not_negative():
    model = nn.Sequential(nn.Linear(4, 4), nn.RNN(4, 32, 2, nonlinearity="relu"))
    plan = lean_fx.plan(model)
    assert [(site.layers, site.nonnegative) for site in plan.sites] == [(("1.1",), True)]
    with lean_fx.checking_signs():
        plan.apply(model)(torch.randn(5, 2, 4))


def test_saving_counts_the_products_with_the_input_alone():
    model = nn.Sequential(nn.Linear(8, 64), nn.GRU(64, 32))
    (site,) = lean_fx.plan(model, torch.rand(10, 3, 8), keep="saving").sites
    steps, share = 10 * 3, 1 - site.out_channels / 64
    saved = share * steps * 3 * 32 * 64
    assert f"saves {saved / 1e6:.3g} M MACs" in site.note


def test_a_plan_that_does_not_fit():
    plan = lean_fx.plan(Tagger())
    other = Tagger()
    other.stack = nn.GRU(32, 48, batch_first=True)
    with pytest.raises(PlanError) as caught:
        plan.apply(other)
    assert str(caught.value) == (
        "plan: layer 'stack' is neither a stack of recurrent layers nor a MultiheadAttention that "
        "is called once in this model; make the plan anew from this model"
    )


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_it_learns(cell):
    torch.manual_seed(0)
    x, lengths = torch.randn(32, 6, 6), torch.full((32,), 6)
    wanted = x.cumsum(1)[..., 0].gt(0).long()
    lean = lean_fx.leanify(Tagger(cell), (x, lengths), reduction="lean_magnitude")
    optimizer = torch.optim.Adam(lean.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(lean(x, lengths)[0].flatten(0, 1), wanted.flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


class Chain(nn.Module):
    """A stack that is given states, or none."""

    def __init__(self, layers=2):
        super().__init__()
        self.first = nn.Linear(6, 32)
        self.stack = nn.GRU(32, 32, layers)

    def forward(self, x, states=None):
        return self.stack(self.first(x), states)


def reduced(model, **options):
    plan = lean_fx.plan(model, **options)
    return {layer: site.out_channels for site in plan.sites for layer in site.layers}


def test_skip_channels_and_filter_name_layers_of_a_stack():
    assert reduced(Chain(), skip=["stack.0", "stack.1"]) == {}
    assert reduced(Chain(), skip=["stack.*"]) == {}
    assert reduced(Chain(), skip=["stack.1"]) == {"stack": 4}
    assert reduced(Chain(), skip=["stack.0"]) == {"stack.1": 4}
    assert reduced(Chain(), channels={"stack.0": 8}) == {"stack": 8}
    assert reduced(Chain(), channels={"stack.1": 8}) == {"stack.1": 8}
    assert reduced(Chain(), filter_fn=lambda module, name: name == "stack.1") == {"stack.1": 4}


def test_hooks_and_name_of_the_model_are_kept():
    model, x = Chain(), torch.randn(4, 2, 6)
    model.register_forward_hook(lambda module, given, out: (out[0] * 0, out[1]))
    lean = lean_fx.leanify(model, x)
    assert type(lean).__name__ == "Chain"
    for each in (lean, copy.deepcopy(lean)):
        assert not each(x)[0].any()


def test_states_are_given_or_not_and_counted():
    model, x = Chain(), torch.randn(4, 2, 6)
    lean = lean_fx.leanify(model, (x, torch.randn(2, 2, 32)))
    assert_equal(lean(x), lean(x, torch.zeros(2, 2, 32)))
    for rows in (1, 3, 4):
        with pytest.raises(RuntimeError, match="Expected hidden"):
            lean(x, torch.randn(rows, 2, 32))


def test_a_plan_is_made_without_chance():
    torch.manual_seed(3)
    lean_fx.plan(_CHAIN, torch.randn(4, 2, 6))
    after = torch.rand(1)
    torch.manual_seed(3)
    torch.randn(4, 2, 6)
    assert_equal(after, torch.rand(1))


_CHAIN = Chain()


@pytest.mark.parametrize("layers", [3, 4])
def test_a_plan_knows_how_deep_a_stack_is(layers):
    with pytest.raises(PlanError) as caught:
        lean_fx.plan(Chain()).apply(Chain(layers))
    assert str(caught.value) == (
        f"plan: layer 'stack' has {layers} layers, but the plan names 2; make the plan anew from "
        "this model"
    )


@pytest.mark.parametrize("layer", ["first", "stack"])
def test_a_plan_refuses_layers_with_hooks(layer):
    plan, other = lean_fx.plan(Chain(), reduce_inputs=True, min_channels=6), Chain()
    other.get_submodule(layer).register_forward_hook(lambda module, given, out: None)
    with pytest.raises(PlanError, match=f"layer '{layer}' .*"):
        plan.apply(other)


def test_pickle_leaves_torch_fx_as_it_was():
    x = torch.randn(4, 2, 6)
    lean = lean_fx.leanify(Chain(), x)
    assert_equal(pickle.loads(pickle.dumps(lean))(x), lean(x))
    torch.fx.symbolic_trace(Chain(), {"states": None})
    lean_fx.leanify(Chain())
    with pytest.raises(BranchError):
        lean(x, torch.zeros(2, 2, 32))  # the plan was made without states


class Packs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 32)
        self.one = nn.GRU(32, 32)
        self.two = nn.GRU(32, 32)

    def forward(self, a, b):
        packed, _ = self.one(pack_sequence([self.first(a), self.first(b)]))
        return self.two(packed._replace(data=packed.data.relu()))[1]


def test_however_sequences_are_packed():
    a, b = torch.randn(5, 6), torch.randn(3, 6)
    for inputs in ((), ((a, b),)):
        lean = lean_fx.leanify(Packs(), *inputs)
        assert len(lean.meta["lean_fx.plan"].sites) == 2
        together = lean(a, b)
        for row, value in enumerate((a, b)):
            x = lean.first(value)
            for name in ("one", "two"):
                site = next(s for s in lean.meta["lean_fx.plan"].sites if name in s.layers)
                reduction = lean.get_submodule(f"reductions.{site.name}")
                x, last = lean.get_submodule(name)(reduction(x))
                x = x.relu()
            torch.testing.assert_close(together[:, row], last)


def test_a_reduced_packed_model_is_left_alone_and_compiles():
    x, lengths = torch.randn(3, 7, 6), torch.tensor([2, 7, 4])
    lean = lean_fx.leanify(Tagger(), (x, lengths)).eval()
    plan = lean_fx.plan(lean, (x, lengths))
    assert not plan.sites
    assert sum("reads a reduction already" in each.reason.text for each in plan.left_alone) == 3
    compiled = torch.compile(lean, backend="eager")
    torch.testing.assert_close(compiled(x, lengths)[0], lean(x, lengths)[0])


@pytest.mark.parametrize("split", ['"1"', '{"1": 2}', '[["1"]]', "[1]"])
def test_a_split_that_is_no_list_of_names(split):
    text = lean_fx.plan(Chain()).to_json()
    whole = json.dumps(["stack"], indent=1).replace("\n", "\n ")
    assert whole in text
    with pytest.raises(PlanError, match="split_layers="):
        lean_fx.Plan.from_json(text.replace(whole, split))
