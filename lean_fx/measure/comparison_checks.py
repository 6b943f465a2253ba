"""Checks of what :func:`~lean_fx.compare` is given, before anything is measured."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lean_fx.checks import check_int, check_ints, check_not_negative, check_threads
from lean_fx.errors import ArgumentError, one_line
from lean_fx.measure.eager import training_step
from lean_fx.model_checks import check_shapes, check_values


def check_models(models: Mapping[str, nn.Module]) -> None:
    """Check that the models are modules with shapes and values, each under a printable name.

    Raises:
        ArgumentError: they are not.
    """
    if not isinstance(models, Mapping) or not models:
        raise ArgumentError("compare: models is not a mapping, or is empty; give names and models")
    for name, model in models.items():
        if not isinstance(name, str) or not name.isprintable() or not name:
            raise ArgumentError(f"compare: the name {name!r} is not printable text; give another")
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"compare: {name!r} is a {type(model).__name__}; give a module")
        check_shapes(model, f"compare: {name!r}")
        check_values(model, f"compare: {name!r}")


def check_inputs(inputs: tuple[Any, ...]) -> None:
    """Check that the example inputs are tensors with values, of one batch.

    Raises:
        ArgumentError: they are not.
    """
    sizes = {value.shape[0] for value in inputs if isinstance(value, Tensor) and value.dim()}
    if not sizes or not all(isinstance(value, Tensor) for value in inputs):
        raise ArgumentError(
            "compare: example_inputs are not tensors with a batch axis; give tensors"
        )
    if any(value.is_meta for value in inputs):
        raise ArgumentError(
            "compare: example_inputs are on the meta device and have no values; give real tensors"
        )
    if 0 in sizes:
        raise ArgumentError("compare: example_inputs have no rows; give one or more")
    if len(sizes) > 1:
        shown = ", ".join(str(value.shape[0]) for value in inputs if value.dim())
        raise ArgumentError(
            f"compare: example_inputs: batches of {shown} differ; give one batch, the first axis "
            "of all inputs (hidden states have it second: let the model make its own)"
        )


def check_numbers(
    batches: Any, threads: Any, rounds: Any, energy_s: Any
) -> tuple[tuple[int, ...], int, int]:
    """Check that the numbers are in their ranges.

    Returns:
        The batches, the threads and the rounds, as ints of Python.

    Raises:
        ArgumentError: one is not.
    """
    checked = (
        check_ints("compare: batches", batches, 1),
        check_threads("compare", threads),
        check_int("compare: rounds", rounds, 2),
    )
    check_not_negative("compare: energy_s", energy_s)
    return checked


def check_outputs(arms: Mapping[str, nn.Module], inputs: tuple[Tensor, ...]) -> None:
    """Check that all models take the inputs, and return tensors of the same structure and shapes.

    Raises:
        ArgumentError: one does not.
    """
    forms = {}
    for name, arm in arms.items():
        try:
            with torch.no_grad():
                output = copy.deepcopy(arm)(*(value.clone() for value in inputs))
        except Exception as error:
            raise ArgumentError(
                f"compare: {name!r} fails on the example inputs ({one_line(error)}); "
                "give inputs that all models take"
            ) from error
        if not any(isinstance(value, Tensor) for value in pytree.tree_leaves(output)):
            raise ArgumentError(
                f"compare: {name!r} returns a {type(output).__name__}, in which no tensors can be "
                "found; return tensors, or a tuple, list or dict of them"
            )
        forms[name] = pytree.tree_map(lambda x: list(getattr(x, "shape", ())), output)
    first, *others = forms
    for name in others:
        if forms[name] != forms[first]:
            raise ArgumentError(
                f"compare: {name!r} returns {forms[name]} and {first!r} returns {forms[first]}; "
                "compare models whose outputs have the same form"
            )


def check_steps(arms: Mapping[str, nn.Module], inputs: tuple[Tensor, ...]) -> None:
    """Check that all models can do a training step on the inputs.

    Raises:
        ArgumentError: one cannot.
    """
    for name, arm in arms.items():
        try:
            training_step(copy.deepcopy(arm).train(), inputs)()
        except Exception as error:
            raise ArgumentError(
                f"compare: {name!r} cannot do a training step on the example inputs "
                f"({one_line(error)}); give a model whose outputs have gradients, "
                "and a batch of 2 or more"
            ) from error
