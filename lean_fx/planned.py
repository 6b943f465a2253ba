"""A model's plan: capture, normalise, analyse, plan, select.

If torch.fx cannot trace a model, one observed run replaces the graph. The planner is the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn
from torch._ops import OpOverload
from torch.fx import GraphModule

from lean_fx.capture.capturing import capture, clone_graph, unfused_clone
from lean_fx.capture.example_inputs import as_inputs, check_inputs_have_values
from lean_fx.capture.guards import check_branch
from lean_fx.capture.size_guards import refusing_modules
from lean_fx.errors import ArgumentError, CaptureError, warn
from lean_fx.graph.calls import called_modules
from lean_fx.locks import rebuilding
from lean_fx.model_checks import first_without_values
from lean_fx.passes import (
    FindConsumers,
    InferSign,
    MeasureScale,
    Pass,
    Pipeline,
    PropagateShapes,
    TrackChannels,
    TrackWrites,
)
from lean_fx.planning.normalising import Rewritings
from lean_fx.planning.observed import layer_names, observed_records, without_failing
from lean_fx.planning.options import Options
from lean_fx.planning.planner import check_named_layers, choose_sites, named_sites
from lean_fx.planning.plans import Form, Plan
from lean_fx.planning.records import graph_records, unread_records
from lean_fx.planning.uncalled import (
    has_weights_inside_leaves,
    layers_inside_leaves,
    part_names,
    uncalled_layers,
)
from lean_fx.selection import select_sites
from lean_fx.skip_reason import LeftAlone, SkipReason


def planned(
    model: nn.Module, example_inputs: Any, options: Options
) -> tuple[Plan, GraphModule | None]:
    """The plan, and the captured graph to apply it to.

    Args:
        model: the user's; it stays as it is.
        example_inputs: as the user gives them, or None.
        options: the user's. A model that a graph cannot replace keeps its class, whatever the form.

    Returns:
        The graph is None if the model cannot be traced at all.

    Raises:
        ArgumentError: as :func:`~lean_fx.plan`.
        CaptureError: as :func:`~lean_fx.plan`.
    """
    if options.form == "module" and example_inputs is None:
        raise ArgumentError(
            "form='module' needs example_inputs: one run on them shows which layers are called"
        )
    _check_not_exported(model)
    with rebuilding(runs=example_inputs is not None):
        inputs = as_inputs(example_inputs, model) if example_inputs is not None else ()
        if isinstance(model, nn.Module):  # else capture says what it is
            check_inputs_have_values(inputs, model)
        captured, error = _captured(model, inputs, options.form)
        if captured is None and options.keep != "all":
            text = f"keep={options.keep!r} needs a graph, keep='all' does not; {error}"
            raise ArgumentError(text) from error
        if captured is None:
            made = _plan_without_graph(model, inputs, options)
        else:
            form: Form = "module" if error else options.form
            known = dataclasses.replace(options, form=form, modules=dict(model.named_modules()))
            made = _plan_captured(model, captured, inputs, known)
        if error and options.form == "graph":
            warn(f"{error.reason}; each layer reduces its own input")
        elif captured is not None and options.form == "graph":
            _warn_of_sizes(model, captured, inputs)
    return made, captured


def _check_not_exported(model: nn.Module) -> None:
    """Check that a graph is not one of torch.export, in which no layers are left to rebuild."""
    if not isinstance(model, GraphModule):
        return
    for node in model.graph.nodes:
        if isinstance(node.target, OpOverload) and node.target.namespace == "aten":
            raise ArgumentError(
                f"model={type(model).__name__} object calls operators ({node.target}), as graphs "
                "of torch.export do, and no layers; give the model that was exported"
            )


def _captured(
    model: nn.Module, inputs: tuple[Any, ...], form: Form
) -> tuple[GraphModule | None, CaptureError | None]:
    """A graph that can replace the model, or one that only shows its facts, or None; why not more.

    Raises:
        CaptureError: the model cannot be traced, and there are no inputs to observe it on.
    """
    error = None
    for purpose in ("graph", "facts") if form == "graph" else ("facts",):
        try:
            return capture(model, inputs, purpose=purpose), error
        except CaptureError as failed:
            error = error or failed
            if not inputs:
                raise
    return None, error


def _warn_of_sizes(model: nn.Module, captured: GraphModule, inputs: tuple[Any, ...]) -> None:
    """Tell a user whose graph refuses sizes that the model takes."""
    if not inputs or all(node.target is not check_branch for node in captured.graph.nodes):
        return
    for reason in refusing_modules(model, captured, inputs).values():
        warn(f"{reason}; form='module' takes what the model takes")


def _plan_captured(
    model: nn.Module,
    captured: GraphModule,
    inputs: tuple[Any, ...],
    options: Options,
) -> Plan:
    """Normalise, analyse, plan, select; the captured graph stays as it is."""
    rewritings = Rewritings.of(captured, options)
    failing: dict[str, SkipReason] = {}
    if options.form == "module":
        from lean_fx.planning.module_form import failing_splits, in_module_form  # when it is used

        failing = failing_splits(rewritings.split_layers, model, inputs)
        rewritings = rewritings.without(Rewritings(tuple(failing)))
    normalised = clone_graph(captured)
    rewritings.apply(normalised)
    _analyse(normalised, inputs)
    made = _plan_graph(model, normalised, rewritings, options)
    if inputs and options.keep == "all":
        made = _with_layers_inside_leaves(made, captured, inputs, options)
    if options.form == "module":
        made = in_module_form(made, model, inputs)
    return _with_whole_layers(made, failing, model)


def _analyse(graph_module: GraphModule, inputs: tuple[Any, ...]) -> None:
    """Write the facts that the planner reads."""
    passes: list[Pass] = [TrackChannels(), TrackWrites(), InferSign(), FindConsumers()]
    if inputs:
        passes = [PropagateShapes(inputs), MeasureScale(inputs), *passes]
    Pipeline(passes)(graph_module)


def _plan_graph(
    model: nn.Module,
    normalised: GraphModule,
    rewritings: Rewritings,
    options: Options,
) -> Plan:
    """Plan and select on the normalised graph; drop the rewritings that no site uses."""
    called = called_modules(normalised.graph) | set(rewritings.split_layers)
    uncalled = uncalled_layers(model, normalised, called)
    records = graph_records(normalised, options) + unread_records(uncalled)
    names = [each.layer for each in records]
    check_named_layers(options, [*names, *rewritings.names, *part_names(normalised)])
    chosen, left = choose_sites(records, options)
    if options.form == "module":
        chosen, hidden = rewritings.without_weights(chosen)
        left += hidden
    sites, dropped = select_sites(
        chosen, options.reduction, normalised, options.keep, options.kernel
    )
    used = rewritings.used_by(sites)
    unused = rewritings.without(used)
    sites, left = unused.undo(normalised, sites, [*left, *dropped], options)
    return Plan(
        model=type(model).__name__,
        sites=named_sites(sites),
        left_alone=tuple(dict.fromkeys(left)),
        reduction=options.reduction,
        parameters=_count(model),
        split_layers=used.split_layers,
        weights=used.weights,
    )


def _plan_without_graph(model: nn.Module, inputs: tuple[Any, ...], options: Options) -> Plan:
    whole = unfused_clone(model)
    check_named_layers(options, [*layer_names(whole), *part_names(whole)])
    return _plan_from_runs(model, inputs, options)


def _plan_from_runs(
    model: nn.Module,
    inputs: tuple[Any, ...],
    options: Options,
    only: Callable[[nn.Module], Collection[str] | None] = lambda _: None,
) -> Plan:
    """Plan from observed runs; stacks and attention are split if a site is inside.

    Args:
        model: it stays as it is.
        inputs: example inputs.
        options: the user's.
        only: gives the names of the layers to plan, of the model and of copies with split layers;
            None plans all.
    """
    from lean_fx.planning.module_form import failing_splits, split_clone  # when it is used

    def observed(splits: Rewritings) -> Plan:
        runnable = split_clone(model, splits, inputs)
        return _plan_observed(model, runnable, inputs, options, only(runnable))

    whole = unfused_clone(model)
    found = Rewritings.of_module(whole, options, only(whole))
    failing = failing_splits(found.split_layers, model, inputs)
    found = found.without(Rewritings(tuple(failing)))
    made = observed(found)
    used = found.used_by(made.sites)
    made = observed(used) if used != found else made
    made = dataclasses.replace(made, split_layers=used.split_layers)
    return _with_whole_layers(without_failing(made, whole, inputs), failing, whole)


def _with_whole_layers(made: Plan, whole: Mapping[str, SkipReason], model: nn.Module) -> Plan:
    """The plan with the reasons for stacks and attention that stay whole, where it could split."""
    left = [
        dataclasses.replace(each, reason=whole.get(each.layer, each.reason))
        for each in made.left_alone
    ]
    for name, reason in whole.items():
        stack = model.get_submodule(name)
        later = range(1, int(getattr(stack, "num_layers", 1)))
        left += [LeftAlone(f"{name}.{index}", type(stack).__name__, reason) for index in later]
    return dataclasses.replace(made, left_alone=tuple(left))


def _plan_observed(
    model: nn.Module,
    runnable: nn.Module,
    inputs: tuple[Any, ...],
    options: Options,
    only: Collection[str] | None,
) -> Plan:
    """Plan from one observed run: each layer reduces its own input."""
    records = observed_records(runnable, inputs, options, only)
    sites, left = choose_sites(records, options)
    return Plan(
        model=type(model).__name__,
        sites=named_sites(sites),
        left_alone=tuple(left),
        reduction=options.reduction,
        parameters=_count(model),
        traced=False,
        form="module",
    )


def _with_layers_inside_leaves(
    made: Plan, captured: GraphModule, inputs: tuple[Any, ...], options: Options
) -> Plan:
    """Add what is inside modules that are not traced: layers there reduce their own input."""
    inside = layers_inside_leaves(captured)
    if first_without_values(captured) or not (inside or has_weights_inside_leaves(captured)):
        return made  # planning them needs a run with real values
    within = _plan_from_runs(captured, inputs, options, layers_inside_leaves)
    seen = [each for each in made.left_alone if each.layer not in inside]
    return dataclasses.replace(
        made,
        sites=(*made.sites, *within.sites),
        left_alone=(*seen, *within.left_alone),
        split_layers=(*made.split_layers, *within.split_layers),
    )


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
