"""Rebuilt layers start at the output scale of the layers that they replace."""

import pytest
import torch
from torch import nn

import lean_fx
from graphs import Residual
from lean_fx.capture.capturing import capture
from lean_fx.passes import MeasureScale, facts


class PaperForm(nn.Sequential):
    def __init__(self):
        layers = []
        for before, after in ((3, 50), (50, 100), (100, 150)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(150 * 16, 10))


class VGG11Form(nn.Sequential):
    def __init__(self):
        layers, before = [], 3
        for after in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
            if after:
                layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True)]
                before = after
            else:
                layers.append(nn.MaxPool2d(2))
        head = [nn.Linear(512, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 10)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


class Block(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Identity()
        if stride > 1:
            self.down = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + self.down(x))


class ResNet18Form(nn.Sequential):
    def __init__(self):
        stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
        blocks, before = [], 64
        for after, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [Block(before, after, stride), Block(after, after, 1)]
            before = after
        super().__init__(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def output_stds(model, layers, inputs):
    stds = {}
    for name in layers:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: stds.update({name: float(out.std())})
        )
    with torch.no_grad():
        model(inputs)
    return stds


@pytest.mark.parametrize("channels", ["sqrt", "tenth"])
@pytest.mark.parametrize("form", [PaperForm, VGG11Form, ResNet18Form])
def test_output_scale_is_within_a_factor_of_two_of_the_baseline(form, channels):
    torch.manual_seed(0)
    model, inputs = form(), torch.randn(4, 3, 32, 32)
    lean = lean_fx.leanify(model, inputs, channels=channels)
    layers = [name for site in lean.meta["lean_fx.plan"].sites for name in site.layers]
    assert len(layers) > 2
    before, after = (output_stds(net, layers, inputs) for net in (model, lean))
    ratios = {name: after[name] / before[name] for name in layers}
    assert all(0.5 < ratio < 2 for ratio in ratios.values()), ratios


def test_a_layer_that_starts_at_zero_stays_there():
    model = Residual()
    nn.init.zeros_(model.left.weight)
    nn.init.zeros_(model.head.bias)
    lean = lean_fx.leanify(model)
    assert not lean.left.weight.any()
    assert not lean.head.bias.any()
    assert lean.head.weight.all()


def test_measuring_changes_neither_buffers_nor_random_numbers():
    captured = capture(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)))
    before = {name: value.clone() for name, value in captured.state_dict().items()}
    state = torch.get_rng_state()
    MeasureScale((torch.full((8, 3, 4, 4), 1e6),))(captured)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in captured.state_dict().items():
        assert torch.equal(value, before[name])
    scales = {node.name: facts(node).rms for node in captured.graph.nodes}
    assert scales["input_1"] == pytest.approx(1, rel=0.2)
    assert scales["_1"] == pytest.approx(1, rel=0.05)


class Particular(nn.Module):
    """Takes no normal numbers."""

    def __init__(self, first, change):
        super().__init__()
        self.first, self.second, self.change = first, nn.Linear(32, 64), change

    def forward(self, x):
        return self.second(self.first(self.change(x)).relu())


@pytest.mark.parametrize(
    ("first", "change", "draw"),
    [
        (nn.Linear(8, 32), lambda x: torch.log(x + 1e-3), lambda: torch.rand(256, 8)),
        (nn.Linear(8, 32), torch.bernoulli, lambda: torch.rand(256, 8)),
        (nn.Embedding(10, 32), lambda x: x.long(), lambda: torch.randint(0, 10, (256,)).float()),
    ],
    ids=["log", "bernoulli", "embedding"],
)
def test_inputs_that_may_not_be_normal(first, change, draw):
    model, inputs = Particular(first, change), draw()
    lean = lean_fx.leanify(model, inputs, channels=4)
    assert 0.5 < lean(inputs).std() / model(inputs).std() < 2


