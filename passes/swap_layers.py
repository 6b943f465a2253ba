"""Transformation: a layer reduces its own input, wherever it is called.

What a graph shows gets its reductions as nodes (:class:`~lean_fx.passes.InsertReductions`). Two
things it does not show: the calls of a model that cannot be traced, and one layer called several
times, whose weights fit one width alone. There the layer itself is changed::

    cell(x)                                  before
    cell(cell.reduction(x))                  after: a forward pre-hook of the rebuilt layer

so that the code stays as it is, and every call of the layer shares one reduction. Where another
module's forward applies the weight, the hooks are of that module
(:mod:`lean_fx.layers.input_hooks`).

Rules:

1. It acts on sites without a value. A layer that holds a ``reduction`` is left alone.
2. The reduction is promised values of 0 or more where every value that the layer reads is proved.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.fx import GraphModule

from lean_fx.errors import PlanError
from lean_fx.graph.facts import facts
from lean_fx.graph.site_reductions import check_layer, reduction_for
from lean_fx.graph.sites import Site
from lean_fx.layers.input_hooks import reduce_first, reduce_within
from lean_fx.layers.rebuild import rebuild
from lean_fx.passes.base import Pass
from lean_fx.passes.find_consumers import layer_input
from lean_fx.reduction.registry import ReductionFactory, reduction_factory


class SwapLayers(Pass):
    """Apply the sites that have no value to a graph.

    ``InferSign`` comes before it.

    Args:
        sites: those with a value are left to ``InsertReductions``.
        reduction: a registered name or a factory.

    Raises:
        PlanError: a site does not fit the model.
    """

    def __init__(self, sites: Iterable[Site], reduction: str | ReductionFactory = "lean") -> None:
        self.sites = tuple(site for site in sites if not site.value)
        self.reduction = reduction
        reduction_factory(reduction)

    def run(self, graph_module: GraphModule) -> bool:
        """Swap the layers one by one."""
        modules = dict(graph_module.named_modules())
        todo = [site for site in self.sites if f"{site.layers[0]}.reduction" not in modules]
        for site in todo:
            nodes = [node for node in graph_module.graph.nodes if node.target in site.layers]
            reads = [layer_input(node) for node in nodes]
            proved = all(read is not None and facts(read).nonnegative for read in reads)
            swap_layer(graph_module, site, self.reduction, nonnegative=site.nonnegative and proved)
        return bool(todo)


def swap_layer(
    model: nn.Module, site: Site, reduction: str | ReductionFactory, *, nonnegative: bool
) -> None:
    """Put in the place of a layer one that reduces its input first.

    Args:
        model: changed in place.
        site: without a value, and with one layer.
        reduction: a registered name or a factory.
        nonnegative: whether what the layer reads is proved to have no element below 0.

    Raises:
        PlanError: the layer is not there, or not what the plan says.

    Example:
        >>> import torch
        >>> from lean_fx.passes import Consumer
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> site = Site("", -1, 64, (Consumer("2", "Linear", ""),), out_channels=8)
        >>> swap_layer(model, site, "lean", nonnegative=True)
        >>> model[2].reduction
        LeanReduction(64, 8, dim=-1, nonnegative)
        >>> model(torch.rand(3, 8)).shape
        torch.Size([3, 2])
    """
    (consumer,) = site.consumers
    layer = dict(model.named_modules()).get(consumer.layer)
    check_layer(layer, consumer, site)
    assert layer is not None
    assert site.out_channels is not None
    module, gain = reduction_for(site, reduction, layer, nonnegative)
    made = rebuild(layer, site.out_channels * site.groups, gain)
    made.add_module("reduction", module)
    model.set_submodule(consumer.layer, made)
    if consumer.applied_by is None:
        made.register_forward_pre_hook(reduce_first, with_kwargs=True)
    else:
        _reduce_within(model, consumer.applied_by, consumer.layer)


def _reduce_within(model: nn.Module, applied_by: str, layer: str) -> None:
    owner = dict(model.named_modules()).get(applied_by)
    if owner is None or not f".{layer}".startswith(f".{applied_by}".rstrip(".") + "."):
        raise PlanError(
            f"plan: layer {layer!r} is not inside {applied_by!r}, which the plan says applies its "
            "weight; make the plan anew from this model"
        )
    reduce_within(owner, layer.removeprefix(f"{applied_by}."))
