"""Products with weights of no layer: which are named, and why they stay."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

import lean_fx
from support.zoo_rings import reason_for
from support.zoo_sites import find_call_sites, worth_reducing

COMPUTED = "the weight is computed from it in forward, which no layer would do"
ONLY = "only in x @ weight, F.linear and F.conv with fixed settings does it become a layer"


class Relative(nn.Module):
    """Attention whose queries meet an embedding of each relative position, as in MViT."""

    def __init__(self, length=9):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.positions = nn.Parameter(torch.randn(2 * length - 1, 16))
        self.proj = nn.Linear(16, 16)

    def forward(self, x):
        length = self.count(x)
        q, k, v = self.qkv(x).chunk(3, -1)
        steps = torch.arange(length, device=x.device)
        offsets = (steps[:, None] - steps[None, :] + length - 1).long()
        added = torch.einsum("bqc, qkc -> bqk", q, self.positions.to(x)[offsets])
        return self.proj((q @ k.transpose(1, 2) + added).softmax(-1) @ v)

    def count(self, x):
        return x.shape[1]


class Untraced(Relative):
    """Its length depends on values."""

    def count(self, x):
        return int(x.isfinite().all(-1).sum(1).max())


def net(attention):
    return nn.Sequential(nn.Linear(16, 16), attention, nn.ReLU(), nn.Linear(16, 4))


def left(plan):
    return {each.layer: (each.kind, each.reason.text) for each in plan.left_alone}


def test_relative_positions_are_named_and_queries_times_keys_are_not():
    assert_expected_inline(
        str(lean_fx.plan(net(Relative()), torch.rand(2, 9, 16))),
        """\
Plan for Sequential: 3 reductions (lean) before 3 of 5 layers
their weights: 1,088 -> 272, of 1,700 parameters in all
value     sign  MACs  layer   type    channels  weights     note
_0        any   96    1.qkv   Linear  16 -> 4   768 -> 192
matmul_1  any   96    1.proj  Linear  16 -> 4   256 -> 64
_2        >= 0  64    3       Linear  16 -> 4   64 -> 16
left alone
0            Linear  reads the model's input, no intermediate value; reduce_inputs=True reduces it too
1.positions  einsum  the weight is computed from it in forward, which no layer would do""",
    )


def test_relative_positions_in_what_is_not_traced_are_named():
    x = torch.rand(2, 9, 16)
    plan = lean_fx.plan(net(Untraced()), x)
    assert left(plan)["1.positions"] == ("einsum", COMPUTED)
    assert set(left(plan)) == {"0", "1.positions"}
    with pytest.warns(lean_fx.LeanWarning):
        whole = lean_fx.plan(Untraced(), x)
    assert left(whole)["positions"] == ("einsum", COMPUTED)


@pytest.mark.parametrize("attention", [Relative, Untraced])
def test_the_zoo_finds_the_reason_of_each_site(attention):
    x = torch.rand(2, 9, 16)
    lean = lean_fx.leanify(net(attention()).eval(), x)
    sites = [
        site
        for site in find_call_sites(lean, (x,))
        if worth_reducing(site) and not site.reads_reduction
    ]
    reasons = {site.weight: reason_for(site, lean.meta["lean_fx.plan"]) for site in sites}
    assert reasons.pop("1.positions") == COMPUTED
    assert list(reasons) == ["0.weight"]


class Net(nn.Module):
    """Parameters, and what the test's forward makes of them."""

    def __init__(self, forward):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.gain = nn.Parameter(torch.randn(8, 1))
        self.many = nn.Parameter(torch.randn(2, 8, 8))
        self.kernel = nn.Parameter(torch.randn(8, 8, 3))
        self.tied = self.stem.weight
        self.register_buffer("buffer", torch.randn(8, 8))
        self.conv = nn.Conv1d(8, 8, 3)
        self.calls = forward

    def forward(self, x):
        return self.calls(self, self.stem(x))


