"""Where the reductions stand: graphs as text."""

import torch
from expecttest import assert_expected_inline
from torch.nn import functional as F

import lean_fx
from graphs import Flattened, Grouped, InPlace, Residual, SharedFlatten, Tokens, graph_text


def lean_text(model):
    lean = lean_fx.leanify(model)
    return graph_text(lean)


def test_shared_reduction_and_untouched_residual():
    assert_expected_inline(
        lean_text(Residual()),
        """\
x = x()
stem = stem(x)  # Conv2d(3, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
relu = relu(stem, inplace=False)
reductions_relu = reductions.relu(relu)  # LeanReduction(32, 4, dim=1, nonnegative)
left = left(reductions_relu)  # Conv2d(4, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
right = right(reductions_relu)  # Conv2d(4, 32, kernel_size=(1, 1), stride=(1, 1))
sigmoid = sigmoid(right)
mul = mul(left, sigmoid)
add = add(relu, mul)
mean = mean(add, (2, 3))
reductions_mean = reductions.mean(mean)  # LeanReduction(32, 4, dim=-1)
head = head(reductions_mean)  # Linear(in_features=4, out_features=5, bias=True)
output = output(head)
""",
    )


def test_reduction_before_flatten():
    assert_expected_inline(
        lean_text(Flattened()),
        """\
x = x()
conv = conv(x)  # Conv2d(1, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
relu = relu(conv, inplace=False)
pool = pool(relu)  # MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
reductions_pool = reductions.pool(pool)  # LeanReduction(16, 4, dim=1, nonnegative)
flatten = flatten(reductions_pool, 1)
drop = drop(flatten)  # Dropout(p=0.5, inplace=False)
head = head(drop)  # Linear(in_features=36, out_features=5, bias=True)
output = output(head)
""",
    )


def test_view_becomes_reshape_where_shapes_show_that_it_flattens():
    lean = lean_fx.leanify(Flattened("view with features"), torch.rand(2, 1, 6, 6))
    assert_expected_inline(
        graph_text(lean),
        """\
x = x()
conv = conv(x)  # Conv2d(1, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
relu = relu(conv, inplace=False)
pool = pool(relu)  # MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
reductions_pool = reductions.pool(pool)  # LeanReduction(16, 4, dim=1, nonnegative)
reshape = reshape(reductions_pool, (-1, 36))
drop = drop(reshape)  # Dropout(p=0.5, inplace=False)
head = head(drop)  # Linear(in_features=36, out_features=5, bias=True)
output = output(head)
""",
    )


def test_view_that_may_merge_rows_is_read_as_it_is():
    assert_expected_inline(
        lean_text(Flattened("view with features")),
        """\
x = x()
conv = conv(x)  # Conv2d(1, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
relu = relu(conv, inplace=False)
pool = pool(relu)  # MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
view = view(pool, -1, 144)
drop = drop(view)  # Dropout(p=0.5, inplace=False)
reductions_drop = reductions.drop(drop)  # LeanReduction(144, 12, dim=-1, nonnegative)
head = head(reductions_drop)  # Linear(in_features=12, out_features=5, bias=True)
output = output(head)
""",
    )


def test_sizes_of_a_replaced_view_go():
    assert_expected_inline(
        lean_text(Flattened("view of sizes")),
        """\
x = x()
conv = conv(x)  # Conv2d(1, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
relu = relu(conv, inplace=False)
pool = pool(relu)  # MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
size = size(pool, 0)
reductions_pool = reductions.pool(pool)  # LeanReduction(16, 4, dim=1, nonnegative)
reshape = reshape(reductions_pool, (size, -1))
drop = drop(reshape)  # Dropout(p=0.5, inplace=False)
head = head(drop)  # Linear(in_features=36, out_features=5, bias=True)
output = output(head)
""",
    )


def test_flatten_that_others_read_is_copied():
    assert_expected_inline(
        lean_text(SharedFlatten()),
        """\
x = x()
conv = conv(x)  # Conv2d(1, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
relu = relu(conv, inplace=False)
flatten = flatten(relu, 1)
reductions_relu = reductions.relu(relu)  # LeanReduction(16, 4, dim=1, nonnegative)
flatten_1 = flatten(reductions_relu, 1)
head = head(flatten_1)  # Linear(in_features=144, out_features=5, bias=True)
output = output((head, flatten))
""",
    )


