"""Make the planner's records from one observed run, for a model or a module without a graph.

The run shows what each layer reads, but not what else reads that value, nor its sign. So each layer
reduces its own input. A layer is left alone by the rules of
:class:`~lean_fx.passes.FindConsumers` about the layer itself, and if

1. the run neither calls it nor applies its weight as the layer would (as does a function that gets
   ``self.qkv.weight`` and calls F.linear), or it reads the model's input or a view of it;
2. it belongs to a module of torch.nn that reads its weights (attention that cannot be split);
3. the model fails once the layer reduces its input: its code does more with it than call it.

Parameters outside any layer that multiply values are listed as left alone
(:mod:`lean_fx.planning.product_uses`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from lean_fx.capture.example_inputs import call, copied_inputs, described_inputs
from lean_fx.capture.side_effects import keeping_rng_state
from lean_fx.cloning import clone
from lean_fx.errors import ArgumentError, one_line, one_line_with_type
from lean_fx.graph.context import owners_of
from lean_fx.graph.facts import ChannelRead
from lean_fx.graph.reachable import leaving_state
from lean_fx.graph.running import without_gradients
from lean_fx.graph.sites import Site
from lean_fx.layers.kinds import (
    base_type,
    groups_of,
    has_own_kind,
    input_channels,
    input_weights,
    kind_of,
    known_kind_of,
)
from lean_fx.model_checks import check_values
from lean_fx.passes.find_consumers import NO_PART_REDUCED, skip_reason_of
from lean_fx.passes.measure_scale import unit_variances
from lean_fx.planning.options import Options, unwanted
from lean_fx.planning.plans import Plan
from lean_fx.planning.product_uses import ProductUses
from lean_fx.planning.records import Record, unread_records
from lean_fx.planning.uncalled import WEIGHT_READ
from lean_fx.planning.weight_uses import Use, WeightUses
from lean_fx.skip_reason import LeftAlone, SkipReason

NOT_CALLED = SkipReason("not_called", "not called in forward on the example inputs")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass
class Seen:
    """What a layer read in one forward pass.

    Attributes:
        calls: how often the layer was called, or its weight applied.
        squares: the sum over the calls of the mean square of the input.
        is_input: whether a call read the model's input.
        applied_by: the module whose forward applies the weight, if the layer is not called.
        used_otherwise: whether a forward uses the weight in another way.
    """

    calls: int = 0
    squares: float = 0.0
    is_input: bool = False
    applied_by: str | None = None
    used_otherwise: bool = False

    @property
    def called(self) -> bool:
        """Whether the layer itself is called."""
        return self.calls > 0 and self.applied_by is None

    def add(self, value: Any, own: set[int]) -> None:
        """Add the input of a call."""
        value = value.data if isinstance(value, PackedSequence) else value
        if not isinstance(value, Tensor):
            return  # a subclass with other arguments
        while functorch.is_functorch_wrapped_tensor(value):  # within torch.func.vmap and the like
            value = functorch.get_unwrapped(value)
        self.calls += 1
        self.squares += float(value.detach().float().square().mean())
        self.is_input |= value.untyped_storage().data_ptr() in own


def observed_records(
    model: nn.Module,
    inputs: tuple[Any, ...],
    options: Options,
    only: Collection[str] | None = None,
) -> list[Record]:
    """The records of a model's layers, from one forward pass on example inputs.

    Args:
        model: it stays as it is.
        inputs: example inputs, which it must take.
        options: the user's.
        only: the names of the layers to record; all by default.

    Raises:
        ArgumentError: the model fails on the inputs or has no values.
        CaptureError: it cannot be copied.
    """
    seen, products = observe(model, inputs)
    modules: dict[str, nn.Module] = dict(model.named_modules())
    options = dataclasses.replace(options, modules=modules | dict(options.modules))
    owners = owners_of(model)
    records = []
    for name, layer in modules.items():
        kind = kind_of(layer)
        if only is not None and name not in only:
            continue
        if type(layer) is nn.MultiheadAttention:
            why = skip_reason_of(layer, owners) or NO_PART_REDUCED
            records.append(Record(name, type(layer).__name__, reason=why))
        if not name or kind is None:
            continue
        reason = _inside(name, modules) or skip_reason_of(layer, owners)
        applied_by = seen[name].applied_by
        # A graph has no hooks.
        if seen[name].used_otherwise or (applied_by == "" and only is not None):
            reason = reason or WEIGHT_READ
        if not reason and not seen[name].calls:
            reason = NOT_CALLED
        records.append(_record(name, layer, seen[name], reason, options, type(model).__name__))
    return records + unread_records(products)


def layer_names(model: nn.Module) -> list[str]:
    """The names of the layers that a plan from an observed run may speak of."""
    return [name for name, layer in model.named_modules() if kind_of(layer)]


def _record(
    name: str,
    layer: nn.Module,
    seen: Seen,
    reason: SkipReason | None,
    options: Options,
    model: str,
) -> Record:
    groups = groups_of(layer)
    read = ChannelRead(
        "",
        known_kind_of(layer).channel_dim(layer),
        input_channels(layer) // groups,
        groups=groups,
        intermediate=not seen.is_input,
    )
    reason = reason or unwanted(read, name, layer, options)
    if reason:
        return Record(name, type(layer).__name__, reason=reason)
    rms = math.sqrt(seen.squares / seen.calls)
    return Record(
        name,
        base_type(layer).__name__,
        read,
        weights=sum(weight.numel() for weight in input_weights(layer).values()),
        rms=rms if 0 < rms < math.inf else 1.0,
        applied_by=seen.applied_by,
        note="" if seen.applied_by is None else f"applied by {seen.applied_by or model}",
    )


def observe(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[dict[str, Seen], list[LeftAlone]]:
    """Observe what every layer reads, on inputs of unit variance or else on the inputs themselves.

    Args:
        model: it stays as it is.
        inputs: example inputs.

    Returns:
        What each layer reads, by name, and the parameters outside layers that multiply values.

    Raises:
        ArgumentError: the model fails on the inputs or has no values.
        CaptureError: it cannot be copied.
    """
    check_values(model)
    model = clone(model)  # outside the try below: an error here is about copying
    with torch.random.fork_rng(), keeping_rng_state(), leaving_state(model):
        torch.manual_seed(0)
        try:
            seen, products = _seen(model, tuple(unit_variances(inputs)))
        except Exception:  # the model's own code may raise anything on such numbers
            pass
        else:
            _scale_as_in_training(seen, model, inputs)
            return seen, products
    try:
        with keeping_rng_state(), leaving_state(model):
            return _seen(model, inputs)
    except Exception as error:
        given, reason = described_inputs(model, inputs), one_line(error)
        raise ArgumentError(
            f"example_inputs: {type(model).__name__} cannot run on them, {given} ({reason}); give "
            "inputs of the shape and dtype that the model takes"
        ) from error


def _scale_as_in_training(seen: dict[str, Seen], model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Replace the scale of the inputs by that of a run in training, as ``MeasureScale`` does."""
    try:
        trained, _ = _seen(model, tuple(unit_variances(inputs)), training=True)
    except Exception:  # as batch norm raises on a single value
        return
    for name, each in trained.items():
        mean = each.squares / each.calls if each.calls else math.nan
        if math.isfinite(mean):
            seen[name].squares = mean * seen[name].calls


