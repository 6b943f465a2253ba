"""Transformation: put a reduction before the layers of each site, and rebuild them narrower.

Before, with C channels in ``pool``, which the layers ``conv_a`` and ``conv_b`` and a residual
sum read::

    pool -> conv_a(C -> A)
    pool -> conv_b(C -> B)
    pool -> add

After, with C' channels: one reduction for both, the sum untouched::

    pool -> reductions.pool(C -> C') -> conv_a(C' -> A)
                                     -> conv_b(C' -> B)
    pool -> add

Where a linear layer reads through a flatten, the reduction stands before it, and the layer shrinks
from C*k to C'*k features (k = H*W)::

    pool -> flatten -> dropout -> linear(C*k -> B)
    pool -> reductions.pool(C -> C') -> flatten -> dropout -> linear(C'*k -> B)

The channels of a grouped convolution are reduced group by group, all by one reduction::

    pool -> conv(C -> B, groups=G)
    pool -> unflatten(1, (G, C/G)) -> reductions.pool(C/G -> C') -> flatten(1, 2)
         -> conv(G*C' -> B, groups=G)

What packed sequences hold is reduced in their data::

    packed -> gru(C -> H)
    packed -> getattr data -> reductions.packed(C -> C') -> with_data(packed, ...) -> gru(C' -> H)

Rules:

1. The reduction is called right before the first layer of the site: were it put right after the
   value, an in-place operation between the two would be missed.
2. What stands between the value and the layer moves with it if nobody else reads it; else the
   layer gets a copy. In-place dropout that moves is in place no more: a reduction may need what it
   returned for its gradient.
3. A ``view`` or ``reshape`` on that way may hold the old number of features: it becomes a
   ``reshape`` that holds the new one, or -1.
4. A site whose reduction is there already is left alone.
5. A rebuilt layer starts at the output variance of the layer that it replaces. ``MeasureScale`` has
   measured the root mean square of the value. What the reduction makes of it is measured on a
   random sample with the same root mean square (:mod:`lean_fx.layers.gains`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from lean_fx.errors import PassError, PlanError
from lean_fx.graph.calls import modules_by_name, source_of
from lean_fx.graph.facts import facts, forget_facts
from lean_fx.graph.flattens import view_sizes
from lean_fx.graph.rewriting import add_module
from lean_fx.graph.site_reductions import check_layer, reduction_for
from lean_fx.graph.sites import Consumer, Site
from lean_fx.layers.gains import Gains
from lean_fx.layers.rebuild import rebuild
from lean_fx.passes.base import Pass
from lean_fx.passes.find_consumers import reads_reduction
from lean_fx.reduction.packed import with_data
from lean_fx.reduction.registry import ReductionFactory, reduction_factory


class InsertReductions(Pass):
    """Apply decided sites to a graph.

    Args:
        sites: what to reduce; each has its ``out_channels`` and a ``name`` of its own. Those
            without a value are left to ``SwapLayers``.
        reduction: a registered name or a factory; it makes one module for each site.

    Raises:
        PlanError: a site does not fit the graph, which is then still as it was, or the reduction
            does not do what a reduction must.
    """

    def __init__(self, sites: Iterable[Site], reduction: str | ReductionFactory = "lean") -> None:
        self.sites = tuple(site for site in sites if site.value)
        self.reduction = reduction
        reduction_factory(reduction)

    def requires(self, graph_module: GraphModule) -> None:
        """Every site that is not there yet must fit the graph."""
        nodes = {node.name: node for node in graph_module.graph.nodes}
        modules = modules_by_name(graph_module)
        for site in self._missing(graph_module):
            for consumer in site.consumers:
                _check(consumer, site, nodes, modules)

    def run(self, graph_module: GraphModule) -> bool:
        """Insert the reductions and rebuild the layers, site by site."""
        todo = self._missing(graph_module)
        nodes = {node.name: node for node in graph_module.graph.nodes}
        made = []  # all before the graph is changed
        for site in todo:
            layer = graph_module.get_submodule(site.layers[0])
            # The plan may have been made from another model, or by hand.
            nonnegative = site.nonnegative and facts(nodes[site.value]).nonnegative
            made.append(reduction_for(site, self.reduction, layer, nonnegative))
        for site, (module, gains) in zip(todo, made, strict=True):
            _insert(graph_module, site, module.train(graph_module.training), gains, nodes)
        if todo:
            forget_facts(graph_module)
        return bool(todo)

    def ensures(self, graph_module: GraphModule) -> None:
        """Every site is there."""
        missing = [site.value for site in self._missing(graph_module)]
        if missing:
            raise PassError(f"InsertReductions: no reduction of {', '.join(missing)}")

    def _missing(self, graph_module: GraphModule) -> list[Site]:
        """The sites whose reduction is not there yet (rule 4)."""
        nodes = {node.name: node for node in graph_module.graph.nodes}
        modules = modules_by_name(graph_module)
        return [
            site
            for site in self.sites
            if not all(_is_reduced(consumer, nodes, modules) for consumer in site.consumers)
        ]


def _is_reduced(
    consumer: Consumer, nodes: Mapping[str, Node], modules: Mapping[str, nn.Module]
) -> bool:
    source = source_of(nodes[consumer.node]) if consumer.node in nodes else None
    for _ in consumer.path:
        source = next(iter(source.all_input_nodes), None) if source is not None else None
    return source is not None and reads_reduction(source, modules)


def _check(
    consumer: Consumer, site: Site, nodes: Mapping[str, Node], modules: Mapping[str, nn.Module]
) -> None:
    subject = f"plan: layer {consumer.layer!r}"
    remedy = "make the plan anew from this model"
    node, layer = nodes.get(consumer.node), modules.get(consumer.layer)
    if layer is None or node is None or node.target != consumer.layer:
        raise PlanError(f"{subject} is not called by {consumer.node!r} in this model; {remedy}")
    check_layer(layer, consumer, site)
    if site.packed and not isinstance(layer, nn.RNNBase):
        raise PlanError(f"{subject} cannot read packed sequences; {remedy}")
    source = source_of(node)
    for step in (*reversed(consumer.path), site.value):
        if source is None or source.name != step:
            found = source.name if source is not None else None
            raise PlanError(f"{subject} reads {found!r}, but the plan says {step!r}; {remedy}")
        if step != site.value:
            source = next(iter(source.all_input_nodes), None)


def _insert(
    graph_module: GraphModule,
    site: Site,
    module: nn.Module,
    gains: Gains,
    nodes: Mapping[str, Node],
) -> None:
    graph = graph_module.graph
    calls = [nodes[consumer.node] for consumer in site.consumers]
    assert site.out_channels is not None

    target = add_module(graph_module, "reductions", site.name, module)
    with graph.inserting_before(calls[0]):
        reduced = _call_reduction(graph, target, nodes[site.value], site)

    ours = set(calls) | {nodes[step] for each in site.consumers for step in each.path}
    private = {step.name for step in ours if set(step.users) <= ours}
    carried: dict[str, Node] = {}
    for consumer, call in zip(site.consumers, calls, strict=True):
        features = site.out_channels * consumer.features_per_channel * site.groups
        source = reduced
        for step in consumer.path:
            if step not in carried:
                move = step in private
                carried[step] = _carry(nodes[step], source, call, features=features, move=move)
            source = carried[step]
        before = source_of(call)
        assert before is not None
        call.replace_input_with(before, source)
        layer = graph_module.get_submodule(consumer.layer)
        graph_module.set_submodule(consumer.layer, rebuild(layer, features, gains))
    for step in reversed(carried):
        if carried[step] is not nodes[step]:
            _erase_unused(nodes[step])


def _call_reduction(graph: Graph, target: str, value: Node, site: Site) -> Node:
    """Reduce a value; if it is packed, its data; if it is read in groups, group by group."""
    if site.packed:
        data = graph.call_function(getattr, (value, "data"))
        data = graph.call_module(target, (data,))
        return graph.call_function(with_data, (value, data))
    if site.groups > 1:
        sizes = (site.groups, site.in_channels)
        parts = graph.call_function(torch.unflatten, (value, site.dim, sizes))
        parts = graph.call_module(target, (parts,))
        return graph.call_function(torch.flatten, (parts, site.dim, site.dim + 1))
    return graph.call_module(target, (value,))


def _carry(step: Node, source: Node, call: Node, *, features: int, move: bool) -> Node:
    """Make ``step``, or one in its place, read ``source`` right before ``call``."""
    graph = step.graph
    sizes = view_sizes(step)
    if sizes is not None:
        with graph.inserting_before(call):
            shape = (sizes[0], features if sizes[0] == -1 else -1)
            return graph.call_function(torch.reshape, (source, shape))
    old = step.all_input_nodes[0]
    if move:
        if step.op == "call_module":
            module = graph.owning_module.get_submodule(str(step.target))  # type: ignore[union-attr]
            if getattr(module, "inplace", False):
                module.inplace = False
        call.prepend(step)
        step.replace_input_with(old, source)
        return step
    with graph.inserting_before(call):
        return graph.node_copy(step, lambda node: source if node is old else node)


def _erase_unused(node: Node) -> None:
    """Erase what only fed a replaced view: the view, and the sizes computed for it."""
    if node.users or node.op in ("placeholder", "output", "call_module", "get_attr"):
        return
    sources = node.all_input_nodes
    node.graph.erase_node(node)
    for source in sources:
        _erase_unused(source)
