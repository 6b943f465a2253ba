"""leanify() and plan(): capture, analyses, plan, application."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import nn
from torch.fx import GraphModule

from lean_fx.capture.capturing import as_inputs, capture, copied_graph, plain_copy
from lean_fx.checks import check_choice, check_int, first_without_values
from lean_fx.errors import ArgumentError, CaptureError, LeanWarning
from lean_fx.passes import (
    FindConsumers,
    InferSign,
    MeasureScale,
    ModularizeWeights,
    Pass,
    Pipeline,
    PropagateShapes,
    SplitLayers,
    TrackChannels,
    TrackWrites,
)
from lean_fx.paying import Keep, keep_paying
from lean_fx.planning.deciding import make_plan, stacks_to_split, weights_to_make
from lean_fx.planning.layerwise import plan_layers
from lean_fx.planning.options import Options
from lean_fx.planning.plans import WITHIN, LeftAlone, Plan
from lean_fx.planning.policy import ChannelsPolicy, Skip, check_channels_policy, check_skip
from lean_fx.planning.unseen import hidden_layers
from lean_fx.reduction.registry import ReductionFactory, reduction_factory


def leanify(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    channels: ChannelsPolicy = "sqrt",
    align: int | None = None,
    reduction: str | ReductionFactory = "lean",
    min_channels: int = 16,
    skip: Skip = (),
    filter: Callable[[nn.Module, str], bool] | None = None,
    reduce_inputs: bool = False,
    keep: Keep = "all",
) -> nn.Module:
    """Insert LEAN reductions before the layers of a model, and shrink those.

    The result is to be trained from scratch: the layers behind a reduction have fewer input
    channels and new weights. ``model`` itself is not touched.

    Args:
        model: any module. One that torch.fx cannot trace needs example inputs: branches on sizes
            are followed by them; where more hinders it each of its layers reduces its own input,
            and a LeanWarning says so (:mod:`lean_fx.planning.layerwise`).
        example_inputs: a tensor, packed sequences, or a tuple of the positional inputs; optional.
            With them the shapes of all values are known and checked, and the rebuilt layers start
            at the scale of those that they replace.
        channels: how many channels C' to keep: an int of 1 or more, a float in ]0, 1[ (a part of
            C_in), ``"sqrt"`` (the divisor of C_in nearest to its root), ``"tenth"``, a function of
            the :class:`~lean_fx.passes.Site` that returns one of these, or a mapping of layer
            names or glob patterns to them. C' divides C_in; where the wanted number does not, the
            nearest divisor is taken and the plan says so.
        align: prefer C' that are multiples of this number, such as 8; 1 or more.
        reduction: a registered name (:func:`lean_fx.reductions`) or a module class with the
            arguments ``(in_channels, out_channels, dim)``.
        min_channels: leave layers alone that read fewer channels; 1 or more. As ``channels``, it
            speaks of one group of a grouped convolution.
        skip: names, glob patterns or types of layers to leave alone; the type of a module that
            holds layers, such as nn.TransformerEncoderLayer, stands for all that are inside.
        filter: called as ``filter(module, name)``; layers for which it is false are left alone.
        reduce_inputs: reduce the model's own inputs too, not only intermediate values.
        keep: which sites: ``"all"``; ``"saving"``, those that save multiply-adds and bytes (see
            :mod:`lean_fx.paying`); or ``"measured"``, those whose layers are faster with their
            reduction in ONNX Runtime, on one thread, which takes seconds a site. The last two need
            example inputs and a graph: layers inside of what is not traced are left alone.

    Returns:
        A torch.fx.GraphModule, or, if ``model`` cannot be traced, a module of its own class. The
        plan is in ``meta["lean_fx.plan"]``. If no layer can be reduced the result equals ``model``,
        and a LeanWarning says why.

    Raises:
        ArgumentError: an option is out of its range, the example inputs do not fit, or ``keep``
            needs a graph and the model cannot be traced.
        CaptureError: the model cannot be traced, and there are no example inputs.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 50, 3), nn.ReLU(), nn.Conv2d(50, 100, 3))
        >>> lean = leanify(model, torch.rand(2, 3, 16, 16), channels=10)
        >>> lean
        Sequential(
          (0): Conv2d(3, 50, kernel_size=(3, 3), stride=(1, 1))
          (1): ReLU()
          (2): Conv2d(10, 100, kernel_size=(3, 3), stride=(1, 1))
          (reductions): Module(
            (_1): LeanReduction(50, 10, dim=1, nonnegative)
          )
        )

    References:
        Huang, Shah, Evans, Yoo: Less-Energy-Usage Network with Batch Power Iteration, ICML 2023
        workshop on Neural Compression.
    """
    options = _options(channels, align, reduction, min_channels, skip, filter, reduce_inputs)
    with torch.inference_mode(False):  # the copies are to be trained
        made, captured = _planned(model, example_inputs, options, keep)
    if not made.sites:
        reasons = "; ".join(f"{each.layer}: {each.reason}" for each in made.left_alone[:3])
        more = f"; and {len(made.left_alone) - 3} more" if len(made.left_alone) > 3 else ""
        warnings.warn(
            f"leanify: {made.model} has no layer to reduce ({reasons or 'no layers'}{more}); "
            "print(lean_fx.plan(model)) tells why for each",
            LeanWarning,
            stacklevel=2,
        )
    return made.apply_to_graph(captured) if captured is not None else made.apply(model)


def plan(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    channels: ChannelsPolicy = "sqrt",
    align: int | None = None,
    reduction: str | ReductionFactory = "lean",
    min_channels: int = 16,
    skip: Skip = (),
    filter: Callable[[nn.Module, str], bool] | None = None,
    reduce_inputs: bool = False,
    keep: Keep = "all",
) -> Plan:
    """What :func:`leanify` would do with the same arguments, and why not more.

    Returns:
        The plan: ``print`` it, ``apply`` it, keep it as JSON.

    Raises:
        ArgumentError: an option is out of its range, or the example inputs do not fit.
        CaptureError: the model cannot be traced, and there are no example inputs.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> print(plan(model))
        Plan for Sequential: 1 reduction (lean) before 1 of 2 layers
        their weights: 640 -> 80, of 1,226 parameters in all
        value  sign  MACs  layer  type    channels  weights    note
        _1     >= 0  256   2      Linear  64 -> 8   640 -> 80
        left alone
        0  Linear  in_channels=8 is below min_channels=16
    """
    options = _options(channels, align, reduction, min_channels, skip, filter, reduce_inputs)
    with torch.inference_mode(False):
        return _planned(model, example_inputs, options, keep)[0]


def _planned(
    model: nn.Module, example_inputs: Any, options: Options, keep: Keep
) -> tuple[Plan, GraphModule | None]:
    """The plan, and the model captured, its stacks split as the plan says; None if it cannot be."""
    check_choice("keep", keep, get_args(Keep))
    inputs = as_inputs(example_inputs) if example_inputs is not None else ()
    passes: list[Pass] = [TrackChannels(), TrackWrites(), InferSign(), FindConsumers()]
    if inputs:
        passes = [PropagateShapes(inputs), MeasureScale(inputs), *passes]
    analyse = Pipeline(passes)
    try:
        captured = capture(model, inputs)
    except CaptureError as error:
        if not inputs:
            raise
        if keep != "all":
            raise ArgumentError(
                f"keep={keep!r} needs a graph, keep='all' does not; {error}"
            ) from error
        made = plan_layers(plain_copy(model), inputs, options)
        reason = str(error).partition("; ")[0]
        warnings.warn(f"{reason}; each layer reduces its own input", LeanWarning, stacklevel=3)
        return made, None
    options = dataclasses.replace(options, modules=dict(model.named_modules()))
    analyse(captured)
    stacks = stacks_to_split(captured, options)
    weights = weights_to_make(captured)
    whole: list[LeftAlone] = []
    while True:
        graph_module = captured
        if stacks or weights:
            graph_module = copied_graph(captured)
            Pipeline([ModularizeWeights(weights), SplitLayers(stacks), analyse])(graph_module)
        made = make_plan(graph_module, model, options, stacks, weights)
        made = keep_paying(made, graph_module, keep)
        reduced = {layer for site in made.sites for layer in site.layers}
        in_vain = {stack for stack in stacks if not reduced & _inner(stack, made)}
        in_vain |= set(weights) - reduced
        if not in_vain:
            made = dataclasses.replace(made, left_alone=(*made.left_alone, *whole))
            if inputs and keep == "all":
                made = _with_hidden(made, graph_module, inputs, options)
            return made, graph_module
        whole += [
            dataclasses.replace(each, reason=f"{WITHIN}{stack}: {each.reason}")
            for stack in stacks
            for each in made.left_alone
            if stack in in_vain and each.layer in _inner(stack, made)
        ]
        whole += [each for each in made.left_alone if each.layer in in_vain & set(weights)]
        stacks = tuple(stack for stack in stacks if stack not in in_vain)
        weights = tuple(weight for weight in weights if weight not in in_vain)


def _with_hidden(
    made: Plan, graph_module: GraphModule, inputs: tuple[Any, ...], options: Options
) -> Plan:
    """The plan with the layers inside of what cannot be traced; they reduce their own input."""
    hidden = hidden_layers(graph_module)
    if not hidden or first_without_values(graph_module):  # what they read is seen when they run
        return made
    within = plan_layers(graph_module, inputs, options, hidden)
    seen = [each for each in made.left_alone if each.layer not in hidden]
    return dataclasses.replace(
        made, sites=(*made.sites, *within.sites), left_alone=(*seen, *within.left_alone)
    )


def _inner(stack: str, made: Plan) -> set[str]:
    """The layers of a split stack that read another one of it."""
    names = {layer for site in made.sites for layer in site.layers}
    names |= {each.layer for each in made.left_alone}
    return {name for name in names if name.startswith(f"{stack}.") and name != f"{stack}.0"}


def _options(
    channels: ChannelsPolicy,
    align: int | None,
    reduction: str | ReductionFactory,
    min_channels: int,
    skip: Skip,
    filter: Callable[[nn.Module, str], bool] | None,
    reduce_inputs: bool,
) -> Options:
    check_channels_policy(channels)
    reduction_factory(reduction)
    align = None if align is None else check_int("align", align, 1)
    min_channels = check_int("min_channels", min_channels, 1)
    if not isinstance(reduce_inputs, bool):
        raise ArgumentError(f"reduce_inputs={reduce_inputs!r} is not True or False")
    if filter is not None and not callable(filter):
        raise ArgumentError(f"filter={filter!r} cannot be called; give filter(module, name)")
    if isinstance(channels, Mapping):
        channels = dict(channels)
    return Options(
        channels, align, reduction, min_channels, check_skip(skip), filter, reduce_inputs
    )
