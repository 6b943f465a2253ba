"""Select the sites that pay: by their costs and savings, or by the clock.

For a site with ``P`` positions, ``C_in`` channels and the layers that read them::

    MACs saved    (1 - C'/C_in) x the layers' MACs
    MACs spent    macs_per_position x P
    bytes saved   (1 - C'/C_in) x the layers' inputs and weights
    bytes spent   P (C_in + C') numbers: it reads all channels once and writes C'

No implementation can move fewer bytes than the last line says.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.fx import Graph, GraphModule, Node

from lean_fx.errors import ArgumentError
from lean_fx.layers.kinds import first_weight, input_channels, known_kind_of
from lean_fx.passes import Consumer, Site, facts
from lean_fx.planning.options import Keep
from lean_fx.planning.plans import Plan
from lean_fx.reduction.lean import LeanReduction
from lean_fx.reduction.registry import ReductionFactory
from lean_fx.skip_reason import LeftAlone, SkipReason

_LOGGER = logging.getLogger(__name__)


def select_sites(
    sites: Sequence[Site],
    reduction: str | ReductionFactory,
    graph_module: GraphModule,
    keep: Keep,
    kernel: bool | None = None,
) -> tuple[tuple[Site, ...], list[LeftAlone]]:
    """Keep the sites that pay. Each site is evaluated once.

    Args:
        sites: the sites of ``graph_module``.
        reduction: a registered name or a factory.
        graph_module: analysed with example inputs; not changed.
        keep: ``"all"``; ``"saving"``, the sites that save both MACs and bytes; or
            ``"measured"``, the sites whose layers run faster with their reduction in ONNX Runtime
            (one thread, the batch of the example inputs).
        kernel: for ``"measured"``: whether LEAN nodes run by :func:`~lean_fx.onnx_kernel`; None is
            where it is built.

    Returns:
        The sites to keep, and the layers of the others.

    Raises:
        ArgumentError: the shapes are not known.
        MissingDependencyError: onnx or onnxruntime is not installed, for ``"measured"``, or the
            kernel is asked for and is not built.
    """
    if keep == "all":
        return tuple(sites), []
    nodes = {node.name: node for node in graph_module.graph.nodes}
    if any(facts(value).shape is None for site in sites for value, _ in _calls(site, nodes)):
        raise ArgumentError(f"keep={keep!r} needs the shapes of all values; give example_inputs")
    if keep == "saving":
        results = [_saving(site, graph_module, nodes) for site in sites]
    else:
        results = _all_measured(sites, reduction, graph_module, nodes, kernel)
    kept: list[Site] = []
    dropped: list[LeftAlone] = []
    for site, (pays, figures) in zip(sites, results, strict=True):
        if pays:
            note = "; ".join(filter(None, (site.note, figures)))
            kept.append(dataclasses.replace(site, note=note))
        else:
            reason = SkipReason("keep", figures)
            dropped += [LeftAlone(each.layer, each.kind, reason) for each in site.consumers]
    return tuple(kept), dropped


def _calls(site: Site, nodes: dict[str, Node]) -> list[tuple[Node, list[tuple[Consumer, Node]]]]:
    """The values that a site reduces, and the calls of layers that read each reduction."""
    if site.value:
        return [(nodes[site.value], [(each, nodes[each.node]) for each in site.consumers])]
    (consumer,) = site.consumers
    calls = [node for node in nodes.values() if node.target == consumer.layer]
    return [(node.all_input_nodes[0], [(consumer, node)]) for node in calls]


def _saving(site: Site, graph_module: GraphModule, nodes: dict[str, Node]) -> tuple[bool, str]:
    """Whether a site saves MACs and bytes, and the figures."""
    assert site.out_channels is not None
    values = _calls(site, nodes)
    positions = sum(_numel(value) for value, _ in values) // site.in_channels
    calls = [call for _, calls in values for call in calls]
    layer = graph_module.get_submodule(site.layers[0])
    size = first_weight(layer).element_size()
    share = 1 - site.out_channels / site.in_channels
    macs_saved = share * sum(_macs(*call, graph_module) for call in calls)
    macs_spent = (site.in_channels if site.macs is None else site.macs) * positions
    read = sum(
        len(calls) * _numel(value) + sum(consumer.weights for consumer, _ in calls)
        for value, calls in values
    )
    bytes_saved = share * size * read
    bytes_spent = size * positions * (site.in_channels + site.out_channels)
    figures = (
        f"saves {macs_saved / 1e6:.3g} M MACs and {bytes_saved / 1e6:.3g} MB, spends "
        f"{macs_spent / 1e6:.3g} M and {bytes_spent / 1e6:.3g} MB"
    )
    return macs_saved > macs_spent and bytes_saved > bytes_spent, figures


def _macs(consumer: Consumer, node: Node, graph_module: GraphModule) -> int:
    """The multiply-adds with the input; a recurrent layer has others, which stay as they are."""
    layer = graph_module.get_submodule(consumer.layer)
    read = _numel(node.all_input_nodes[0])
    kind = known_kind_of(layer)
    if kind.recurrent:
        return read // input_channels(layer) * consumer.weights
    return kind.macs(layer, read, _numel(node))


def _numel(node: Node) -> int:
    shape = facts(node).shape
    assert shape is not None
    return torch.Size(shape).numel()


def _all_measured(
    sites: Sequence[Site],
    reduction: str | ReductionFactory,
    graph_module: GraphModule,
    nodes: dict[str, Node],
    kernel: bool | None,
) -> list[tuple[bool, str]]:
    """What :func:`_measured` says of each site; it takes seconds a site."""
    from lean_fx.measure.progress import counted_bar  # loaded when it is used

    results = []
    with counted_bar("timing sites", len(sites)) as show:
        for number, site in enumerate(sites, start=1):
            with torch.random.fork_rng(devices=[]):
                results.append(_measured(site, reduction, graph_module, nodes, kernel))
            _LOGGER.info("site %d of %d: %s: %s", number, len(sites), site.value, results[-1][1])
            show(number)
    return results


def _measured(
    site: Site,
    reduction: str | ReductionFactory,
    graph_module: GraphModule,
    nodes: dict[str, Node],
    kernel: bool | None,
) -> tuple[bool, str]:
    """Whether the layers of a site are faster with its reduction, and the figures."""
    # Imported here, so that `import lean_fx` loads neither the exporter nor the timer.
    from lean_fx.export.exporting import export_onnx
    from lean_fx.measure.timing import time_onnx

    bare, own = _alone(site, graph_module)
    reduced = Plan("site", (own,), reduction=reduction).apply_to_graph(copy.deepcopy(bare))
    for module in reduced.modules():
        if isinstance(module, LeanReduction):
            module.nonnegative |= site.nonnegative  # as proved of the whole graph
    arms = {"without": bare, "with": reduced}
    shape = facts(_calls(site, nodes)[0][0]).shape
    assert shape is not None
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    inputs = inputs.abs() if site.nonnegative else inputs
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in arms}
        for name, arm in arms.items():
            arm.to(device="cpu", dtype=torch.float32)
            export_onnx(arm, files[name], inputs, batch="static", tolerance=None)
        taken = time_onnx(files, inputs.numpy(), rounds=15, kernel=kernel)
    before, after = taken["without"].median_ms, taken["with"].median_ms
    how = " by the kernel" if taken["with"].kernel else ""
    return after < before, f"measured {after:.3g} ms with it{how}, {before:.3g} ms without"


def _alone(site: Site, graph_module: GraphModule) -> tuple[GraphModule, Site]:
    """A module with only the layers of a site, whose input is the site's value; and its site."""
    graph = Graph()
    value = graph.placeholder("value")
    calls: list[Node] = []
    consumers: list[Consumer] = []
    for consumer in site.consumers:
        source: Node = value
        path: tuple[str, ...] = ()
        if consumer.path:
            source = graph.call_function(torch.flatten, (value, 1))
            path = (source.name,)
        calls.append(graph.call_module(consumer.layer, (source,)))
        consumers.append(dataclasses.replace(consumer, node=calls[-1].name, path=path))
    graph.output(tuple(calls))
    bare = copy.deepcopy(GraphModule(graph_module, graph, "site"))
    own = dataclasses.replace(
        site, value=value.name, packed=False, consumers=tuple(consumers), name=value.name
    )
    return bare, own
