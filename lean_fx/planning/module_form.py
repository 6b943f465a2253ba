"""Turn the plan of a graph into one for ``form="module"``, where each layer reduces its own input.

The sites come from the model's graph, which shows what layers share, what is flattened and what is
never negative. One run of the model on the example inputs then decides for each layer:

1. If the model calls it, it gets its reduction, shared with the other layers of its site.
2. If a forward applies its weight without calling it, it gets a reduction of its own there
   (:mod:`lean_fx.layers.input_hooks`), unless it reads through a flatten.
3. Otherwise it is left alone; so is a layer whose channels cannot be told from its input, and one
   whose reduction makes the model fail.

Stacks of recurrent layers and attention are replaced by modules that call their layers, unless the
model then computes something else: its code may do more with them than call them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from lean_fx.capture.agreement import disagreement
from lean_fx.capture.capturing import unfused_clone
from lean_fx.graph.sites import Consumer, Site
from lean_fx.model_checks import check_values
from lean_fx.passes.split_layers import split_modules
from lean_fx.planning.normalising import Rewritings
from lean_fx.planning.observed import NOT_CALLED, Seen, observe, without_failing
from lean_fx.planning.planner import named_sites
from lean_fx.planning.plans import Plan
from lean_fx.skip_reason import LeftAlone, SkipReason

_UNKNOWN = SkipReason(
    "unknown_channels",
    "form='module' does not see the channels of what is flattened before it; form='graph' does",
)


def failing_splits(
    names: tuple[str, ...], model: nn.Module, inputs: tuple[Any, ...]
) -> dict[str, SkipReason]:
    """The stacks and attention layers that cannot be split, since the model's outputs change.

    The model's code may check their class, or read their weights.

    Args:
        names: the stacks of recurrent layers and the attention layers to try.
        model: it stays as it is.
        inputs: example inputs.

    Raises:
        ArgumentError: the model has no values.
    """
    check_values(model)
    whole = unfused_clone(model).eval()

    def difference(split: tuple[str, ...]) -> str:
        copied = unfused_clone(model).eval()
        split_modules(copied, split, ())
        return disagreement(whole, copied, inputs)

    if not names or not difference(names):
        return {}
    reasons = {name: difference((name,)) for name in names}
    return {
        name: SkipReason("fails_reduced", f"the model is not the same with it split: {reason}")
        for name, reason in reasons.items()
        if reason
    }


def split_clone(model: nn.Module, rewritings: Rewritings, inputs: tuple[Any, ...]) -> nn.Module:
    """A copy of a model, which has no graph, with some layers split into modules.

    Args:
        model: it stays as it is.
        rewritings: the layers to split.
        inputs: example inputs; a run on them shows which attention has several values.
    """
    copied = unfused_clone(model)
    if rewritings.split_layers:
        several: set[str] = set()
        for name in rewritings.split_layers:
            layer = copied.get_submodule(name)
            if isinstance(layer, nn.MultiheadAttention):
                layer.register_forward_pre_hook(_note_several(name, several), with_kwargs=True)
        observe(copied, inputs)
        copied = unfused_clone(model)
        split_modules(copied, rewritings.split_layers, [f"{name}.q_proj" for name in several])
    return copied


def _note_several(name: str, several: set[str]) -> Any:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
        if not given["query"] is given["key"] is given["value"]:
            several.add(name)

    return hook


def in_module_form(made: Plan, model: nn.Module, inputs: tuple[Any, ...]) -> Plan:
    """The plan of a model's graph, as one for the model itself.

    Args:
        made: the plan; it turns no parameters into layers.
        model: it stays as it is.
        inputs: example inputs.

    Raises:
        ArgumentError: the model fails on the inputs or has no values.
    """
    runnable = unfused_clone(model)
    split = unfused_clone(model)
    split_modules(split, made.split_layers, made.named())
    seen, _ = observe(split, inputs)
    sites: list[Site] = []
    left = list(made.left_alone)
    for site in made.sites:
        together = []
        for consumer in site.consumers:
            reason = _why_not(site, consumer, seen[consumer.layer])
            if reason:
                left.append(LeftAlone(consumer.layer, consumer.kind, reason))
            elif site.value and not seen[consumer.layer].called:
                sites.append(_alone(site, consumer, seen[consumer.layer].applied_by))
            else:
                together.append(consumer)
        if together:
            sites.append(dataclasses.replace(site, consumers=tuple(together)))
    made = dataclasses.replace(made, sites=tuple(sites), left_alone=tuple(left), form="module")
    made = without_failing(made, runnable, inputs)
    return dataclasses.replace(made, sites=named_sites(made.sites))


def _why_not(site: Site, consumer: Consumer, seen: Seen) -> SkipReason | None:
    if not seen.calls:
        return NOT_CALLED
    through = consumer.features_per_channel > 1
    if through and (site.dim not in (1, -1) or not seen.called):
        return _UNKNOWN
    return None


def _alone(site: Site, consumer: Consumer, applied_by: str | None) -> Site:
    """The site of a layer whose weight another module applies; it shares no reduction."""
    consumer = dataclasses.replace(consumer, node="", path=(), applied_by=applied_by)
    return dataclasses.replace(site, value="", packed=False, consumers=(consumer,))
