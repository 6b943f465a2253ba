"""The plan that a reduced model or its ONNX file holds."""

from __future__ import annotations

import os

from torch import nn

from lean_fx.errors import ArgumentError, DataError, require
from lean_fx.planning.plans import PLAN, Plan


def attached_plan(model: nn.Module) -> Plan | None:
    """The plan that a model holds, or None if it was not reduced."""
    held = getattr(model, "meta", None)
    plan = held.get(PLAN) if isinstance(held, dict) else vars(model).get(PLAN)
    return plan if isinstance(plan, Plan) else None


def plan_of(reduced: nn.Module | str | os.PathLike[str]) -> Plan:
    """The plan by which a model was reduced.

    Args:
        reduced: what :func:`~lean_fx.leanify` or :meth:`Plan.apply` gave, or the path of its ONNX
            file that :func:`~lean_fx.export_onnx` wrote.

    Raises:
        ArgumentError: the model holds no plan.
        DataError: there is no such file, it is not an ONNX file, or it holds no plan.
        MissingDependencyError: onnx is not installed, and a file is to be read.
        PlanError: the plan is of an unknown version, or its reduction is not registered here.

    Example:
        >>> import lean_fx, pathlib, tempfile, torch
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "net.onnx"
        >>> net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> lean = lean_fx.leanify(net, torch.rand(2, 4), channels=4)
        >>> exported = lean_fx.export_onnx(lean, path, torch.rand(2, 4))
        >>> lean_fx.plan_of(path) == lean_fx.plan_of(lean)
        True
    """
    if isinstance(reduced, nn.Module):
        plan = attached_plan(reduced)
        if plan is None:
            raise ArgumentError(
                f"plan_of: {type(reduced).__name__} object holds no plan; give what leanify gave, "
                "not a pickle of it"
            )
        return plan
    onnx = require("onnx", purpose="reading plans")
    try:
        model = onnx.load(os.fspath(reduced), load_external_data=False)
    except FileNotFoundError as error:
        raise DataError(
            f"{reduced}: there is no such file; give one that export_onnx wrote"
        ) from error
    except Exception as error:
        raise DataError(
            f"{reduced}: is not an ONNX file; give one that export_onnx wrote"
        ) from error
    for entry in model.metadata_props:
        if entry.key == PLAN:
            return Plan.from_json(entry.value)
    raise DataError(f"{reduced}: holds no plan; give the file of a reduced model")
