"""leanify() and plan(): capture, normalise, analyse, plan, select, and apply.

All but the last is in :mod:`lean_fx.planned`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from lean_fx.capture.side_effects import keeping_rng_state
from lean_fx.errors import warn
from lean_fx.graph.model_code import package_of
from lean_fx.locks import SHARED_STATE
from lean_fx.planned import planned
from lean_fx.planning.options import Keep, Options
from lean_fx.planning.plans import Form, Plan
from lean_fx.planning.policy import ChannelsPolicy, Skip
from lean_fx.reduction.registry import ReductionFactory


def leanify(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    channels: ChannelsPolicy = "sqrt",
    round_to: int | None = None,
    reduction: str | ReductionFactory = "lean",
    min_channels: int = 16,
    skip: Skip = (),
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    reduce_inputs: bool = False,
    keep: Keep = "all",
    kernel: bool | None = None,
    form: Form = "graph",
) -> nn.Module:
    """Insert LEAN reductions before the layers of a model, and shrink these layers.

    Train the result from scratch: the layers behind a reduction have fewer input channels and new
    weights. ``model`` itself is not changed.

    Args:
        model: any module. If torch.fx cannot trace it, example inputs are needed. They decide its
            branches on sizes; if something else prevents a graph, each layer reduces its own
            input, and a LeanWarning says so (:mod:`lean_fx.planning.observed`).
        example_inputs: a tensor, packed sequences, a tuple of the positional inputs, or a mapping
            of their names; optional.
            They give the shapes of all values, and the scale at which the rebuilt layers start.
        channels: how many channels C' to keep: an int of 1 or more, a float in ]0, 1[ (a fraction
            of C_in), ``"sqrt"`` (the divisor of C_in nearest to its square root), ``"tenth"``, a
            function of the :class:`~lean_fx.passes.Site` that returns one of these, or a mapping
            of layer names or glob patterns to them. C' must divide C_in: if the wanted number does
            not, the nearest divisor is taken, and the plan says so.
        round_to: prefer C' that are multiples of this number, such as 8; 1 or more.
        reduction: a registered name (:func:`lean_fx.reductions`) or a module class with the
            arguments ``(in_channels, out_channels, dim)``.
        min_channels: leave alone the layers that read fewer channels; 1 or more. In a grouped
            convolution, ``channels`` and ``min_channels`` count the channels of one group.
        skip: names, glob patterns or types of layers to leave alone. The type of a module that
            holds layers, such as nn.TransformerEncoderLayer, stands for all layers inside.
        filter_fn: called as ``filter_fn(module, name)``; layers for which it returns False are
            left alone.
        reduce_inputs: also reduce the model's own inputs, not only intermediate values.
        keep: which sites to reduce: ``"all"``; ``"saving"``, the sites that save multiply-adds and
            bytes (:mod:`lean_fx.selection`); or ``"measured"``, the sites whose layers run faster
            with their reduction in ONNX Runtime, on one thread. Measuring takes seconds per site.
            The last two need example inputs and a graph, and leave alone the layers inside modules
            that cannot be traced.
        kernel: with ``"measured"``: whether ONNX Runtime computes the reductions by
            :func:`~lean_fx.onnx_kernel`, or by the function in the file. None: by the kernel where
            it is built.
        form: what to make: ``"graph"``, a GraphModule whose reductions are nodes; or ``"module"``,
            a copy of the model itself, with its class, methods, containers and hooks, in which
            each layer reduces its own input. The planner is the same, and so are the numbers in
            eval mode. Layers that read one tensor share its reduction; if the code gives each a
            copy, each computes its own. Signs are proved only of forward: try other methods
            within :func:`~lean_fx.checking_signs`. ``"module"`` needs example inputs, and leaves
            alone parameters outside layers.

    Returns:
        A torch.fx.GraphModule, or, with ``form="module"`` or if ``model`` cannot be traced, a
        module of its own class. The plan is in ``meta["lean_fx.plan"]``. If no layer can be
        reduced, the result equals ``model``, and a LeanWarning says why. With example inputs
        another says so if the result amplifies noise far more (:func:`~lean_fx.sensitivity`).

    Raises:
        ArgumentError: an option is out of range, the model rejects the example inputs, ``keep``
            needs a graph and the model cannot be traced, or ``form="module"`` has no inputs.
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
    options = Options(
        channels=channels,
        round_to=round_to,
        reduction=reduction,
        min_channels=min_channels,
        skip=skip,
        filter_fn=filter_fn,
        reduce_inputs=reduce_inputs,
        keep=keep,
        kernel=kernel,
        form=form,
    )
    made, captured = planned(model, example_inputs, options)
    if not made.sites:
        reasons = "; ".join(f"{each.layer}: {each.reason}" for each in made.left_alone[:3])
        more = f"; and {len(made.left_alone) - 3} more" if len(made.left_alone) > 3 else ""
        warn(
            f"leanify: {made.model} has no layer to reduce ({reasons or 'no layers'}{more}); "
            "lean_fx.plan_of(result) tells why for each"
        )
    methods = _own_methods(model) if captured is not None and made.form == "graph" else []
    if methods:
        shown = ", ".join(methods[:3]) + (", ..." if len(methods) > 3 else "")
        warn(
            f"leanify: the graph of {made.model} is without its methods ({shown}); form='module' "
            "keeps the class"
        )
    lean = _applied(made, model, captured)
    from lean_fx.measure.sensitivity import with_sensitivity  # loaded when it is used

    with_sensitivity(made, model, lean, example_inputs).attach_to(lean)
    return lean


