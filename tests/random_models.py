"""Random models: programs over pictures, sequences and vectors, one for each seed.

A program is a list of steps. Each step reads values that earlier steps made, and makes one more.
The model runs its steps one after the other, so torch.fx can trace it. Some steps sit in a module
of their own; some of these branch on values, which torch.fx cannot trace.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

WIDTHS = (4, 12, 16, 24, 32, 48)


@dataclass(frozen=True)
class Step:
    """A call: ``function(model, *values)``, which reads the values with these numbers."""

    function: Callable[..., Any]
    reads: tuple[int, ...]


@dataclass
class Program:
    """Steps, the layers that they call, and the shapes of all values without the batch."""

    steps: list[Step] = field(default_factory=list)
    layers: dict[str, nn.Module | nn.Parameter] = field(default_factory=dict)
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def add(self, shape: tuple[int, ...], function: Callable[..., Any], *reads: int) -> None:
        """Append a step whose value has this shape."""
        self.steps.append(Step(function, reads))
        self.shapes.append(shape)

    def layer(self, layer: nn.Module | nn.Parameter) -> str:
        """Give a layer or a parameter a name."""
        name = f"part{len(self.layers)}"
        self.layers[name] = layer
        return name


class Model(nn.Module):
    """Runs a program; returns its last value, or its last two."""

    def __init__(self, program: Program, outputs: int = 1) -> None:
        super().__init__()
        self.steps, self.outputs = tuple(program.steps), outputs
        for name, layer in program.layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        """Run the steps."""
        values = [x]
        for step in self.steps:
            values.append(step.function(self, *(values[index] for index in step.reads)))
        return values[-1] if self.outputs == 1 else tuple(values[-self.outputs :])


class Branching(nn.Module):
    """A layer behind a branch on values, which torch.fx cannot trace."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer, whatever the sum of its input is."""
        return self.layer(x) if x.sum() > 0 else self.layer(x * 1)


