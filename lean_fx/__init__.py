"""lean_fx: LEAN reductions as a torch.fx pass.

Example:
    >>> import torch, lean_fx
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    >>> lean_fx.leanify(model)(torch.rand(5, 8)).shape
    torch.Size([5, 2])
"""

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
from lean_fx.export.exporting import Exported, export_onnx
from lean_fx.export.stored_plan import plan_of
from lean_fx.measure.comparison import compare
from lean_fx.measure.costs import costs_of
from lean_fx.passes import Consumer, Site
from lean_fx.planning.plans import LeftAlone, Plan
from lean_fx.reduction.base import Reduction
from lean_fx.reduction.compiling import compile_reductions
from lean_fx.reduction.embedding import power_iteration_embedding
from lean_fx.reduction.functional import checking_signs, lean_reduction
from lean_fx.reduction.lean import LeanReduction
from lean_fx.reduction.registry import reductions, register_reduction, unregister_reduction
from lean_fx.transform import leanify, plan

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BranchError",
    "CaptureError",
    "Consumer",
    "DataError",
    "ExportError",
    "Exported",
    "LeanError",
    "LeanReduction",
    "LeanWarning",
    "LeftAlone",
    "MissingDependencyError",
    "PassError",
    "Plan",
    "PlanError",
    "Reduction",
    "Site",
    "WriteError",
    "checking_signs",
    "compare",
    "compile_reductions",
    "costs_of",
    "export_onnx",
    "lean_reduction",
    "leanify",
    "plan",
    "plan_of",
    "power_iteration_embedding",
    "reductions",
    "register_reduction",
    "unregister_reduction",
]
