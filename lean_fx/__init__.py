"""lean_fx: LEAN reductions as a torch.fx pass.

Example:
    >>> import torch, lean_fx
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    >>> lean_fx.leanify(model)(torch.rand(5, 8)).shape
    torch.Size([5, 2])

The types of results, and of the parts of a plan, are in their own modules:

- :class:`lean_fx.passes.Site` and :class:`lean_fx.passes.Consumer`, the rows of a plan, and
  :class:`lean_fx.skip_reason.LeftAlone`, the layers that it leaves alone;
- :class:`lean_fx.export.exporting.Exported`, from ``export_onnx``;
- :class:`lean_fx.measure.costs_table.Costs`, from ``costs_of``;
- :class:`lean_fx.measure.comparison_table.Comparison`, from ``compare``.
"""

import importlib
from typing import TYPE_CHECKING

from lean_fx.errors import (
    ArgumentError,
    BranchError,
    CaptureError,
    DataError,
    ExportError,
    LeanError,
    LeanWarning,
    MissingDependencyError,
    PassError,
    PlanError,
    WriteError,
)
from lean_fx.layers.kinds import register_layer, unregister_layer
from lean_fx.planning.plans import Plan
from lean_fx.reduction.base import Reduction
from lean_fx.reduction.embedding import power_iteration_embedding
from lean_fx.reduction.functional import checking_signs, lean_reduction
from lean_fx.reduction.lean import LeanReduction
from lean_fx.reduction.registry import reductions, register_reduction
from lean_fx.transform import leanify, plan

# The exporter and what measures are loaded when they are first used.
if TYPE_CHECKING:
    from lean_fx.drawing import draw
    from lean_fx.export.exporting import export_onnx
    from lean_fx.export.stored_plan import plan_of
    from lean_fx.kernel import onnx_kernel
    from lean_fx.measure.comparison import compare
    from lean_fx.measure.costs import costs_of
    from lean_fx.measure.sensitivity import sensitivity
    from lean_fx.saving import load, save
else:
    _LOADED_WHEN_USED = {
        "compare": "lean_fx.measure.comparison",
        "costs_of": "lean_fx.measure.costs",
        "draw": "lean_fx.drawing",
        "export_onnx": "lean_fx.export.exporting",
        "load": "lean_fx.saving",
        "onnx_kernel": "lean_fx.kernel",
        "plan_of": "lean_fx.export.stored_plan",
        "save": "lean_fx.saving",
        "sensitivity": "lean_fx.measure.sensitivity",
    }

    def __getattr__(name):
        if name not in _LOADED_WHEN_USED:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_LOADED_WHEN_USED[name]), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *_LOADED_WHEN_USED})


__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BranchError",
    "CaptureError",
    "DataError",
    "ExportError",
    "LeanError",
    "LeanReduction",
    "LeanWarning",
    "MissingDependencyError",
    "PassError",
    "Plan",
    "PlanError",
    "Reduction",
    "WriteError",
    "checking_signs",
    "compare",
    "costs_of",
    "draw",
    "export_onnx",
    "lean_reduction",
    "leanify",
    "load",
    "onnx_kernel",
    "plan",
    "plan_of",
    "power_iteration_embedding",
    "reductions",
    "register_layer",
    "register_reduction",
    "save",
    "sensitivity",
    "unregister_layer",
]