def random_model(seed: int) -> tuple[nn.Module, Callable[[int], Tensor]]:
    """A model in float64, and a function that gives inputs of a batch size."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shape = rng.choice([(3, 9, 9), (6, 8, 8), (7, 12), (20,)])
    program = Program(shapes=[shape])
    for _ in range(rng.randint(4, 14)):
        _add_step(program, rng)
    model = Model(program, outputs=rng.choice([1, 1, 2])).double()
    return model, lambda batch: torch.randn(batch, *shape, dtype=torch.float64)


def _add_step(program: Program, rng: random.Random) -> None:
    index = max(rng.randrange(len(program.shapes)) for _ in range(3))  # mostly the latest
    shape = program.shapes[index]
    steps = {3: _PICTURES, 2: _SEQUENCES, 1: _VECTORS}[len(shape)] + _ANY
    rng.choice(steps)(program, rng, index)


def _call(program: Program, shape: tuple[int, ...], layer: nn.Module, index: int) -> None:
    name = program.layer(layer)
    program.add(shape, lambda self, x: getattr(self, name)(x), index)


def _conv(program: Program, rng: random.Random, index: int) -> None:
    channels, height, width = program.shapes[index]
    groups = rng.choice([g for g in (1, 1, 2, 4, channels) if channels % g == 0])
    out = rng.choice([w for w in WIDTHS if w % groups == 0] or [channels])
    stride, kernel = rng.choice([1, 1, 2]), rng.choice([1, 3])
    layer: nn.Module = nn.Conv2d(
        channels, out, kernel, stride, kernel // 2, groups=groups, bias=rng.random() < 0.7
    )
    layer = Branching(layer) if rng.random() < 0.1 else layer
    after = [(side - 1) // stride + 1 for side in (height, width)]
    _call(program, (out, *after), layer, index)


def _transposed(program: Program, rng: random.Random, index: int) -> None:
    channels, height, width = program.shapes[index]
    groups = rng.choice([g for g in (1, 2) if channels % g == 0])
    out = rng.choice(WIDTHS)
    if max(height, width) < 12:
        layer = nn.ConvTranspose2d(channels, out, 2, 2, groups=groups)
        _call(program, (out, 2 * height, 2 * width), layer, index)


def _conv_twice(program: Program, rng: random.Random, index: int) -> None:
    """One layer that reads two values."""
    channels, height, width = program.shapes[index]
    name = program.layer(nn.Conv2d(channels, channels, 3, padding=1))
    shape = (channels, height, width)
    program.add(shape, lambda self, x: getattr(self, name)(x), index)
    program.add(shape, lambda self, x: getattr(self, name)(x).relu(), len(program.shapes) - 1)


def _functional_conv(program: Program, rng: random.Random, index: int) -> None:
    """A weight that no layer holds."""
    channels, height, width = program.shapes[index]
    out = rng.choice(WIDTHS)
    name = program.layer(nn.Parameter(torch.randn(out, channels, 1, 1) / channels))
    shape = (out, height, width)
    program.add(shape, lambda self, x: F.conv2d(x, getattr(self, name)), index)


def _picture_norm(program: Program, rng: random.Random, index: int) -> None:
    shape = program.shapes[index]
    layer = rng.choice([nn.BatchNorm2d(shape[0]), nn.GroupNorm(1, shape[0])])
    _call(program, shape, layer, index)


def _pool(program: Program, rng: random.Random, index: int) -> None:
    channels, height, width = program.shapes[index]
    if min(height, width) > 1:
        layer = rng.choice([nn.MaxPool2d(2), nn.AvgPool2d(2)])
        _call(program, (channels, height // 2, width // 2), layer, index)


def _flatten(program: Program, rng: random.Random, index: int) -> None:
    channels, height, width = program.shapes[index]
    shape = (channels * height * width,)
    spelling = rng.choice(
        [
            lambda self, x: x.flatten(1),
            lambda self, x: torch.flatten(x, 1),
            lambda self, x: x.reshape(x.size(0), -1),
        ]
    )
    program.add(shape, spelling, index)


def _chunk(program: Program, rng: random.Random, index: int) -> None:
    channels, *sizes = program.shapes[index]
    if channels % 2 == 0:
        program.add((channels // 2, *sizes), lambda self, x: x.chunk(2, 1)[1], index)


def _to_sequence(program: Program, rng: random.Random, index: int) -> None:
    channels, height, width = program.shapes[index]
    shape = (height * width, channels)
    program.add(shape, lambda self, x: x.flatten(2).transpose(1, 2), index)


def _linear(program: Program, rng: random.Random, index: int) -> None:
    *front, channels = program.shapes[index]
    layer: nn.Module = nn.Linear(channels, out := rng.choice(WIDTHS), bias=rng.random() < 0.7)
    layer = Branching(layer) if rng.random() < 0.1 else layer
    _call(program, (*front, out), layer, index)


def _normed(program: Program, rng: random.Random, index: int) -> None:
    """A layer whose weight is computed from other parameters."""
    *front, channels = program.shapes[index]
    layer = nn.Linear(channels, out := rng.choice(WIDTHS))
    _call(program, (*front, out), parametrizations.weight_norm(layer), index)


def _tied(program: Program, rng: random.Random, index: int) -> None:
    """Two layers with one weight."""
    *front, channels = program.shapes[index]
    first, second = nn.Linear(channels, channels), nn.Linear(channels, channels)
    second.weight = first.weight
    _call(program, (*front, channels), first, index)
    _call(program, (*front, channels), second, len(program.shapes) - 1)


def _matmul(program: Program, rng: random.Random, index: int) -> None:
    *front, channels = program.shapes[index]
    out = rng.choice(WIDTHS)
    name = program.layer(nn.Parameter(torch.randn(channels, out) / channels))
    program.add((*front, out), lambda self, x: x @ getattr(self, name), index)


def _recurrent(program: Program, rng: random.Random, index: int) -> None:
    steps, channels = program.shapes[index]
    kind, hidden = rng.choice([nn.GRU, nn.LSTM, nn.RNN]), rng.choice(WIDTHS)
    layers, both = rng.choice([1, 2]), rng.random() < 0.3
    layer = kind(channels, hidden, layers, batch_first=True, bidirectional=both)
    name = program.layer(layer)
    program.add((steps, hidden * (1 + both)), lambda self, x: getattr(self, name)(x)[0], index)


def _attention(program: Program, rng: random.Random, index: int) -> None:
    steps, channels = program.shapes[index]
    if channels % 4 == 0:
        name = program.layer(nn.MultiheadAttention(channels, 4, batch_first=True))
        program.add((steps, channels), lambda self, x: getattr(self, name)(x, x, x)[0], index)


def _layer_norm(program: Program, rng: random.Random, index: int) -> None:
    shape = program.shapes[index]
    _call(program, shape, nn.LayerNorm(shape[-1]), index)


def _last(program: Program, rng: random.Random, index: int) -> None:
    program.add(program.shapes[index][1:], lambda self, x: x[:, -1], index)


def _activation(program: Program, rng: random.Random, index: int) -> None:
    kinds = [nn.ReLU(), nn.GELU(), nn.Sigmoid(), nn.Tanh(), nn.Softplus(), nn.Dropout(0.3)]
    _call(program, program.shapes[index], rng.choice(kinds), index)


def _dropout(program: Program, rng: random.Random, index: int) -> None:
    shape = program.shapes[index]
    program.add(shape, lambda self, x: F.dropout(x, 0.2, self.training), index)


def _scale(program: Program, rng: random.Random, index: int) -> None:
    """A product with a buffer, which may be below 0."""
    name = program.layer(nn.Buffer(torch.randn(())))
    program.add(program.shapes[index], lambda self, x: x * getattr(self, name), index)


def _nested(program: Program, rng: random.Random, index: int) -> None:
    """A module with a program of its own, whose value is added to what it read if that fits."""
    shape = program.shapes[index]
    inner = Program(shapes=[shape])
    for _ in range(rng.randint(1, 4)):
        _add_step(inner, rng)
    name, made = program.layer(Model(inner)), inner.shapes[-1]
    if made == shape:
        program.add(made, lambda self, x: x + getattr(self, name)(x), index)
    else:
        program.add(made, lambda self, x: getattr(self, name)(x), index)


def _in_place(program: Program, rng: random.Random, index: int) -> None:
    """A change of a fresh value, which later steps see."""
    program.add(program.shapes[index], lambda self, x: (2 * x).relu_(), index)


def _sum(program: Program, rng: random.Random, index: int) -> None:
    shape = program.shapes[index]
    others = [number for number, other in enumerate(program.shapes) if other == shape]
    program.add(shape, lambda self, x, y: x + y, index, rng.choice(others))


def _cat(program: Program, rng: random.Random, index: int) -> None:
    shape = program.shapes[index]
    axis = 0 if len(shape) in (1, 3) else 1
    rest = shape[:axis] + shape[axis + 1 :]
    others = [
        number
        for number, other in enumerate(program.shapes)
        if len(other) == len(shape) and other[:axis] + other[axis + 1 :] == rest
    ]
    other = rng.choice(others)
    joined = list(shape)
    joined[axis] += program.shapes[other][axis]
    if joined[axis] <= 96:
        program.add(tuple(joined), lambda self, x, y: torch.cat([x, y], axis + 1), index, other)


_PICTURES = [_conv, _conv, _conv, _transposed, _conv_twice, _functional_conv, _picture_norm]
_PICTURES += [_pool, _flatten, _chunk, _to_sequence]
_SEQUENCES = [_linear, _linear, _normed, _matmul, _recurrent, _recurrent, _attention]
_SEQUENCES += [_layer_norm, _last]
_VECTORS = [_linear, _linear, _linear, _matmul, _normed, _tied, _layer_norm]
_ANY = [_activation, _activation, _dropout, _scale, _in_place, _sum, _cat, _nested]
