"""A reduced model in one file: its weights as tensors, its plan beside them, and no pickle.

Checkpoints of Lightning are read too, by torch's unpickler of plain values and tensors.
"""

from __future__ import annotations

import json
import os
import zipfile
from typing import Any

import torch
from torch import Tensor, nn

from lean_fx.checks import check_path
from lean_fx.errors import ArgumentError, DataError, WriteError, one_line, require
from lean_fx.export.stored_plan import plan_of
from lean_fx.files import replacing
from lean_fx.model_checks import first_without_values
from lean_fx.planning.plans import PLAN, Plan

#: The metadata's key for tensors with several names: it maps each further name to the first.
_TIED = "lean_fx.tied"


def save(lean: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a reduced model into a safetensors file, whole or not at all.

    The file holds the model's ``state_dict`` and its plan, but no code: :func:`load` needs the
    original model again.

    Args:
        lean: what :func:`~lean_fx.leanify` or :meth:`Plan.apply` gave.
        path: the file to make, usually named ``*.safetensors``; its folder must exist.

    Raises:
        ArgumentError: the model holds no plan, or its ``state_dict`` holds something that is not a
            dense tensor with data, or has a dtype that safetensors does not know.
        MissingDependencyError: safetensors is not installed.
        PlanError: the plan's reduction is a class without a registered name.
        WriteError: the file cannot be written.

    Example:
        >>> import lean_fx, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "net.safetensors"
        >>> net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> x = torch.rand(2, 4)
        >>> lean = lean_fx.leanify(net, x)
        >>> lean_fx.save(lean, path)
        >>> torch.equal(lean_fx.load(path, net, x)(x), lean(x))
        True

    Reference: https://github.com/huggingface/safetensors
    """
    check_path("save", path)
    if not isinstance(lean, nn.Module):
        raise ArgumentError(
            f"save: {type(lean).__name__} object is not a module; give a reduced one"
        )
    plan = plan_of(lean)
    safetensors = require("safetensors.torch", extra="save", purpose="saving reduced models")
    tensors, tied = _distinct(lean.state_dict(keep_vars=True))
    metadata = {PLAN: plan.to_json(), _TIED: json.dumps(tied)}
    with replacing(path) as part:
        try:
            safetensors.save_file(tensors, part, metadata)
        except KeyError as error:  # of its table of dtypes
            raise ArgumentError(
                f"save: safetensors has no dtype {error}; such a model can be saved by torch.save"
            ) from error
        except Exception as error:  # its own type, for a full disk too
            raise WriteError(f"{path}: cannot be written ({error})") from error


def load(path: str | os.PathLike[str], model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """Make the reduced model that a file of :func:`save` holds.

    A checkpoint of Lightning is such a file too, if the module that was trained put its plan in::

        def on_save_checkpoint(self, checkpoint):
            checkpoint["lean_fx.plan"] = lean_fx.plan_of(self.model).to_json()

    Args:
        path: the file.
        model: the model that was reduced, or another instance of it; it is copied. Its weights do
            not matter; its mode, device and dtype are those of the result, or the device is the
            CPU if it is on the meta device.
        example_inputs: what :func:`~lean_fx.leanify` was called with.

    Returns:
        The model as :meth:`Plan.apply` makes it, with the weights of the file.

    Raises:
        ArgumentError: as :meth:`Plan.apply`.
        CaptureError: as :meth:`Plan.apply`.
        DataError: there is no such file, :func:`save` did not write it, or its weights are not
            those of the reduced model, by name, shape and dtype.
        MissingDependencyError: safetensors is not installed.
        PlanError: the plan does not fit the model, is of an unknown version, or its reduction is
            not registered here.

    Example: see :func:`save`.
    """
    check_path("load", path)
    if "\0" in str(path):
        raise DataError(f"{str(path)!r}: is not a path; give a file that lean_fx.save wrote")
    plan, state = _read_checkpoint(path) if zipfile.is_zipfile(path) else _read(path)
    lean = plan.apply(model, example_inputs)
    state = _without_prefix(path, state, lean.state_dict())
    _check_fits(path, state, lean.state_dict())
    if first_without_values(lean):
        _assign(path, lean, state)
    else:
        lean.load_state_dict(state)
    return lean


def _assign(path: str | os.PathLike[str], lean: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a model on the meta device the tensors of a file; shared parameters stay shared."""
    made: dict[int, nn.Parameter] = {}
    for name, own in lean.state_dict(keep_vars=True).items():
        if isinstance(own, nn.Parameter):
            made.setdefault(id(own), nn.Parameter(state[name], own.requires_grad))
            state[name] = made[id(own)]
    lean.load_state_dict(state, assign=True)
    if left := first_without_values(lean):
        raise DataError(
            f"{path}: does not hold {left!r}, which is no part of the state_dict, and the model "
            "has it on the meta device; give a model with values"
        )


def _distinct(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to write by their first names, and the first name for every further one."""
    names: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            raise ArgumentError(
                f"save: {name!r} of the model's state_dict is not a dense tensor with data; such "
                "a model can be saved by torch.save"
            )
        first = names.setdefault(id(value), name)
        if first == name:
            # A copy: the file's tensors may share no memory.
            tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
        else:
            tied[name] = first
    return tensors, tied


def _read(path: str | os.PathLike[str]) -> tuple[Plan, dict[str, Tensor]]:
    safetensors = require("safetensors", extra="save", purpose="loading reduced models")
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: there is no such file; give one that lean_fx.save wrote"
        ) from error
    except Exception as error:  # its own type, or that of the file system
        raise DataError(
            f"{path}: is not a safetensors file ({error}); give one that lean_fx.save wrote"
        ) from error
    if PLAN not in metadata:
        raise DataError(f"{path}: holds no plan; give a file that lean_fx.save wrote")
    plan = Plan.from_json(metadata[PLAN])
    try:
        tied = json.loads(metadata.get(_TIED, "{}"))
        state |= {name: state[first] for name, first in tied.items()}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path}: its {_TIED} is damaged; give a file that lean_fx.save wrote"
        ) from error
    return plan, state


def _read_checkpoint(path: str | os.PathLike[str]) -> tuple[Plan, dict[str, Tensor]]:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        state = held["state_dict"]
        named = {str(name): each for name, each in state.items() if isinstance(each, Tensor)}
    except Exception as error:  # of the unpickler, or of what it has read
        reason = one_line(error, 200)
        raise DataError(
            f"{path}: is not a checkpoint of Lightning that holds only plain values and tensors "
            f"({reason}); give one, or a file that lean_fx.save wrote"
        ) from error
    if PLAN not in held:
        raise DataError(
            f"{path}: holds no plan; put plan_of(model).to_json() into the checkpoint's {PLAN!r} "
            "in on_save_checkpoint"
        )
    return Plan.from_json(held[PLAN]), named


def _without_prefix(
    path: str | os.PathLike[str], state: dict[str, Tensor], wanted: dict[str, Any]
) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names in the model, an attribute of what was trained."""
    first = next(iter(wanted), "")
    ends = [name.removesuffix(first) for name in state if name.endswith(f".{first}")]
    found: dict[str, dict[str, Tensor]] = {}
    for prefix in ("", *ends):
        ours = [name for name in state if name.startswith(prefix)]
        inside = {name.removeprefix(prefix): state[name] for name in ours}
        if inside.keys() == wanted.keys():
            found[prefix] = inside
    if len(found) > 1:
        names = " and ".join(prefix.removesuffix(".") for prefix in found)
        raise DataError(
            f"{path}: holds the model more than once, as {names}; write the one that you want by "
            "lean_fx.save"
        )
    return next(iter(found.values()), state)


def _check_fits(
    path: str | os.PathLike[str], state: dict[str, Tensor], wanted: dict[str, Any]
) -> None:
    """Check that a file's tensors are those of a model."""
    remedy = "give the model that was saved"
    for name in state:
        if name not in wanted:
            raise DataError(f"{path}: holds {name!r}, which the model has not; {remedy}")
    for name, own in wanted.items():
        if name not in state:
            raise DataError(f"{path}: holds no {name!r}, which the model has; {remedy}")
        held = state[name]
        if held.shape != own.shape:
            shapes = f"{tuple(held.shape)}, and {tuple(own.shape)} in the model"
            raise DataError(f"{path}: {name!r} has shape {shapes}; {remedy}")
        if held.dtype != own.dtype:
            dtypes = f"{held.dtype}, and {own.dtype} in the model"
            raise DataError(f"{path}: {name!r} is of {dtypes}; {remedy}, in that dtype")
