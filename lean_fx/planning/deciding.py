"""From the facts that the analyses wrote, and what the user asked for, to a plan."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.fx import GraphModule

from lean_fx.layers.kinds import base_type, input_weights
from lean_fx.passes import Consumer, Facts, Read, Site, facts
from lean_fx.passes.split_layers import splitter_of
from lean_fx.planning.options import Options, named_by_user, skip_reason, unwanted
from lean_fx.planning.plans import LeftAlone, Plan
from lean_fx.planning.policy import (
    check_names,
    nearest_divisor,
    wanted_channels,
)
from lean_fx.planning.unseen import never_called
from lean_fx.reduction.lean import LeanReduction
from lean_fx.reduction.registry import ReductionFactory, make_reduction


def stacks_to_split(graph_module: GraphModule, options: Options) -> tuple[str, ...]:
    """The layers of attention, and stacks of recurrent ones, whose inner layers may be reduced.

    Args:
        graph_module: captured and analysed.
        options: what the user asked for.

    Returns:
        Their names.
    """
    calls: Counter[str] = Counter()
    for node in graph_module.graph.nodes:
        known = facts(node)
        if known.read or known.splits:
            name = str(node.target)
            calls[name] += splitter_of(graph_module.get_submodule(name)) is not None
    return tuple(
        name
        for name, count in calls.items()
        if count == 1
        and not skip_reason(name, graph_module.get_submodule(name), options)
        and _passes_inside(name, graph_module.get_submodule(name), options)
    )


def weights_to_make(graph_module: GraphModule) -> tuple[str, ...]:
    """The parameters of no layer that can become layers.

    Args:
        graph_module: captured and analysed.

    Returns:
        Their names.
    """
    known = map(facts, graph_module.graph.nodes)
    return tuple(each.weight for each in known if each.weight and not each.refusal)


def _passes_inside(name: str, stack: nn.Module, options: Options) -> bool:
    """Whether the user's filter lets a layer pass, or one of a stack but the first."""
    count = int(getattr(stack, "num_layers", 1))
    names = (name, *(f"{name}.{index}" for index in range(1, count)))
    return options.filter is None or any(options.filter(stack, each) for each in names)


def make_plan(
    graph_module: GraphModule,
    model: nn.Module,
    options: Options,
    split: tuple[str, ...] = (),
    weights: tuple[str, ...] = (),
) -> Plan:
    """Decide over the facts that the analyses have written.

    Args:
        graph_module: ``model``, captured and analysed.
        model: the model itself, for the layers that its forward never calls.
        options: what the user asked for.
        split: the stacks of recurrent layers that are split in ``graph_module``.
        weights: the parameters that have become layers there.

    Returns:
        The plan.

    Raises:
        ArgumentError: an option does not fit this model.
    """
    modules = dict(graph_module.named_modules())
    left: list[LeftAlone] = []
    candidates: list[tuple[Read, Consumer]] = []
    for node in graph_module.graph.nodes:
        known = facts(node)
        if known.refusal and node.op != "call_module":
            kind = getattr(node.target, "__name__", str(node.target))
            left.append(LeftAlone(known.weight or node.name, kind, known.refusal))
        elif known.refusal or known.read:
            name, layer = str(node.target), modules[str(node.target)]
            reason = known.refusal
            if known.read:
                reason = unwanted(known.read, name, layer, options)
            elif known.splits:
                reason = named_by_user(name, layer, options) or reason
            if known.read and not reason:
                candidates.append((known.read, _consumer(node.name, name, layer, known.read)))
            else:
                left.append(LeftAlone(name, type(layer).__name__, reason))
    called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    left += never_called(model, graph_module, called | set(split))

    names = [each.layer for each in left] + [consumer.layer for _, consumer in candidates]
    names += [*split, *_parts(graph_module), *weights_to_make(graph_module)]
    check_names("skip", (each for each in options.skip if isinstance(each, str)), names)
    if isinstance(options.channels, dict):
        check_names("channels", options.channels, names)
    known_of = {node.name: facts(node) for node in graph_module.graph.nodes}
    shared, once = _called_again(candidates, known_of)
    sites, refused = _decide(once, known_of, options)
    for site in shared:
        settle(site, options, sites, refused)
    return Plan(
        model=type(model).__name__,
        sites=tuple(sites),
        left_alone=tuple(dict.fromkeys(left + refused)),
        reduction=options.reduction,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        split=split,
        weights=weights,
    )


def _parts(graph_module: GraphModule) -> list[str]:
    """What the layers of the stacks, and of attention, that are not split would be called."""
    names: list[str] = []
    for name, module in graph_module.named_modules():
        parts: Iterable[object] = ()
        if isinstance(module, nn.RNNBase) and module.num_layers > 1:
            parts = range(module.num_layers)
        elif isinstance(module, nn.MultiheadAttention):
            parts = ("in_proj", "q_proj", "k_proj", "v_proj", "out_proj")
        names += [f"{name}.{part}" for part in parts]
    return names


