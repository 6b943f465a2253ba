"""Refuse the functions of torch whose effect a graph would lose, while a model is traced."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._functorch import utils
from torch.fx import Proxy
from torch.utils import checkpoint

from lean_fx.capture.questions import asked_by_model
from lean_fx.capture.side_effects import SideEffect
from lean_fx.graph.patching import Patch, patching

_QUESTIONS = (
    *("is_grad_enabled", "is_inference_mode_enabled", "is_inference"),
    *("is_autocast_enabled", "is_autocast_cpu_enabled", "is_autocast_cache_enabled"),
    *("get_autocast_dtype", "get_autocast_cpu_dtype", "get_autocast_gpu_dtype"),
)
_SEEDS = ("manual_seed", "seed", "set_rng_state", "get_rng_state", "fork_rng")
_MODES = (
    (torch.autocast, "autocast is turned on or off"),
    (torch.enable_grad, "gradients are turned on"),
    (torch.inference_mode, "inference mode is turned on"),
    (torch.autograd.graph.saved_tensors_hooks, "what backward keeps is changed"),
)
#: What starts gradient checkpointing, from torch 2.14 on and before.
_RECOMPUTE = "_checkpoint_without_reentrant_generator_impl"
if not hasattr(checkpoint, _RECOMPUTE):
    _RECOMPUTE = "_checkpoint_without_reentrant_generator"


#: The functions that a model's code must not call: what holds each, its name, and the effect.
_REFUSED = (
    *((torch, name, f"forward asks torch.{name}") for name in _QUESTIONS),
    *(
        (home, name, f"forward calls torch.{name}")
        for name in _SEEDS
        for home in (torch, torch.random)
        if hasattr(home, name)
    ),
    (torch, "set_grad_enabled", "forward calls torch.set_grad_enabled"),
    (torch.autograd, "grad", "forward computes gradients"),
    (torch.autograd, "backward", "forward computes gradients"),
)


@contextmanager
def refusing_functions(
    homes: Iterable[dict[str, Any]], computing: Callable[[], bool]
) -> Iterator[None]:
    """Refuse, on entry of the context, the functions of torch whose effect a graph would lose.

    - A torch.autograd.Function on a proxy: the graph would lose its gradient. (Every such function
      first unwraps its arguments with one function of torch, whatever name ``apply`` goes by.)
    - Gradient checkpointing: the graph would keep the values that checkpointing drops.
    - Questions about gradients, inference mode and autocast: the graph would freeze the answers.
    - Autocast, enable_grad, inference_mode and saved_tensors_hooks as contexts: the graph would
      leave them out.
    - Gradients of values (torch.autograd.grad): analyses run without them.
    - Seeds: the graph records the calls that draw numbers, but not those that set a seed.

    Args:
        homes: the globals of the model's code, which may import such functions by other names.
        computing: tells whether the tracer is computing a value rather than recording calls.

    Raises:
        SideEffect: a model's code calls one of them.
    """
    thread = threading.get_ident()

    def in_thread() -> bool:  # the patches are global, so another thread may get here
        return threading.get_ident() == thread

    def traces() -> bool:
        return in_thread() and not computing()

    def called_by_model() -> bool:
        return asked_by_model(2) and traces()

    lost = "gradient checkpointing would be lost"
    recompute = _refusing(getattr(checkpoint, _RECOMPUTE), lost, in_thread)
    patches: list[Patch] = [
        (utils, "unwrap_dead_wrappers", _refusing_proxies(utils.unwrap_dead_wrappers)),
        (checkpoint, _RECOMPUTE, recompute),
        *(
            (kind, "__enter__", _refusing(kind.__enter__, f"{effect} in forward", traces))
            for kind, effect in _MODES
        ),
    ]
    replaced: dict[int, Any] = {}
    for home, name, effect in _REFUSED:
        function = getattr(home, name)
        replaced[id(function)] = _refusing(function, effect, called_by_model)
        patches.append((home, name, replaced[id(function)]))
    for names in homes:
        patches += [
            (names, name, replaced[id(each)])
            for name, each in list(names.items())
            if id(each) in replaced
        ]
    with patching(patches):
        yield


def _refusing(
    function: Callable[..., Any], effect: str, refuses: Callable[[], bool]
) -> Callable[..., Any]:
    """A function as it is given, except that it raises while ``refuses`` is true."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if refuses():
            raise SideEffect(effect)
        return function(*args, **kwargs)

    return called


def _refusing_proxies(unwrap: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(args: tuple[Any, ...]) -> Any:
        if any(issubclass(type(each), Proxy) for each in args):
            raise SideEffect("a torch.autograd.Function has a gradient of its own")
        return unwrap(args)

    return refuse