def _seen(
    model: nn.Module, inputs: tuple[Any, ...], *, training: bool = False
) -> tuple[dict[str, Seen], list[LeftAlone]]:
    return without_gradients(
        lambda: _seen_once(clone(model).train(training), copied_inputs(inputs))
    )


def _seen_once(
    copied: nn.Module, inputs: tuple[Any, ...]
) -> tuple[dict[str, Seen], list[LeftAlone]]:
    tensors = [each for each in pytree.tree_leaves(inputs) if isinstance(each, Tensor)]
    own = {each.untyped_storage().data_ptr() for each in tensors}
    called: dict[str, Seen] = {}
    for name, layer in copied.named_modules():
        seen = called[name] = Seen()
        if kind_of(layer):
            layer.register_forward_pre_hook(_recording_hook(seen, own), with_kwargs=True)
    with WeightUses(copied) as watch, ProductUses(copied) as products:
        call(copied, inputs)
    for name, uses in watch.uses.items():
        if not called[name].calls:
            called[name] = _applied(uses, own)
    return called, list(products.left_alone.values())


def _applied(uses: list[Use], own: set[int]) -> Seen:
    """What a layer that is never called reads where forward uses its weight."""
    if any(use.input is None for use in uses):
        return Seen(used_otherwise=True)
    holders = set.intersection(*(set(use.within) for use in uses))
    seen = Seen(applied_by=max(holders, key=len))
    for use in uses:
        seen.add(use.input, own)
    return seen


def _recording_hook(seen: Seen, own: set[int]) -> Any:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.add(args[0] if args else kwargs.get("input"), own)

    return hook


def _inside(name: str, modules: dict[str, nn.Module]) -> SkipReason | None:
    while name := name.rpartition(".")[0]:
        holder = modules[name]
        ours = type(holder) is nn.Module or isinstance(holder, _CONTAINERS)  # of a graph, too
        reads = has_own_kind(holder) or type(holder).__module__.startswith("torch.nn.")
        if reads and not ours:
            text = f"inside {type(holder).__name__}, which reads its weights itself"
            return SkipReason("inside_module", text)
    return None


def without_failing(made: Plan, model: nn.Module, inputs: tuple[Any, ...]) -> Plan:
    """The plan without the layers whose reduction makes the model fail (rule 3).

    Args:
        made: from observed records.
        model: it stays as it is.
        inputs: example inputs.
    """
    kept: list[Site] = []
    left = list(made.left_alone)

    def add(sites: tuple[Site, ...]) -> None:
        """Keep those of some sites that run, by halves: few of many fail."""
        reason = _failure(dataclasses.replace(made, sites=(*kept, *sites)), model, inputs)
        if not reason:
            kept.extend(sites)
        elif len(sites) == 1:
            text = f"the model fails where it reduces its input: {reason}"
            refused = SkipReason("fails_reduced", text)
            left.extend(LeftAlone(each.layer, each.kind, refused) for each in sites[0].consumers)
        else:
            half = len(sites) // 2
            add(sites[:half])
            add(sites[half:])

    add(made.sites)
    return dataclasses.replace(made, sites=tuple(kept), left_alone=tuple(left))


def _failure(made: Plan, model: nn.Module, inputs: tuple[Any, ...]) -> str:
    """Why a model fails with its layers swapped, in one line; empty if it does not."""
    sites = tuple(dataclasses.replace(site, rms=0.0) for site in made.sites)  # measures no scale
    tried = dataclasses.replace(made, sites=sites)
    with keeping_rng_state(), leaving_state(model):
        try:
            copied = tried.apply_to_copy(model, None).eval()
            without_gradients(lambda: call(copied, copied_inputs(inputs)))
        except Exception as error:  # the model's own code
            return one_line_with_type(error, 200)
    return ""
