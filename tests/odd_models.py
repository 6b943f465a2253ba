"""Models that are not plain models, and all that a user can see of one."""

import warnings

import torch
import torch.ao.quantization as quantization
import torch.nn.functional as F
from torch import nn

import lean_fx
from lean_fx.cloning import memory_of

X = torch.rand(2, 4)
PICTURES = torch.rand(2, 3, 8, 8)


def mlp():
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 8))


def layers(model, inputs=None):
    return [name for site in lean_fx.plan(model, inputs).sites for name in site.layers]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(32, 64)
        self.lstm = nn.LSTM(64, 16, 2, batch_first=True)
        self.b = nn.Linear(16, 8)

    def forward(self, x):
        return self.b(self.lstm(F.relu(self.a(x)))[0])


class Net(nn.Module):
    def __init__(self, change=lambda self: None):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.norm, self.last = nn.BatchNorm1d(32), nn.BatchNorm1d(32)
        change(self)

    def forward(self, x):
        x = F.relu(self.norm(self.b(F.relu(self.a(x)))))
        extras = [each.extra for each in (self, self.a) if hasattr(each, "extra")]
        return self.last(self.c(x)) + sum(each.sum() for each in extras)


def nested():
    block = nn.Sequential(nn.ReLU(), nn.Linear(32, 32))
    return nn.Sequential(nn.Linear(4, 32), block, nn.ReLU(), nn.Linear(32, 8))


def on_meta(make):
    with torch.device("meta"):
        return make()


def dynamic():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.quantize_dynamic(mlp())


def prepared(train):
    parts = nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3)
    model = nn.Sequential(quantization.QuantStub(), *parts, quantization.DeQuantStub())
    model.train(train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if train:
            model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
            return quantization.prepare_qat(model)
        model.qconfig = quantization.get_default_qconfig("fbgemm")
        quantization.prepare(model, inplace=True)
        model(PICTURES)
    return model


def with_weight(weight, *, parameter=True):
    model = mlp()
    del model[2].weight
    if parameter:
        kept = isinstance(weight, nn.Parameter)
        floats = weight.is_floating_point()
        model[2].weight = weight if kept else nn.Parameter(weight, requires_grad=floats)
    else:
        model[2].register_buffer("weight", weight)
    return model


def flat(self):
    held = [
        (m, key, p) for m in self.modules() for key, p in m._parameters.items() if p is not None
    ]
    whole, start = torch.cat([p.detach().flatten() for *_, p in held]), 0
    for module, key, parameter in held:
        part = whole[start : start + parameter.numel()]
        module._parameters[key] = nn.Parameter(part.view_as(parameter))
        start += parameter.numel()


CHANGES = {
    "a view of a weight": (
        lambda self: self.a.register_buffer("extra", self.a.weight.detach()[:2]),
        [{"a.weight", "a.extra"}],
        ["b", "c"],
    ),
    "a view of a weight to reduce": (
        lambda self: self.register_buffer("extra", self.b.weight.detach()[:2]),
        [{"b.weight", "extra"}],
        ["c"],
    ),
    "a view of a statistic": (
        lambda self: self.register_buffer("extra", self.norm.running_mean.view(4, 8)),
        [{"norm.running_mean", "extra"}],
        ["b", "c"],
    ),
    "one buffer of two modules": (
        lambda self: setattr(self.last, "running_mean", self.norm.running_mean),
        [{"norm.running_mean", "last.running_mean"}],
        ["b", "c"],
    ),
    "an expanded buffer": (
        lambda self: self.register_buffer("extra", torch.ones(1).expand(8)),
        [],
        ["b", "c"],
    ),
    "tied weights": (
        lambda self: setattr(self.c, "weight", self.b.weight),
        [{"b.weight", "c.weight"}],
        [],
    ),
    "transposed weights": (
        lambda self: setattr(self.c, "weight", nn.Parameter(self.b.weight.detach().t())),
        [{"b.weight", "c.weight"}],
        [],
    ),
    "all in one tensor": (
        flat,
        [{f"{n}.{k}" for n in ("a", "norm", "last") for k in ("weight", "bias")}],
        ["b", "c"],
    ),
}


def form(model):
    """All that a user can see of a model, but the values."""
    seen = []
    for name, module in model.named_modules(remove_duplicate=False):
        seen.append((name, id(module), type(module), module.training, sorted(vars(module))))
        seen += [(key, [*value]) for key, value in vars(module).items() if key.endswith("hooks")]
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            lazy = nn.parameter.is_lazy(tensor)
            if tensor is None or lazy:
                seen.append((key, id(tensor)))
                continue
            grad = None if tensor.grad is None else id(tensor.grad)
            memory = memory_of(tensor)
            seen.append((key, id(tensor), tensor._version, tensor.requires_grad, grad, memory))
    return seen


def values(model):
    tensors = (*model.parameters(), *model.buffers())
    known = [x for x in tensors if not (nn.parameter.is_lazy(x) or x.is_meta)]
    return [x.detach().clone() for x in known]
