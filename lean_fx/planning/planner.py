"""Group the calls of layers into sites, and choose how many channels each site keeps."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import torch

from lean_fx.graph.rewriting import numbered
from lean_fx.graph.sites import Consumer, Site
from lean_fx.passes.find_consumers import called_repeatedly
from lean_fx.planning.options import Options
from lean_fx.planning.policy import check_names, nearest_divisor, wanted_channels
from lean_fx.planning.records import Record
from lean_fx.reduction.lean import LeanReduction
from lean_fx.reduction.registry import ReductionFactory, make_reduction
from lean_fx.skip_reason import LeftAlone, SkipReason


def choose_sites(records: Sequence[Record], options: Options) -> tuple[list[Site], list[LeftAlone]]:
    """Group the calls that can share a reduction, and choose the channels of each group.

    All calls of one layer share a reduction inside the layer. Calls of different layers share a
    reduction if they read the same channels of the same value and keep the same number of them.

    Args:
        records: of all calls, in order.
        options: the user's.

    Returns:
        The sites, not yet named, and the layers left alone, with their reasons.

    Raises:
        ArgumentError: ``channels`` gives no usable number for a layer.
    """
    records = _refused_together(records)
    left = [LeftAlone(each.layer, each.kind, each.reason) for each in records if each.reason]
    sites: list[Site] = []
    for site in (*_by_value(records), *_by_layer(records)):
        chosen, refused = _choose_channels(site, options)
        sites += chosen
        left += refused
    return sites, list(dict.fromkeys(left))


def named_sites(sites: Iterable[Site]) -> tuple[Site, ...]:
    """Give every site a unique name, after its value or its layer."""
    taken: set[str] = set()
    made = []
    for site in sites:
        names = numbered(site.value or site.layers[0])
        name = next(each for each in names if each not in taken)
        taken.add(name)
        made.append(dataclasses.replace(site, name=name))
    return tuple(made)


def check_named_layers(options: Options, layers: Collection[str]) -> None:
    """Check that every name in ``skip`` and ``channels`` matches a layer.

    Raises:
        ArgumentError: one does not.
    """
    check_names("skip", (each for each in options.skip if isinstance(each, str)), layers)
    if isinstance(options.channels, dict):
        check_names("channels", options.channels, layers)


def _refused_together(records: Sequence[Record]) -> list[Record]:
    """Skip all calls of a layer if one of them is skipped: the layer has a single width."""
    reducible = {each.layer for each in records if not each.reason}
    reasons = {each.layer: each.reason for each in records if each.reason}
    mixed = reducible & reasons.keys()
    counts = Counter(each.layer for each in records)

    def checked(record: Record) -> Record:
        if record.layer not in mixed:
            return record
        reason = called_repeatedly(counts[record.layer], str(reasons[record.layer]))
        return Record(record.layer, record.kind, reason=reason)

    return [checked(each) for each in records]


def _calls_of_layers(records: Iterable[Record]) -> dict[str, list[Record]]:
    calls: dict[str, list[Record]] = {}
    for record in records:
        if record.read is not None and not record.reason:
            calls.setdefault(record.layer, []).append(record)
    return calls


def _by_value(records: Iterable[Record]) -> list[Site]:
    """A site for each group of layers that are called once and read the same channels."""
    shared: dict[object, list[Record]] = {}
    for calls in _calls_of_layers(records).values():
        (record, *others) = calls
        read = record.read
        assert read is not None
        if not others and read.value:
            same = (read.value, read.dim, read.in_channels, read.packed, read.groups, read.writes)
            shared.setdefault(same, []).append(record)
    return [_site(group) for group in shared.values()]


def _by_layer(records: Iterable[Record]) -> list[Site]:
    """A site without a value for each layer that reduces its own input."""
    sites = []
    for calls in _calls_of_layers(records).values():
        read = calls[0].read
        assert read is not None
        if len(calls) == 1 and read.value:
            continue
        squares = [each.rms**2 for each in calls]
        whole = dataclasses.replace(
            calls[0],
            read=dataclasses.replace(read, value="", packed=False),
            node="",
            rms=(sum(squares) / len(squares)) ** 0.5,
            nonnegative=all(each.nonnegative for each in calls),
            note=f"called {len(calls)} times" if len(calls) > 1 else calls[0].note,
        )
        sites.append(_site([whole]))
    return sites


def _site(group: Sequence[Record]) -> Site:
    first, read = group[0], group[0].read
    assert read is not None
    return Site(
        read.value,
        read.dim,
        read.in_channels,
        tuple(_consumer(each) for each in group),
        packed=read.packed,
        groups=read.groups,
        rms=first.rms,
        nonnegative=first.nonnegative,
        note=first.note,
    )


def _consumer(record: Record) -> Consumer:
    read = record.read
    assert read is not None
    return Consumer(
        record.layer,
        record.kind,
        record.node,
        read.features_per_channel,
        read.path,
        record.weights,
        record.applied_by,
    )


def _choose_channels(site: Site, options: Options) -> tuple[list[Site], list[LeftAlone]]:
    """One site for each number of channels that the layers of a group get."""
    by_channels: dict[int, list[Consumer]] = {}
    notes: dict[int, str] = {}
    refused = []
    for consumer in site.consumers:
        found = _channels(site, consumer.layer, options)
        if isinstance(found, SkipReason):
            refused.append(LeftAlone(consumer.layer, consumer.kind, found))
        else:
            count, notes[found[0]] = found
            by_channels.setdefault(count, []).append(consumer)
    chosen = [
        dataclasses.replace(
            site,
            consumers=tuple(members),
            out_channels=count,
            macs=_macs(site, count, options.reduction),
            note="; ".join(filter(None, (site.note, notes[count]))),
        )
        for count, members in by_channels.items()
    ]
    return chosen, refused


def _macs(site: Site, out_channels: int, reduction: str | ReductionFactory) -> int | None:
    with torch.random.fork_rng(devices=[]):  # this module is only counted, never used
        module = make_reduction(reduction, site.in_channels, out_channels, site.reduced_dim)
    if isinstance(module, LeanReduction):
        module.nonnegative |= site.nonnegative
    macs = getattr(module, "macs_per_position", None)
    return macs if isinstance(macs, int) else None


def _channels(site: Site, layer: str, options: Options) -> tuple[int, str] | SkipReason:
    """The channels to keep for one layer and a note on them, or why none can be saved."""
    wanted = wanted_channels(options.channels, site, layer)
    if wanted is None:
        return SkipReason("channels", "not named in channels")
    found = nearest_divisor(site.in_channels, wanted, options.round_to)
    if site.in_channels == 1:
        return SkipReason("nothing_to_reduce", "in_channels=1: nothing to reduce")
    if found is None:
        text = f"in_channels={site.in_channels} is prime: only 1 and itself divide it"
        return SkipReason("nothing_to_reduce", text)
    if found == site.in_channels:
        text = f"channels={found} equals in_channels: nothing to reduce"
        return SkipReason("nothing_to_reduce", text)
    return found, _note(site, found, wanted, options)


def _note(site: Site, found: int, wanted: float, options: Options) -> str:
    """Say if the number of channels is not the one that the user asked for."""
    missed = bool(options.round_to and found % options.round_to)
    notes = []
    if abs(found - wanted) >= 1:
        why = f", a multiple of {options.round_to}" if options.round_to and not missed else ""
        notes.append(f"{wanted:.3g} wanted, {found} is the nearest divisor{why}")
    if missed:
        notes.append(
            f"no divisor below {site.in_channels} is a multiple of round_to={options.round_to}"
        )
    return "; ".join(notes)