def _consumer(node: str, name: str, layer: nn.Module, read: Read) -> Consumer:
    weights = sum(weight.numel() for weight in input_weights(layer).values())
    return Consumer(name, base_type(layer).__name__, node, read.spread, read.path, weights)


def _decide(
    candidates: Iterable[tuple[Read, Consumer]],
    known_of: Mapping[str, Facts],
    options: Options,
) -> tuple[list[Site], list[LeftAlone]]:
    """Group the layers by value, and settle the channels of each group."""
    shared: dict[tuple[str, int, int, bool, int, int], list[Consumer]] = {}
    for read, consumer in candidates:
        key = (read.value, read.dim, read.in_channels, read.packed, read.groups, read.writes)
        shared.setdefault(key, []).append(consumer)
    sites: list[Site] = []
    refused: list[LeftAlone] = []
    for (value, dim, in_channels, packed, groups, _), consumers in shared.items():
        known = known_of[value]
        site = Site(
            value,
            dim,
            in_channels,
            tuple(consumers),
            packed=packed,
            groups=groups,
            rms=known.rms or 1.0,
            nonnegative=known.nonnegative,
        )
        settle(site, options, sites, refused)
    return sites, refused


def _called_again(
    candidates: Iterable[tuple[Read, Consumer]], known_of: Mapping[str, Facts]
) -> tuple[list[Site], list[tuple[Read, Consumer]]]:
    """A site without a value for each layer that is called several times; and the rest."""
    by_layer: dict[str, list[tuple[Read, Consumer]]] = {}
    for candidate in candidates:
        by_layer.setdefault(candidate[1].layer, []).append(candidate)
    shared = []
    for calls in by_layer.values():
        read, consumer = calls[0]
        if len(calls) > 1:
            known = [known_of[each.value] for each, _ in calls]
            squares = [(each.rms or 1.0) ** 2 for each in known]
            site = Site(
                "",
                read.dim,
                read.in_channels,
                (dataclasses.replace(consumer, node=""),),
                groups=read.groups,
                rms=(sum(squares) / len(squares)) ** 0.5,
                nonnegative=all(each.nonnegative for each in known),
                note=f"called {len(calls)} times",
            )
            shared.append(site)
    return shared, [calls[0] for calls in by_layer.values() if len(calls) == 1]


def settle(site: Site, options: Options, sites: list[Site], refused: list[LeftAlone]) -> None:
    """Settle the channels of a site: one site more for each number that its layers get."""
    by_channels: dict[int, list[Consumer]] = {}
    notes: dict[int, str] = {}
    for consumer in site.consumers:
        settled, text = _channels(site, consumer.layer, options)
        if settled is None:
            refused.append(LeftAlone(consumer.layer, consumer.kind, text))
        else:
            by_channels.setdefault(settled, []).append(consumer)
            notes[settled] = text
    for settled, members in by_channels.items():
        decided = dataclasses.replace(
            site,
            consumers=tuple(members),
            out_channels=settled,
            macs=_macs(site, settled, options.reduction),
            name=_free_name(site.value or members[0].layer, sites),
            note="; ".join(filter(None, (site.note, notes[settled]))),
        )
        sites.append(decided)


def _macs(site: Site, out_channels: int, reduction: str | ReductionFactory) -> int | None:
    with torch.random.fork_rng(devices=[]):  # what is drawn for it here is drawn in vain
        module = make_reduction(reduction, site.in_channels, out_channels, site.reduced_dim)
    if isinstance(module, LeanReduction):
        module.nonnegative |= site.nonnegative
    macs = getattr(module, "macs_per_position", None)
    return macs if isinstance(macs, int) else None


def _channels(site: Site, layer: str, options: Options) -> tuple[int | None, str]:
    """The channels for one layer and a note on them, or None and the reason."""
    wanted = wanted_channels(options.channels, site, layer)
    if wanted is None:
        return None, "not named in channels"
    found = nearest_divisor(site.in_channels, wanted, options.align)
    if site.in_channels == 1:
        return None, "in_channels=1: nothing to reduce"
    if found is None:
        return None, f"in_channels={site.in_channels} is prime: only 1 and itself divide it"
    if found == site.in_channels:
        return None, f"channels={found} equals in_channels: nothing to reduce"
    missed = bool(options.align and found % options.align)
    notes = []
    if abs(found - wanted) >= 1:
        why = f", a multiple of {options.align}" if options.align and not missed else ""
        notes.append(f"{wanted:.3g} wanted, {found} is the nearest divisor{why}")
    if missed:
        notes.append(f"no divisor below {site.in_channels} is a multiple of align={options.align}")
    return found, "; ".join(notes)


def _free_name(value: str, sites: Iterable[Site]) -> str:
    taken = {site.name for site in sites}
    names = itertools.chain([value], (f"{value}_{count}" for count in itertools.count(1)))
    return next(name for name in names if name not in taken)
