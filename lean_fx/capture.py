"""From a module to a torch.fx graph, without touching the module."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.fx import GraphModule, Tracer

from lean_fx.errors import ArgumentError, CaptureError
from lean_fx.passes.modularize_calls import ModularizeCalls, TrainingFlag
from lean_fx.rebuild import REBUILDERS
from lean_fx.registry import is_reduction


class LeanTracer(Tracer):
    """torch.fx's tracer, to which subclasses of conv and linear layers are leaves too.

    A subclass that a user wrote would otherwise dissolve into functional calls; as a leaf it is
    seen, and left alone with a reason.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a call of ``m`` becomes one node."""
        leaf = isinstance(m, tuple(REBUILDERS)) or is_reduction(m)
        return leaf or super().is_leaf_module(m, module_qualified_name)


def capture(model: nn.Module) -> GraphModule:
    """Capture a model as a torch.fx graph.

    Args:
        model: a module that torch.fx can trace; it is copied first and stays as it is.

    Returns:
        A GraphModule with copies of the modules that forward calls, in the mode (train or eval)
        of each. Functional dropout that follows the mode has become a module.

    Raises:
        ArgumentError: ``model`` is not a module.
        CaptureError: it cannot be copied or traced.

    Example:
        >>> print(capture(nn.Sequential(nn.Linear(4, 2), nn.ReLU())).code.strip())
        def forward(self, input):
            input_1 = input
            _0 = getattr(self, "0")(input_1);  input_1 = None
            _1 = getattr(self, "1")(_0);  _0 = None
            return _1
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"model={type(model).__name__} object is not a torch.nn.Module; give the model itself"
        )
    try:
        root = copy.deepcopy(model)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__}: cannot be copied ({_reason(error)}); give a model that "
            "copy.deepcopy can copy"
        ) from error
    modes = {module: module.training for module in root.modules()}
    for module, training in modes.items():
        module.training = TrainingFlag(training)  # type: ignore[assignment]
    try:
        graph = LeanTracer().trace(root)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__}: torch.fx cannot trace its forward ({_reason(error)}); move "
            "the part that depends on values out of forward, or leanify its submodules one by one"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    captured = GraphModule(root, graph, type(model).__name__)
    ModularizeCalls()(captured)
    return captured


def _reason(error: Exception) -> str:
    text: Any = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}".removesuffix(".")
