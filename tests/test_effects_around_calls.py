"""What a forward does around its calls: gradients, autocast, seeds. A graph records calls alone."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import get_autocast_dtype, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

import lean_fx
from lean_fx.capture.capturing import capture
from lean_fx.capture.refusals import refusing_functions
from lean_fx.capture.side_effects import SideEffect
from lean_fx.errors import CaptureError

X = torch.rand(2, 32)


class Net(nn.Module):
    """Two layers, and what a function makes of the first one's values."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(32, 32), nn.Linear(32, 4), between
        self.stem = nn.Linear(32, 32).requires_grad_(False)

    def forward(self, x):
        return self.b(torch.relu(self.between(self, x)))


def captured(between):
    model = Net(between)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lean_fx.LeanWarning)
        return model, lean_fx.leanify(model, X, min_channels=10**9)


def fp32_head(self, x):
    with torch.autocast("cpu", enabled=False):
        return self.a(x.float())


def with_gradient(self, x):
    with torch.enable_grad():
        return self.a(x)


def set_gradient(self, x):
    with torch.set_grad_enabled(True):
        return self.a(x)


def normalised(self, x):
    with torch.no_grad():
        x = (x - x.mean()) / x.std()
    return self.a(x)


def frozen_stem(self, x):
    with torch.no_grad():
        x = self.stem(x)
    return self.a(x)


def kept_on_the_cpu(self, x):
    with torch.autograd.graph.save_on_cpu():
        return self.a(x)


def same_noise(self, x):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        noise = torch.randn_like(x)
    return self.a(x + noise)


def seeded(self, x):
    torch.manual_seed(0)
    return self.a(x + torch.randn_like(x))


def asks_by_its_own_name(self, x):
    return self.a(x) if is_grad_enabled() else -self.a(x)


def asks_for_a_dtype(self, x):
    return self.a(x).to(get_autocast_dtype("cpu")).float()


def asks_whether_it_learns(self, x):
    return self.a(x) if self.a.weight.requires_grad else self.a(x).detach()


def asks_whether_a_value_learns(self, x):
    h = self.a(x)
    return h if h.requires_grad else -h


AROUND = [fp32_head, with_gradient, set_gradient, normalised, frozen_stem, same_noise, seeded]
AROUND += [kept_on_the_cpu]
ASKING = [asks_by_its_own_name, asks_for_a_dtype, asks_whether_it_learns]
ASKING += [asks_whether_a_value_learns]


@pytest.mark.parametrize("between", AROUND + ASKING)
def test_it_is_kept(between):
    model, lean = captured(between)
    for context in (torch.enable_grad, torch.no_grad, lambda: torch.autocast("cpu")):
        results = []
        for each in (model, lean):
            x = X.clone().requires_grad_()
            torch.manual_seed(1)
            with context():
                y = each(x)
            if y.requires_grad:
                each.requires_grad_(True)
                with context():
                    each(x).sum().backward()
            learned = {name: p.grad is not None for name, p in each.named_parameters()}
            each.zero_grad()
            each.stem.requires_grad_(False)
            results.append((y, y.requires_grad, x.grad is not None, learned))
        (wanted, *facts), (found, *same) = results
        torch.testing.assert_close(found, wanted)
        assert same == facts


@pytest.mark.parametrize("between", AROUND + ASKING)
def test_it_is_refused_without_inputs(between):
    with pytest.raises(
        CaptureError, match=r"Net: torch.fx cannot trace its forward \(SideEffect: "
    ):
        capture(Net(between))


def test_other_threads_are_not_refused():
    def work():
        torch.manual_seed(0)
        with torch.autocast("cpu"), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            x = torch.ones(2, 2, requires_grad=True)
            checkpoint(torch.sin, x, use_reentrant=False).sum().backward()
        return is_grad_enabled(), torch.is_grad_enabled(), torch.get_autocast_dtype("cpu")

    with refusing_functions([globals()], lambda: False):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(work).result()[:2] == (True, True)
        with pytest.raises(SideEffect, match="forward calls torch.manual_seed"):
            work()


def test_names_of_the_models_code_are_put_back():
    function = is_grad_enabled
    capture(Net(lambda self, x: self.a(x)), (X,))
    assert is_grad_enabled is function is torch.is_grad_enabled
    assert "__enter__" in vars(torch.autocast)
