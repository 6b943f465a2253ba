"""Transformation: a layer reduces its own input, wherever it is called.

What a graph shows gets its reductions as nodes (:class:`~lean_fx.passes.InsertReductions`). Three
things it does not show: the calls of a model that cannot be traced, those of one that keeps its
class, and one layer called several times, whose weights fit only one width. There the layer itself
is changed::

    cell(x)                                  before
    cell(cell.reduction(x))                  after: a forward pre-hook of the rebuilt layer

so that the code stays as it is, and every call of the layer shares one reduction. Where another
module's forward applies the weight, the hooks are of that module
(:mod:`lean_fx.layers.input_hooks`).

Rules:

1. In a graph it acts on sites without a value. A layer that holds a ``reduction`` is left alone.
2. The reduction is promised values of 0 or more where every value that the layer reads is proved.
3. In a model (:func:`swap_layers`) it acts on all sites. The layers of a site share its reduction,
   and its result where they read one tensor (:mod:`lean_fx.layers.shared_inputs`). A linear layer
   behind a flatten brings the channels back to an axis of their own first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn
from torch.fx import GraphModule

from lean_fx.errors import PlanError
from lean_fx.graph.calls import modules_by_name, source_of
from lean_fx.graph.facts import facts
from lean_fx.graph.rewriting import become
from lean_fx.graph.site_reductions import check_layer, reduction_for
from lean_fx.graph.sites import Site
from lean_fx.layers.gains import Gains
from lean_fx.layers.input_hooks import ReduceFlattened, reduce_first, reduce_within
from lean_fx.layers.rebuild import rebuild
from lean_fx.layers.shared_inputs import ReduceOnce
from lean_fx.passes.base import Pass
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
        modules = modules_by_name(graph_module)
        todo = [site for site in self.sites if f"{site.layers[0]}.reduction" not in modules]
        swap_layers(graph_module, todo, self.reduction, proved=proved_layers(graph_module))
        return bool(todo)


def proved_layers(graph_module: GraphModule) -> frozenset[str]:
    """The layers that read no element below 0 at any call, as ``InferSign`` has proved."""
    proved: dict[str, bool] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            read = source_of(node)
            known = read is not None and facts(read).nonnegative
            proved[str(node.target)] = proved.get(str(node.target), True) and known
    return frozenset(name for name, known in proved.items() if known)


def swap_layers(
    model: nn.Module,
    sites: Iterable[Site],
    reduction: str | ReductionFactory,
    *,
    proved: Collection[str] = (),
) -> None:
    """Rebuild the layers of sites in place, so that each reduces its input first.

    Args:
        model: changed in place.
        sites: with their ``out_channels``. The same random numbers make the same weights as in a
            graph.
        reduction: a registered name or a factory; it makes one module for each site.
        proved: the names of layers whose input is proved to have no element below 0.

    Raises:
        PlanError: a layer is not there, or not what the plan says.

    Example:
        >>> import torch
        >>> from lean_fx.passes import Consumer
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> site = Site("", -1, 64, (Consumer("2", "Linear", ""),), 8, nonnegative=True)
        >>> swap_layers(model, [site], "lean", proved=["2"])
        >>> model[2].reduction
        LeanReduction(64, 8, dim=-1, nonnegative)
        >>> model(torch.rand(3, 8)).shape
        torch.Size([3, 2])
    """
    sites = tuple(sites)
    modules = modules_by_name(model)
    for site in sites:
        for consumer in site.consumers:
            check_layer(modules.get(consumer.layer), consumer, site)

    def made(site: Site) -> tuple[nn.Module, Gains]:
        nonnegative = site.nonnegative and all(name in proved for name in site.layers)
        return reduction_for(site, reduction, modules[site.layers[0]], nonnegative)

    for site in sites:
        if not site.value:
            _swap(model, site, *made(site))
    shared = [(site, *made(site)) for site in sites if site.value]
    for each in shared:
        _swap(model, *each)


def _swap(model: nn.Module, site: Site, reduction: nn.Module, gains: Gains) -> None:
    assert site.out_channels is not None
    readers = sum(consumer.features_per_channel == 1 for consumer in site.consumers)
    once = ReduceOnce(readers) if readers > 1 else reduce_first
    for consumer in site.consumers:
        features = consumer.features_per_channel
        layer = model.get_submodule(consumer.layer)
        become(layer, rebuild(layer, site.out_channels * features * site.groups, gains))
        layer.add_module("reduction", reduction)
        if consumer.applied_by is not None:
            _reduce_within(model, consumer.applied_by, consumer.layer)
        elif features == 1:
            layer.register_forward_pre_hook(once, with_kwargs=True)
        else:
            last = site.dim == -1
            sizes = (features, site.in_channels) if last else (site.in_channels, features)
            layer.register_forward_pre_hook(ReduceFlattened(sizes), with_kwargs=True)


def _reduce_within(model: nn.Module, applied_by: str, layer: str) -> None:
    owner = modules_by_name(model).get(applied_by)
    if owner is None or not f".{layer}".startswith(f".{applied_by}".rstrip(".") + "."):
        raise PlanError(
            f"plan: layer {layer!r} is not inside {applied_by!r}, which the plan says applies its "
            "weight; make the plan anew from this model"
        )
    reduce_within(owner, layer.removeprefix(f"{applied_by}."))