def test_an_unknown_scale_is_no_error():
    model = Particular(nn.Linear(8, 32), lambda x: x * float("inf"))
    lean = lean_fx.leanify(model, torch.rand(4, 8), channels=4)
    assert all(parameter.isfinite().all() for parameter in lean.parameters())


class LastAxisNorm(nn.LayerNorm):
    """Layer normalization of the channels of images."""

    def forward(self, x):
        return super().forward(x.transpose(1, -1)).transpose(1, -1)


class Watched(nn.Sequential):
    """Looks at values, which no graph can."""

    def forward(self, x):
        if bool(x.isnan().any()):
            raise ValueError
        return super().forward(x)


def deep(kind, norm, depth=16, width=32):
    """Small first weights, as of transformers: without training statistics values die out."""
    torch.manual_seed(0)
    layers, before = [], 3
    for _ in range(depth):
        layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), norm(width), nn.ReLU()]
        nn.init.normal_(layers[-3].weight, std=0.02)
        before = width
    return kind(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def first_gradient(model):
    torch.manual_seed(0)
    inputs, labels = torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,))
    nn.functional.cross_entropy(model.train()(inputs), labels).backward()
    return float(next(model.parameters()).grad.norm())


# Not the literal walk, which amplifies, nor max: examples/docs/conditioning.md says why.
TRAINING = (
    *("slice", "grouped_sum", "projection", "random_projection", "mean"),
    *("lean_damped", "lean_simplex", "lean_gated"),
)
NORMS = {
    "batch": nn.BatchNorm2d,
    "layer": LastAxisNorm,
    "group": lambda width: nn.GroupNorm(4, width),
}


@pytest.mark.parametrize("reduction", TRAINING)
@pytest.mark.parametrize("norm", NORMS)
def test_the_first_of_16_layers_learns_as_before(norm, reduction):
    model = deep(nn.Sequential, NORMS[norm])
    lean = lean_fx.leanify(model, torch.randn(8, 3, 8, 8), reduction=reduction)
    assert 0.1 < first_gradient(lean) / first_gradient(model) < 10


def part_that_differs(model, inputs):
    """Of what the last of 16 norms gives, the part that differs between the inputs."""
    *_, last = (module for module in model.modules() if isinstance(module, nn.GroupNorm))
    parts = []
    last.register_forward_hook(lambda *seen: parts.append(seen[2].std(0).mean() / seen[2].std()))
    model.train()(inputs)
    return parts[0]


@pytest.mark.parametrize("reduction", TRAINING)
def test_what_tells_inputs_apart_reaches_the_last_of_16_layers(reduction):
    inputs, model = torch.randn(8, 3, 8, 8), deep(nn.Sequential, NORMS["group"])
    lean = lean_fx.leanify(model, inputs, reduction=reduction)
    assert part_that_differs(lean, inputs) > part_that_differs(model, inputs) / 2


@pytest.mark.parametrize("kind", [nn.Sequential, Watched])
@pytest.mark.parametrize("form", ["graph", "module"])
@pytest.mark.filterwarnings("ignore:.*each layer reduces its own input")
def test_the_scale_is_that_of_training_whatever_the_mode(kind, form):
    inputs, scales = torch.randn(8, 3, 8, 8), []
    for training in (True, False):
        model = deep(kind, nn.BatchNorm2d).train(training)
        before = {name: each.clone() for name, each in model.named_buffers()}
        plan = lean_fx.plan(model, inputs, form=form)
        scales.append([site.rms for site in plan.sites])
        assert all(torch.equal(each, before[name]) for name, each in model.named_buffers())
        assert all(module.training is training for module in model.modules())
    assert scales[0] == scales[1]
    assert 0.3 < min(scales[0]) < max(scales[0]) < 3


def test_what_cannot_train_on_the_inputs_is_measured_in_evaluation():
    layers = [nn.Conv2d(3, 32, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(32), nn.Conv2d(32, 4, 1)]
    plan = lean_fx.plan(nn.Sequential(*layers).eval(), torch.randn(1, 3, 8, 8))
    (site,) = plan.sites
    assert 0 < site.rms < 1
