"""Nets beyond picture classifiers, from their own code to an ONNX file: nothing is set for them."""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lean_fx
from beyond_nets import AudioNet, Decoder, Encoder, Mixer, TabularMLP, UNet, VolumeNet
from cases import slow_unless

ROWS, STEPS = 32, 60


Batch = tuple[tuple[Tensor, ...], Tensor]
"""Inputs and targets; the generators below take how many, and sizes of the other axes."""


def counting(count: int, length: int = 16) -> Batch:
    """Tokens that count by 1 or 2, and the ones that follow: two of them tell the next."""
    starts, steps = torch.randint(16, (count, 1)), torch.randint(1, 3, (count, 1))
    tokens = (starts + steps * torch.arange(length + 1)) % 16
    return (tokens[:, :-1],), tokens[:, 1:]


def marked_sentences(count: int, length: int = 12) -> Batch:
    """Padded sentences of two segments: one of three tokens, somewhere, is the class."""
    sizes = torch.randint(length // 2, length + 1, (count, 1))
    places, labels = torch.arange(length), torch.randint(3, (count,))
    tokens = torch.randint(4, 20, (count, length))
    marks = places == 1 + (torch.rand(count, 1) * (sizes - 1)).long()
    tokens = torch.where(marks, 1 + labels[:, None], tokens).where(places < sizes, 0)
    return (tokens, (places >= sizes // 2).long()), labels


def discs(count: int, side: int = 16) -> Batch:
    """Noisy pictures of a disc, and its pixels: about half of them."""
    centres = side * (0.25 + torch.rand(count, 2, 1, 1) / 2)
    radii = side * (0.25 + torch.rand(count, 1, 1) / 4)
    rows, columns = torch.arange(side).view(-1, 1), torch.arange(side)
    inside = (rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2 < radii**2
    pixels = inside.float().unsqueeze(1)
    return (pixels + 0.5 * torch.randn_like(pixels),), pixels


def scanned_digits(count: int) -> Batch:
    pictures, labels = (torch.tensor(each) for each in load_digits(return_X_y=True))
    rows = torch.randperm(len(labels))[:count]
    return (pictures[rows].float().view(-1, 1, 8, 8) / 16,), labels[rows]


def table(count: int) -> Batch:
    """Rows of eight numbers and two categories, in two classes."""
    numbers = torch.randn(count, 8)
    categories = torch.stack([torch.randint(size, (count,)) for size in (5, 12)], 1)
    worth = numbers[:, 0] - numbers[:, 1] + categories[:, 0] - 2 + categories[:, 1] % 3 - 1
    return (numbers, categories), (worth > 0).float()


def tones(count: int, length: int = 512) -> Batch:
    """Noisy tones of four pitches."""
    labels, phases = torch.randint(4, (count,)), torch.rand(count, 1) * 2 * math.pi
    waves = torch.sin(phases + 0.1 * 2.0 ** labels[:, None] * torch.arange(length))
    return ((waves + 0.3 * torch.randn_like(waves)).unsqueeze(1),), labels


def bars(count: int, side: int = 8) -> Batch:
    """Noisy volumes with a bar along one of the three axes."""
    labels, places = torch.randint(3, (count,)), torch.randint(side, (count, 2))
    volumes = torch.zeros(count, side, side, side)
    for volume, label, (first, second) in zip(volumes, labels, places, strict=True):
        volume.movedim(int(label), 0)[:, first, second] = 1
    return ((volumes + 0.1 * torch.randn_like(volumes)).unsqueeze(1),), labels


def over_tokens(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@dataclass(frozen=True)
class Case:
    """A net, what it learns, and what is expected of it.

    Attributes:
        model: makes the net.
        data: gives inputs and targets for a batch size, and sizes of other axes by name.
        loss: of outputs and targets.
        reduced: the layers to reduce, each with its channels before and after.
        left: the layers to leave alone, each with the reason.
        falls_to: the loss of the last steps, at most, as a part of that of the first.
        axes: axes besides the batch that may have any size, as in ``dynamic_shapes=``.
        sizes: other sizes of those axes.
        reduction: with which it trains. The literal form amplifies rounding in a deep net, so that
            where its training ends differs from machine to machine.
    """

    model: Callable[[], nn.Module]
    data: Callable[..., Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    reduced: dict[str, tuple[int, int]]
    left: dict[str, str]
    falls_to: float
    axes: tuple[dict[int, str], ...] | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    reduction: str = "lean"


def in_blocks(**layers: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """The same layers in each of two blocks."""
    names = {name.replace("__", "."): channels for name, channels in layers.items()}
    return {f"blocks.{i}.{name}": each for i in range(2) for name, each in names.items()}


def below(channels: int) -> str:
    return f"in_channels={channels} is below min_channels=16"


CASES = {
    "decoder": Case(
        lambda: Decoder(tokens=16),
        counting,
        over_tokens,
        in_blocks(attention__qkv=(32, 4), attention__proj=(32, 4), mlp__0=(32, 4), mlp__2=(128, 8)),
        {"head": "its parameter is used elsewhere: token.weight, head.weight"},
        0.75,
        ({0: "batch", 1: "length"},),
        {"length": 31},
    ),
    "encoder": Case(
        lambda: Encoder(tokens=20, classes=3),
        marked_sentences,
        F.cross_entropy,
        in_blocks(
            attention__in_proj=(32, 4),
            attention__out_proj=(32, 4),
            linear1=(32, 4),
            linear2=(128, 8),
        )
        | {"pooler": (32, 4), "classifier": (32, 4)},
        {},
        0.5,
        ({0: "batch", 1: "length"},) * 2,
        {"length": 29},
    ),
    "unet": Case(
        UNet,
        discs,
        F.binary_cross_entropy_with_logits,
        {"down1.3": (16, 4), "down2.0": (16, 4), "down2.3": (32, 4), "bottom.0": (32, 4)}
        | {"bottom.3": (64, 8), "up2": (64, 8), "merge2.0": (64, 8), "merge2.3": (32, 4)}
        | {"up1": (32, 4), "merge1.0": (32, 4), "merge1.3": (16, 4), "head": (16, 4)},
        {"down1.0": below(1)},
        0.2,
        reduction="lean_damped",
    ),
    "mixer": Case(
        Mixer,
        scanned_digits,
        F.cross_entropy,
        in_blocks(patches__0=(16, 4), patches__2=(32, 4), channels__0=(32, 4), channels__2=(64, 8))
        | {"head": (32, 4)},
        {"stem": below(1)},
        0.6,
    ),
    "tabular": Case(
        lambda: TabularMLP(columns=8, sizes=(5, 12)),
        table,
        F.binary_cross_entropy_with_logits,
        {"layers.0": (24, 4), "layers.4": (64, 8), "layers.8": (64, 8)},
        {},
        0.5,
    ),
    "audio": Case(
        lambda: AudioNet(classes=4),
        tones,
        F.cross_entropy,
        {"features.4": (16, 4), "features.8": (32, 4), "head": (64, 8)},
        {"features.0": below(1)},
        0.5,
        ({0: "batch", 2: "length"},),
        {"length": 700},
    ),
    "volume": Case(
        VolumeNet,
        bars,
        F.cross_entropy,
        {"conv2": (16, 4), "fc": (32, 4), "head": (64, 8)},
        {"conv1": below(1)},
        0.1,
        reduction="lean_damped",  # literal LEAN's training hangs on rounding here
    ),
}


@dataclass(frozen=True)
class Trained:
    """A net, its copy from before, its reduced form after training, and the losses on the way."""

    case: Case
    model: nn.Module
    before: nn.Module
    lean: nn.Module
    losses: list[float]
    without_gradient: set[str]


@functools.cache
def trained(name: str) -> Trained:
    torch.manual_seed(0)
    case = CASES[name]
    model = case.model()
    before = copy.deepcopy(model)
    inputs, targets = case.data(ROWS)
    lean = lean_fx.leanify(model, inputs, reduction=case.reduction)
    optimizer = torch.optim.Adam(lean.parameters(), lr=2e-2)
    losses, without = [], {name for name, _ in lean.named_parameters()}
    for _ in range(STEPS):
        loss = case.loss(lean(*inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        without -= {n for n, p in lean.named_parameters() if p.grad is not None and p.grad.any()}
    return Trained(case, model, before, lean.eval(), losses, without)


@pytest.mark.parametrize("name", CASES)
def test_what_is_reduced_and_what_is_left_alone(name):
    run = trained(name)
    plan = run.lean.meta["lean_fx.plan"]
    channels = {
        layer: (site.in_channels, site.out_channels) for site in plan.sites for layer in site.layers
    }
    assert channels == run.case.reduced
    assert {each.layer: each.reason.text for each in plan.left_alone} == run.case.left
    for layer in run.case.left:
        assert str(run.lean.get_submodule(layer)) == str(run.model.get_submodule(layer))


@pytest.mark.parametrize("name", CASES)
def test_it_trains(name):
    run = trained(name)
    assert run.without_gradient == set()
    assert sum(run.losses[-5:]) / 5 < run.case.falls_to * run.losses[0]


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_untouched(name):
    run = trained(name)
    assert type(run.model) is type(run.before)
    assert str(run.model) == str(run.before)
    now, before = run.model.state_dict(), run.before.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[key], before[key]) for key in before)
    assert all(parameter.grad is None for parameter in run.model.parameters())


@pytest.mark.parametrize(
    "name",
    slow_unless(lambda name: name in ("decoder", "audio"), [(each,) for each in CASES]),
)
def test_its_file_gives_what_it_gives(name, tmp_path):
    run = trained(name)
    path, data = tmp_path / "lean.onnx", run.case.data
    lean_fx.export_onnx(run.lean, path, data(2)[0], dynamic_shapes=run.case.axes)
    session = onnxruntime.InferenceSession(path)
    names = [each.name for each in session.get_inputs()]
    for inputs in (data(1)[0], data(5)[0], data(7, **run.case.sizes)[0]):
        fed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        (found,) = session.run(None, fed)
        with torch.no_grad():
            torch.testing.assert_close(
                torch.from_numpy(found), run.lean(*inputs), rtol=1e-3, atol=1e-4
            )


def test_a_reduced_decoder_sees_no_later_token():
    lean = trained("decoder").lean
    (tokens,), _ = counting(2)
    changed = tokens.clone()
    changed[:, 9:] = 15 - changed[:, 9:]
    with torch.no_grad():
        now, then = lean(tokens), lean(changed)
    torch.testing.assert_close(now[:, :9], then[:, :9])
    assert not torch.allclose(now[:, 9:], then[:, 9:])


def test_a_reduced_decoder_keeps_its_head_tied():
    lean = trained("decoder").lean
    assert lean.head.weight is lean.token.weight


def test_padding_is_nothing_to_a_reduced_encoder():
    lean = trained("encoder").lean
    (tokens, segments), _ = marked_sentences(4)
    with torch.no_grad():
        longer = lean(F.pad(tokens, (0, 6)), F.pad(segments, (0, 6)))
        torch.testing.assert_close(longer, lean(tokens, segments))
