"""Small models that the tests share, one for each thing that a graph can hold."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import lean_fx


def graph_text(graph_module: GraphModule) -> str:
    """A graph as text: one line a node, with what is called and on what."""
    lines = []
    for node in graph_module.graph.nodes:
        arguments = [*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())]
        called = f"{_target(node)}({', '.join(arguments)})"
        module = graph_module.get_submodule(node.target) if node.op == "call_module" else None
        lines.append(f"{node.name} = {called}" + (f"  # {module}" if module else ""))
    return "\n".join(lines) + "\n"


def _target(node: Node) -> str:
    return node.target if isinstance(node.target, str) else node.target.__name__


def reasons(model: nn.Module, inputs: Any = None, **options: Any) -> dict[str, str]:
    """Why layers are left alone, by name."""
    return {e.layer: e.reason.text for e in lean_fx.plan(model, inputs, **options).left_alone}


def sites(model: nn.Module, inputs: Any = None, **options: Any) -> list[tuple[Any, ...]]:
    """Where reductions would be: the value, its axis and channels, and the layers that read it."""
    found = lean_fx.plan(model, inputs, **options).sites
    return [(s.value, s.dim, s.in_channels, s.layers) for s in found]


class Net(nn.Module):
    """Layers by name, and a forward given as a function."""

    def __init__(self, function: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Residual(nn.Module):
    """One value that two convs and a sum read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.left = nn.Conv2d(32, 32, 3, padding=1)
        self.right = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = x + self.left(x) * torch.sigmoid(self.right(x))
        return self.head(y.mean((2, 3)))


class Flattened(nn.Module):
    """A linear layer behind pooling, flatten and dropout, in the given spelling of flatten."""

    def __init__(self, spelling: str = "flatten") -> None:
        super().__init__()
        self.spelling = spelling
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.5)
        self.flat = nn.Flatten()
        self.head = nn.Linear(16 * 9, 5)

    def flatten(self, x: Tensor) -> Tensor:
        match self.spelling:
            case "flatten":
                return torch.flatten(x, 1)
            case "method":
                return x.flatten(start_dim=1)
            case "module":
                return self.flat(x)
            case "view":
                return x.view(x.size(0), -1)
            case "view with features":
                return x.view(-1, 144)
            case "view with both":
                return x.view(x.shape[0], 144)
            case "reshape":
                return torch.reshape(x, (x.size(0), -1))
            case "view of sizes":
                return x.view(x.size(0), x.size(1) * x.size(2) * x.size(3))
        raise AssertionError(self.spelling)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.flatten(self.pool(F.relu(self.conv(x))))))


SPELLINGS = (
    *("flatten", "method", "module", "view", "view with features", "view with both"),
    *("reshape", "view of sizes"),
)


class SharedFlatten(nn.Module):
    """The flattened value is read by a linear layer and by the output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.head = nn.Linear(16 * 36, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = torch.flatten(F.relu(self.conv(x)), 1)
        return self.head(flat), flat


class InPlace(nn.Module):
    """Two convs read one value, which an in-place ReLU has changed before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.relu = nn.ReLU(inplace=True)
        self.left = nn.Conv2d(16, 4, 1)
        self.right = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.relu(x)
        return self.left(x) + self.right(y)


class Tokens(nn.Module):
    """Channels last: patches become tokens, which linear layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, stride=4)
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.head = nn.Linear(32 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x.flatten(1))


class FunctionalDropout(nn.Module):
    """Dropout as a function, following the mode, and once always on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 32)
        self.outer = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.inner(x)), p=0.25, training=self.training)
        return self.outer(F.dropout(x, 1e-9, training=True))


class Tied(nn.Module):
    """Two layers with one weight, a layer with a hook, and one with a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.one = nn.Linear(32, 32, bias=False)
        self.other = nn.Linear(32, 32, bias=False)
        self.other.weight = self.one.weight
        self.hooked = nn.Linear(32, 32)
        self.hooked.register_forward_hook(lambda module, args, output: output)
        self.turning = nn.utils.parametrizations.orthogonal(nn.Linear(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.turning(self.hooked(self.other(self.one(self.first(x)))))


class Stacked(nn.Module):
    """Recurrent layers of every kind, with and without given states, read in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.gru = nn.GRU(6, 16, 3, batch_first=True, bidirectional=True, dropout=0.2)
        self.lstm = nn.LSTM(32, 24, 2, batch_first=True, proj_size=16)
        self.rnn = nn.RNN(16, 16, 2, batch_first=True, nonlinearity="relu")
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x, states = self.gru(self.first(x))
        x, (h, c) = self.lstm(
            x, (states[:2, :, :16], torch.cat([states[2:4], states[:2]], -1)[..., :24])
        )
        pair = self.rnn(x, h)
        return self.head(pair[0]), pair[1], c


class Grouped(nn.Module):
    """One value that a conv and two grouped convs read, and a transposed grouped conv."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.plain = nn.Conv2d(64, 48, 1)
        self.left = nn.Conv2d(64, 48, 3, padding=1, groups=4)
        self.right = nn.Conv2d(64, 48, 1, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(48, 4, 2, stride=2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.up(F.relu(self.plain(x) + self.left(x) + self.right(x)))


class Attention(nn.Module):
    """Attention to itself and to another value, the weights read once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 32)
        self.norm = nn.LayerNorm(32)
        self.inner = nn.MultiheadAttention(32, 4, batch_first=True)
        self.outer = nn.MultiheadAttention(32, 2, batch_first=True, kdim=6, vdim=32, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.stem(x))
        y = y + self.inner(y, y, value=y, need_weights=False)[0]
        out, weights = self.outer(y, x, y)
        return out, weights


