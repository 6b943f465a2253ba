"""What every transformation that reduces a site does: check its layers, make its reduction."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lean_fx.errors import LeanError, PlanError, one_line
from lean_fx.graph.calls import is_altered, modules_by_name
from lean_fx.graph.sites import Consumer, Site
from lean_fx.layers.gains import Gains, gains_between
from lean_fx.layers.kinds import (
    KINDS,
    base_type,
    first_weight,
    groups_of,
    input_channels,
    kind_of,
)
from lean_fx.layers.legacy_norms import as_parametrization
from lean_fx.layers.rebuild import rebuild, why_not_rebuilt
from lean_fx.reduction.lean import LeanReduction
from lean_fx.reduction.registry import ReductionFactory, make_reduction

_POSITIONS = 1024  # of the sample: a relative error of the root mean square of a few percent


def check_layer(layer: nn.Module | None, consumer: Consumer, site: Site) -> None:
    """Check that a layer is what a site says of it, and can be rebuilt.

    Raises:
        PlanError: it is not.
    """
    subject, remedy = f"plan: layer {consumer.layer!r}", "make the plan anew from this model"
    layer = None if layer is None else as_parametrization(layer)
    if layer is None or base_type(layer).__name__ != consumer.kind:
        raise PlanError(
            f"{subject} is a {type(layer).__name__}, but the plan says {consumer.kind}; {remedy}"
        )
    if why := why_not_rebuilt(layer):
        raise PlanError(f"{subject} cannot be rebuilt ({why}); {remedy}")
    if is_altered(layer):
        raise PlanError(f"{subject} has hooks, which a rebuilt layer would lose; remove them")
    there = (input_channels(layer), groups_of(layer))
    planned = (site.in_channels * consumer.features_per_channel * site.groups, site.groups)
    if there != planned:
        groups, says = (f" in {g} groups" if g > 1 else "" for _, g in (there, planned))
        raise PlanError(
            f"{subject} reads {there[0]} channels{groups}, but the plan says {planned[0]}{says}; "
            f"{remedy}"
        )
    kind = kind_of(layer)
    if kind is not None and kind.registered:
        features = (site.out_channels or 1) * consumer.features_per_channel * site.groups
        try:
            with torch.random.fork_rng(devices=[]):
                rebuild(layer, features)
        except LeanError as error:
            raise PlanError(f"{subject}: {one_line(error).removeprefix('rebuild: ')}") from error


def check_registered(model: nn.Module, sites: Iterable[Site]) -> None:
    """Check that the types of a user's own layers are registered: if not, a tracer enters them.

    Raises:
        PlanError: one is not.
    """
    modules = modules_by_name(model)
    for consumer in (consumer for site in sites for consumer in site.consumers):
        layer, kind = modules.get(consumer.layer), consumer.kind
        if layer is None or base_type(layer) in KINDS or type(layer).__name__ != kind:
            continue
        if why_not_rebuilt(layer):
            raise PlanError(
                f"plan: layer {consumer.layer!r} is a {kind}, which is not registered here; do so "
                f"first with lean_fx.register_layer({kind}, ...)"
            )


def reduction_for(
    site: Site, reduction: str | ReductionFactory, layer: nn.Module, nonnegative: bool
) -> tuple[nn.Module, Gains]:
    """Make the reduction of a site.

    Args:
        site: with its ``out_channels``.
        reduction: a registered name or a factory.
        layer: one of its layers; the reduction gets the device and dtype of its weights, and its
            mode.
        nonnegative: what is promised of the value.

    Returns:
        The reduction, and how many times larger the value is than what it gives.

    Raises:
        PlanError: it gives another number of channels than the site's.
    """
    assert site.out_channels is not None
    module = make_reduction(reduction, site.in_channels, site.out_channels, site.reduced_dim)
    weight = first_weight(layer)
    module.to(device=weight.device, dtype=weight.dtype).train(layer.training)
    if isinstance(module, LeanReduction):
        module.nonnegative |= nonnegative
    return module, _gains(module, site)


def _gains(module: nn.Module, site: Site) -> Gains:
    """How many times larger the value is than the reduction's output, on a random sample."""
    tensors = [*module.parameters(), *module.buffers()]
    if any(tensor.is_meta for tensor in tensors) or not site.rms:
        return Gains()
    like = tensors[0] if tensors else torch.empty(0)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(_POSITIONS, site.in_channels, generator=generator) * site.rms
    if site.nonnegative:
        values = values.relu() * 2**0.5
    rank = max(2, site.reduced_dim + 1, -site.reduced_dim)
    axis, sizes = site.reduced_dim % rank, [1] * rank
    sizes[axis], sizes[0 if axis else 1] = site.in_channels, _POSITIONS
    sample = (values if axis else values.T).reshape(sizes)
    try:
        with torch.no_grad():
            reduced = module(sample.to(device=like.device, dtype=like.dtype)).float().cpu()
    except (RuntimeError, ValueError, IndexError, TypeError):
        return Gains()  # a user's own reduction that takes values of another rank only
    wanted = list(sample.shape)
    wanted[site.reduced_dim] = site.out_channels or 0
    if list(reduced.shape) != wanted:
        raise PlanError(
            f"plan: {type(module).__name__} makes {list(reduced.shape)} of {list(sample.shape)}, "
            f"not {wanted}; a reduction gives out_channels along dim"
        )
    if not reduced.any():
        return Gains()
    rows = reduced.movedim(axis, -1).flatten(0, -2)
    gains = gains_between(site.rms, values, rows, channels_last=site.dim == -1)
    flattened = any(consumer.features_per_channel > 1 for consumer in site.consumers)
    return Gains(gains.whole) if flattened and site.dim not in (1, -1) else gains