NAMED = {
    "linear": (lambda m, x: F.linear(x, 2 * m.weight), ("weight", "linear", COMPUTED)),
    "einsum": (
        lambda m, x: torch.einsum("bnc,dc->bnd", x, m.weight.softmax(-1)),
        ("weight", "einsum", COMPUTED),
    ),
    "einsum, implicit": (
        lambda m, x: torch.einsum("bnc,cd", x, m.weight + 1),
        ("weight", "einsum", COMPUTED),
    ),
    "matmul": (lambda m, x: x.matmul(m.weight.view(8, 8)), ("weight", "matmul", COMPUTED)),
    "bmm": (lambda m, x: torch.bmm(x, m.many * 2), ("many", "bmm", COMPUTED)),
    "addmm": (
        lambda m, x: torch.addmm(m.gain.t(), x[0], m.weight * 2),
        ("weight", "addmm", COMPUTED),
    ),
    "on the left": (lambda m, x: m.weight[:4, :4] @ x, ("weight", "matmul", COMPUTED)),
    "buffers and sizes": (
        lambda m, x: x @ (m.buffer[: x.shape[-1]] * m.weight.type_as(x)),
        ("weight", "matmul", COMPUTED),
    ),
    "by a layer": (
        lambda m, x: x @ m.stem(m.weight),
        ("weight", "matmul", COMPUTED.replace("it in", "it and 2 others in")),
    ),
    "two": (
        lambda m, x: F.linear(x, m.weight * m.gain),
        ("weight", "linear", COMPUTED.replace("it in", "it and gain in")),
    ),
    "conv": (
        lambda m, x: F.conv1d(x.mT, m.kernel - m.kernel.mean()),
        ("kernel", "conv1d", COMPUTED),
    ),
    "three axes": (
        lambda m, x: x @ m.many,
        ("many", "matmul", "its shape [2, 8, 8] is not that of a linear layer's weight"),
    ),
    "tied": (
        lambda m, x: x @ m.tied,
        ("tied", "matmul", "its parameter is used elsewhere: stem.weight"),
    ),
    "read again": (
        lambda m, x: x @ m.weight + m.weight.sum(),
        ("weight", "matmul", "its parameter is used elsewhere: read by sum_1"),
    ),
    "transposed, read again": (
        lambda m, x: x @ m.weight.t() + m.weight.sum(),
        ("weight", "matmul", "its parameter is used elsewhere: read by sum_1"),
    ),
    "einsum with a parameter": (
        lambda m, x: torch.einsum("bnc,cd->bnd", x, m.weight),
        ("weight", "einsum", ONLY),
    ),
    "a layer's": (
        lambda m, x: F.conv1d(x.mT, m.conv.weight, dilation=1, stride=2),
        ("conv.weight", "conv1d", "it is the weight of conv, which forward applies otherwise"),
    ),
    "a value's": (
        lambda m, x: F.linear(x, x[0].mean(0, keepdim=True)),
        ("linear", "linear", "its weight is not a parameter"),
    ),
    "of a buffer": (
        lambda m, x: x + F.linear(m.buffer, m.weight)[:4],
        ("weight", "linear", "its input is not a value of the graph"),
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_products_with_weights_are_named(case):
    forward, (name, kind, reason) = NAMED[case]
    found = left(lean_fx.plan(Net(forward), torch.rand(2, 4, 8)))
    del found["stem"]
    found.pop("conv")
    assert found == {name: (kind, reason)}


def written(m, x):
    weight = m.weight.clone()
    weight[:4] = x[0]
    return x @ weight


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x @ x.mT,
        lambda m, x: (x * m.gain.t()) @ (x + m.weight[:4]).mT,
        lambda m, x: torch.einsum("bnc,bmc->bnm", x, x),
        lambda m, x: torch.einsum("bnc,c->bnc", x, m.gain[:, 0]),
        lambda m, x: x @ m.buffer,
        lambda m, x: x + (m.weight @ m.many[0])[:4],
        lambda m, x: x * m.weight[:4],
        written,
    ],
)
def test_products_of_values_and_of_weights_are_not_named(forward):
    plan = lean_fx.plan(Net(forward), torch.rand(2, 4, 8))
    assert set(left(plan)) == {"stem", "conv"}


UNTRACED = {
    "linear": (lambda m, x: F.linear(x, 2 * m.weight), ("weight", "linear", COMPUTED)),
    "bmm": (lambda m, x: torch.bmm(x, m.many * 2), ("many", "bmm", COMPUTED)),
    "@": (
        lambda m, x: x @ m.weight.T,
        ("weight", "matmul", "it is of no layer, and the call is not traced"),
    ),
    "sizes": (lambda m, x: x @ m.weight[: x.shape[2]].to(x).exp(), ("weight", "matmul", COMPUTED)),
    "of values": (lambda m, x: x @ (x + m.weight[:4]).mT, None),
    "of weights": (lambda m, x: x + (m.weight @ m.many[0])[:4], None),
    "of a layer": (lambda m, x: F.conv1d(x.mT, m.conv.weight * 2), None),
    "written": (written, None),
}


@pytest.mark.parametrize("case", UNTRACED)
def test_products_where_nothing_is_traced(case):
    forward, expected = UNTRACED[case]
    net = Net(lambda m, x: forward(m, x) if x.sum() != 0 else x)
    with pytest.warns(lean_fx.LeanWarning):
        found = left(lean_fx.plan(net, torch.rand(2, 4, 8)))
    assert found.pop("stem")[0] == "Linear"
    found.pop("conv")
    assert found == ({expected[0]: expected[1:]} if expected else {})


def test_a_product_inside_of_what_is_not_traced_is_named():
    class OwnLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 32))

        def forward(self, x):
            return F.linear(x, self.weight)

    class Asks(nn.Module):
        """Holds no layer of torch's, and cannot be traced."""

        def __init__(self):
            super().__init__()
            self.own = OwnLinear()

        def forward(self, x):
            return self.own(x if float(x.sum()) > 0 else -x)

    model = nn.Sequential(nn.Linear(8, 32), Asks(), nn.Linear(32, 4))
    for form in ("graph", "module"):
        plan = lean_fx.plan(model, torch.rand(3, 8), form=form)
        assert plan.traced
        assert "1.own.weight" in {each.layer for each in plan.left_alone}