def test_reduction_stands_behind_the_in_place_call():
    assert_expected_inline(
        lean_text(InPlace()),
        """\
x = x()
stem = stem(x)  # Conv2d(3, 16, kernel_size=(1, 1), stride=(1, 1))
relu = relu(stem)  # ReLU(inplace=True)
reductions_stem = reductions.stem(stem)  # LeanReduction(16, 4, dim=1)
left = left(reductions_stem)  # Conv2d(4, 4, kernel_size=(1, 1), stride=(1, 1))
reductions_relu = reductions.relu(relu)  # LeanReduction(16, 4, dim=1, nonnegative)
right = right(reductions_relu)  # Conv2d(4, 4, kernel_size=(1, 1), stride=(1, 1))
add = add(left, right)
output = output(add)
""",
    )


def test_groups_are_reduced_one_by_one():
    lean = lean_fx.leanify(Grouped(), torch.rand(2, 3, 8, 8), channels=4).eval()
    assert_expected_inline(
        graph_text(lean),
        """\
x = x()
stem = stem(x)  # Conv2d(3, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
relu = relu(stem, inplace=False)
reductions_relu = reductions.relu(relu)  # LeanReduction(64, 4, dim=1, nonnegative)
plain = plain(reductions_relu)  # Conv2d(4, 48, kernel_size=(1, 1), stride=(1, 1))
unflatten = unflatten(relu, 1, (4, 16))
reductions_relu_1 = reductions.relu_1(unflatten)  # LeanReduction(16, 4, dim=2, nonnegative)
flatten = flatten(reductions_relu_1, 1, 2)
left = left(flatten)  # Conv2d(16, 48, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=4)
add = add(plain, left)
unflatten_1 = unflatten(relu, 1, (2, 32))
reductions_relu_2 = reductions.relu_2(unflatten_1)  # LeanReduction(32, 4, dim=2, nonnegative)
flatten_1 = flatten(reductions_relu_2, 1, 2)
right = right(flatten_1)  # Conv2d(8, 48, kernel_size=(1, 1), stride=(1, 1), groups=2, bias=False)
add_1 = add(add, right)
relu_1 = relu(add_1, inplace=False)
unflatten_2 = unflatten(relu_1, 1, (2, 24))
reductions_relu_1_1 = reductions.relu_1_1(unflatten_2)  # LeanReduction(24, 4, dim=2, nonnegative)
flatten_2 = flatten(reductions_relu_1_1, 1, 2)
up = up(flatten_2)  # ConvTranspose2d(8, 4, kernel_size=(2, 2), stride=(2, 2), groups=2)
output = output(up)
""",
    )
    x = torch.rand(1, 64, 5, 5)
    reduction = lean.reductions.relu_1
    parts = [reduction(part.unsqueeze(1)).squeeze(1) for part in x.split(16, 1)]
    literal = [  # each group of the layer is a conv of its own
        F.conv2d(part, weight, bias, padding=1)
        for part, weight, bias in zip(
            parts, lean.left.weight.split(12), lean.left.bias.split(12), strict=True
        )
    ]
    grouped = reduction(x.unflatten(1, (4, 16))).flatten(1, 2)
    torch.testing.assert_close(lean.left(grouped), torch.cat(literal, 1))


def test_channels_last():
    assert_expected_inline(
        lean_text(Tokens()),
        """\
x = x()
patch = patch(x)  # Conv2d(3, 32, kernel_size=(4, 4), stride=(4, 4))
flatten = flatten(patch, 2)
transpose = transpose(flatten, 1, 2)
norm = norm(transpose)  # LayerNorm((32,), eps=1e-05, elementwise_affine=True, bias=True)
reductions_norm = reductions.norm(norm)  # LeanReduction(32, 4, dim=-1)
up = up(reductions_norm)  # Linear(in_features=4, out_features=64, bias=True)
gelu = gelu(up)
reductions_gelu = reductions.gelu(gelu)  # LeanReduction(64, 8, dim=-1)
down = down(reductions_gelu)  # Linear(in_features=8, out_features=32, bias=True)
add = add(transpose, down)
reductions_add = reductions.add(add)  # LeanReduction(32, 4, dim=-1)
flatten_1 = flatten(reductions_add, 1)
head = head(flatten_1)  # Linear(in_features=16, out_features=5, bias=True)
output = output(head)
""",
    )