class Transformed(nn.Module):
    """torch's own Transformer, its decoder reading what its encoder gives."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 32)
        self.transformer = nn.Transformer(32, 4, 1, 1, 64, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.transformer(x, x[:, 1:])


class WrittenOut(nn.Module):
    """Layers whose forward is written out at their parameters, one with a bias from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 32, 1)
        self.conv = nn.Conv1d(32, 32, 3, padding=1, bias=False)
        self.qkv = nn.Linear(32, 48, bias=False)
        self.q_bias = nn.Parameter(torch.randn(16))
        self.register_buffer("k_bias", torch.zeros(32))
        self.proj = nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv1d(F.relu(self.stem(x)), self.conv.weight, self.k_bias, 1, 1)
        x = F.linear(x.mT, self.qkv.weight, bias=torch.cat((self.q_bias, self.k_bias)))
        return F.linear(F.relu(x), weight=self.proj.weight, bias=self.proj.bias)


class Weights(nn.Module):
    """Parameters of its own that multiply, in every spelling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.inner = nn.Module()
        self.inner.kernel = nn.Parameter(0.1 * torch.randn(16, 8, 3, 3))
        self.inner.shift = nn.Parameter(0.1 * torch.randn(16))
        self.product = nn.Parameter(0.1 * torch.randn(16, 32))
        self.transposed = nn.Parameter(0.1 * torch.randn(16, 32))
        self.added = nn.Parameter(0.1 * torch.randn(16, 24))
        self.linear = nn.Parameter(0.1 * torch.randn(5, 24))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner
        x = F.conv2d(F.relu(self.stem(x)), inner.kernel, inner.shift, padding=1, groups=2)
        x = F.relu(x).mean((2, 3))
        x = F.relu(x @ self.product)
        x = torch.matmul(x, self.transposed.transpose(-1, -2))
        x = torch.addmm(inner.shift[:1], x, self.added)
        return F.linear(x, self.linear)


class Again(nn.Module):
    """One layer called three times, on values of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 1)
        self.again = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.again(F.relu(self.first(x))))
        return self.again(self.again(x).abs())


class MyConv(nn.Conv2d):
    """A subclass that means more: it weighs each position by all of its channels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.var(1, keepdim=True)


class SameConv(nn.Conv2d):
    """A subclass that pads its input by its size, as some nets of TensorFlow do."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = (-n % s for n, s in zip(x.shape[2:], self.stride, strict=True))
        return super().forward(F.pad(x, (0, width, 0, height)))


class StandardConv(nn.Conv2d):
    """A subclass that standardises its weight, with a gain to learn."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size)
        self.scale = self.weight[0].numel() ** -0.5
        self.gain = nn.Parameter(torch.ones(out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight * self.gain * self.scale, self.bias)


class Kinds(nn.Module):
    """Layers of subclasses that keep the meaning of theirs, and with a norm of their weight."""

    def __init__(self) -> None:
        super().__init__()
        norms = nn.utils.parametrizations
        self.stem = nn.Conv2d(3, 32, 1)
        self.same = SameConv(32, 32, 3, stride=2, groups=2)
        self.standard = StandardConv(32, 32, 1)
        self.normed = norms.weight_norm(nn.Conv2d(32, 32, 1))
        self.head = norms.spectral_norm(nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.normed(F.relu(self.standard(F.relu(self.same(F.relu(self.stem(x)))))))
        return self.head(F.relu(x).mean((2, 3)))


def one_dimensional() -> nn.Module:
    return nn.Sequential(nn.Conv1d(1, 16, 3), nn.ReLU(), nn.Conv1d(16, 8, 3, stride=2))


def three_dimensional() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 16, 3), nn.ReLU(), nn.Conv3d(16, 8, (1, 2, 3)))


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1, output_padding=1, bias=False),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 3, 3),
    )


def fully_connected() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)
    )


#: Models that leanify changes, each with a batch of inputs.
CHANGED = {
    "residual": (Residual, (2, 3, 8, 8)),
    **{spelling: (lambda s=spelling: Flattened(s), (2, 1, 6, 6)) for spelling in SPELLINGS},
    "shared flatten": (SharedFlatten, (2, 1, 6, 6)),
    "in place": (InPlace, (2, 3, 5, 5)),
    "tokens": (Tokens, (2, 3, 8, 8)),
    "functional dropout": (FunctionalDropout, (3, 8)),
    "conv1d": (one_dimensional, (2, 1, 16)),
    "conv3d": (three_dimensional, (2, 1, 6, 6, 6)),
    "conv_transpose": (transposed, (2, 3, 8, 8)),
    "kinds": (Kinds, (2, 3, 7, 7)),
    "attention": (Attention, (2, 5, 6)),
    "transformer": (Transformed, (2, 5, 6)),
    "written out": (WrittenOut, (2, 3, 8)),
    "weights": (Weights, (2, 3, 8, 8)),
    "grouped": (Grouped, (2, 3, 8, 8)),
    "again": (Again, (2, 3, 5, 5)),
    "stacked": (Stacked, (3, 5, 6)),
    "linear": (fully_connected, (2, 20)),
}

#: Models in which there is nothing to reduce.
UNCHANGED = {
    "tied": (Tied, (2, 8)),
    "narrow": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)), (2, 3, 8, 8)),
    "subclass": (lambda: nn.Sequential(nn.Conv2d(3, 16, 1), MyConv(16, 4, 1)), (2, 3, 8, 8)),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=16)),
        (2, 3, 8, 8),
    ),
    "inputs": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), (2, 1, 8, 8)),
}


def both_forms(plan, model, inputs):
    """What a plan makes in the form of a module and of a graph, with the same weights."""
    made = []
    for form in ("module", "graph"):
        torch.manual_seed(0)
        made.append(dataclasses.replace(plan, form=form).apply(model, inputs).eval())
    return made
