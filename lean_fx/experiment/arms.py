"""The model of a configuration: as it is, reduced, narrower, or with its layers factored."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lean_fx.errors import ArgumentError
from lean_fx.experiment.budget import MakeWidth, equal_budget
from lean_fx.experiment.configurations import CONTROLS, Configuration
from lean_fx.experiment.factored import depthwise_separable, low_rank
from lean_fx.passes import Site
from lean_fx.reduction.registry import reduction_factory
from lean_fx.transform import leanify, plan

_BUDGETS = {"narrow": "parameters", "narrow_macs": "macs", "narrow_latency": "latency"}


def model_of(
    configuration: Configuration, make: MakeWidth, inputs: Tensor, like: str = "lean_damped"
) -> nn.Module:
    """Make the model of a configuration, its weights drawn anew from its seed.

    Args:
        configuration: the arm, C', sites, options and seed.
        make: gives the model of a width in ]0, 1].
        inputs: a batch of what the model reads.
        like: the reduction that the narrow controls are made equal to.

    Raises:
        ArgumentError: no site is of those asked for, or the width changes nothing.
        LeanError: the model cannot be made as the configuration says.

    Example:
        >>> def make(width: float) -> nn.Module:
        ...     hidden = round(64 * width)
        ...     return nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 10))
        >>> model_of(Configuration("slice", 4), make, torch.rand(2, 8)).get_submodule("2")
        Linear(in_features=4, out_features=10, bias=True)
    """
    torch.manual_seed(configuration.seed)
    model = make(1.0)
    if configuration.arm == "baseline":
        return model
    if configuration.arm not in CONTROLS:
        return _reduced(configuration, configuration.arm, model, inputs)
    if configuration.arm in _BUDGETS:
        of = _reduced(configuration, like, model, inputs)
        torch.manual_seed(configuration.seed)
        return equal_budget(make, inputs, of=of, by=_BUDGETS[configuration.arm])
    ranks = _chosen_layers(configuration, model, inputs)
    if configuration.arm == "low_rank":
        return low_rank(model, ranks)
    return depthwise_separable(model, ranks)


def _reduced(
    configuration: Configuration, reduction: str, model: nn.Module, inputs: Tensor
) -> nn.Module:
    options = dataclasses.replace(configuration, arm=reduction).taken_options
    return leanify(
        model,
        inputs,
        channels=configuration.channels,
        reduction=partial(reduction_factory(reduction), **options) if options else reduction,
        filter_fn=_filter(configuration, model, inputs),
    )


def _filter(
    configuration: Configuration, model: nn.Module, inputs: Tensor
) -> Callable[[nn.Module, str], bool] | None:
    if configuration.sites == "all":
        return None
    chosen = _chosen_layers(configuration, model, inputs)
    return lambda _, name: name in chosen


def _chosen_layers(
    configuration: Configuration, model: nn.Module, inputs: Tensor
) -> dict[str, int]:
    """The layers of the chosen sites, and C' of each."""
    return {
        consumer.layer: site.out_channels or site.in_channels
        for site in _chosen_sites(configuration, model, inputs)
        for consumer in site.consumers
    }


def _chosen_sites(
    configuration: Configuration, model: nn.Module, inputs: Tensor
) -> tuple[Site, ...]:
    sites = plan(model, inputs, channels=configuration.channels).sites
    wanted = configuration.sites
    if wanted == "all":
        return sites
    if wanted == "late":
        return sites[len(sites) // 2 :]
    if wanted == "last":
        return sites[-1:]
    if wanted.isdecimal():
        chosen = sites[int(wanted) : int(wanted) + 1]
    else:
        chosen = tuple(
            site
            for site in sites
            if any(fnmatch.fnmatchcase(each.layer, wanted) for each in site.consumers)
        )
    if not chosen:
        layers = [consumer.layer for site in sites for consumer in site.consumers]
        raise ArgumentError(
            f"sites={wanted!r} is none of the {len(sites)} sites; use all, late, last, a number "
            f"from 0, or a pattern of {', '.join(layers[:5])}"
        )
    return chosen