def plan(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    channels: ChannelsPolicy = "sqrt",
    round_to: int | None = None,
    reduction: str | ReductionFactory = "lean",
    min_channels: int = 16,
    skip: Skip = (),
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    reduce_inputs: bool = False,
    keep: Keep = "all",
    kernel: bool | None = None,
    form: Form = "graph",
) -> Plan:
    """Decide what :func:`leanify` would reduce with the same arguments, and what it would not.

    Returns:
        The plan: print it, apply it, or store it as JSON.

    Raises:
        ArgumentError: an option is out of range, or the model rejects the example inputs.
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
    options = Options(
        channels=channels,
        round_to=round_to,
        reduction=reduction,
        min_channels=min_channels,
        skip=skip,
        filter_fn=filter_fn,
        reduce_inputs=reduce_inputs,
        keep=keep,
        kernel=kernel,
        form=form,
    )
    made, captured = planned(model, example_inputs, options)
    if not made.sites or example_inputs is None:  # nothing to measure
        return made
    from lean_fx.measure.sensitivity import with_sensitivity  # loaded when it is used

    with SHARED_STATE, keeping_rng_state():
        torch.default_generator.manual_seed(0)  # a plan is the same each time
        lean = _applied(made, model, captured)
    return with_sensitivity(made, model, lean, example_inputs)


def _applied(made: Plan, model: nn.Module, captured: GraphModule | None) -> nn.Module:
    """The result of a plan, made of the captured graph itself where it is a graph."""
    if captured is not None and made.form == "graph":
        return made.apply_to_graph(captured)
    return made.apply_to_copy(model, captured)


def _own_methods(model: nn.Module) -> list[str]:
    """The public methods that a model's classes add to torch's, except those that forward uses."""
    methods: dict[str, Any] = {}
    for kind in type(model).__mro__:
        if package_of(kind) != "torch":
            found = {name: each for name, each in vars(kind).items() if inspect.isfunction(each)}
            methods = found | methods
    used, more = set(), ["forward"]
    while more:
        name = more.pop()
        if name in methods and name not in used:
            used.add(name)
            more += inspect.unwrap(methods[name]).__code__.co_names
    hidden = methods.keys() - used - set(dir(nn.Module))
    return [name for name in methods if name in hidden and not name.startswith("_")]
