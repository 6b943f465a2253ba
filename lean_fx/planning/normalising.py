"""Rewrite a graph so that hidden layers become visible; keep only the rewritings in use.

Stacks of recurrent layers and attention are split into their layers. Parameters that multiply
values become layers. This happens on a copy of the captured graph, and the plan is made on that
copy. The plan keeps the rewritings that one of its sites needs; everything else in it goes by its
name in the captured graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule

from lean_fx.graph.context import GraphContext, owners_of
from lean_fx.graph.rewriting import replaced_names
from lean_fx.graph.sites import Consumer, Site
from lean_fx.passes import ModularizeWeights, Pipeline, SplitLayers
from lean_fx.passes.find_consumers import NO_PART_REDUCED, skip_reason_of
from lean_fx.passes.modularize_weights import weights_of_products
from lean_fx.passes.split_layers import splitter_of
from lean_fx.planning.options import Options, named_by_user, skip_reason
from lean_fx.skip_reason import LeftAlone, SkipReason

_HIDDEN = SkipReason("form", "only form='graph' changes the forward that applies it")


@dataclass(frozen=True)
class Rewritings:
    """The names of the layers to split, and of the parameters to turn into layers."""

    split_layers: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()

    @classmethod
    def of(cls, captured: GraphModule, options: Options) -> Rewritings:
        """Everything that a graph allows, except what the user's skip and filter_fn exclude."""
        graph = GraphContext.of(captured)
        calls = [str(node.target) for node in captured.graph.nodes if node.op == "call_module"]
        split = tuple(
            name
            for name in dict.fromkeys(calls)
            if graph.calls[id(graph.modules[name])] == 1
            and _may_be_split(name, graph.modules[name], graph.owners, options)
        )
        return cls(split, tuple(weights_of_products(captured)))

    @classmethod
    def of_module(
        cls, model: nn.Module, options: Options, only: Collection[str] | None = None
    ) -> Rewritings:
        """The layers of a model without a graph that can be split, with the same exceptions."""
        owners = owners_of(model)
        split = (
            name
            for name, layer in model.named_modules()
            if name and (only is None or name in only)
            if _may_be_split(name, layer, owners, options)
        )
        return cls(tuple(split))

    @property
    def names(self) -> tuple[str, ...]:
        """All names."""
        return (*self.split_layers, *self.weights)

    def apply(self, graph_module: GraphModule) -> None:
        """Rewrite a graph in place."""
        Pipeline([ModularizeWeights(self.weights), SplitLayers(self.split_layers)])(graph_module)

    def used_by(self, sites: tuple[Site, ...]) -> Rewritings:
        """The rewritings that the sites need; a stack's first layer can do without the split."""
        reduced = {layer for site in sites for layer in site.layers}
        split = [
            name for name in self.split_layers if any(_is_inside(layer, name) for layer in reduced)
        ]
        return Rewritings(tuple(split), tuple(name for name in self.weights if name in reduced))

    def without_weights(self, sites: Iterable[Site]) -> tuple[list[Site], list[LeftAlone]]:
        """The sites without the layers that were parameters, and these layers as left alone."""
        kept, hidden = [], []
        for site in sites:
            inside = [each for each in site.consumers if each.layer in self.weights]
            hidden += [LeftAlone(each.layer, each.kind, _HIDDEN) for each in inside]
            consumers = tuple(each for each in site.consumers if each not in inside)
            if consumers:
                kept.append(dataclasses.replace(site, consumers=consumers))
        return kept, hidden

    def without(self, others: Rewritings) -> Rewritings:
        """The rewritings that are not among others."""
        return Rewritings(
            tuple(name for name in self.split_layers if name not in others.split_layers),
            tuple(name for name in self.weights if name not in others.weights),
        )

    def undo(
        self,
        graph_module: GraphModule,
        sites: tuple[Site, ...],
        left: list[LeftAlone],
        options: Options,
    ) -> tuple[tuple[Site, ...], list[LeftAlone]]:
        """Name sites and layers as if these rewritings had not happened.

        Args:
            graph_module: the rewritten graph.
            sites: of that graph; none of them needs these rewritings.
            left: the layers left alone.
            options: the user's.

        Returns:
            The sites, with the names of the captured graph, and the layers left alone: the layers
            of a stack that stays whole are left alone within it.
        """
        names = replaced_names(graph_module.graph, self.names)
        wishes = {
            name: named_by_user(name, options.modules[name], options) for name in self.split_layers
        }
        kept = []
        refused: list[LeftAlone] = []
        for site in sites:
            consumers = [_undone(each, self, names) for each in site.consumers]
            unwanted = [each for each in consumers if wishes.get(each.layer)]
            refused += [
                LeftAlone(each.layer, each.kind, reason)
                for each in unwanted
                if (reason := wishes[each.layer])
            ]
            wanted = tuple(each for each in consumers if each not in unwanted)
            if wanted:
                value = names.get(site.value, site.value)
                kept.append(dataclasses.replace(site, value=value, consumers=wanted))
        for name in self.split_layers:
            layer = options.modules[name]
            if isinstance(layer, nn.MultiheadAttention):
                reason = wishes[name] or NO_PART_REDUCED
                refused.append(LeftAlone(name, type(layer).__name__, reason))
        return tuple(kept), [*_outside(left, self), *refused, *_inside(left, self)]


def _may_be_split(
    name: str, layer: nn.Module, owners: Mapping[int, list[str]], options: Options
) -> bool:
    return (
        splitter_of(layer) is not None
        and not skip_reason_of(layer, owners)
        and not skip_reason(name, layer, options)
        and _passes_inside(name, layer, options)
    )


def _outside(left: list[LeftAlone], unused: Rewritings) -> list[LeftAlone]:
    """The layers outside the stacks; the first layer of a stack stands for the stack."""
    first = {f"{name}.0": name for name in unused.split_layers}
    return [
        dataclasses.replace(each, layer=first.get(each.layer, each.layer))
        for each in left
        if not any(_is_inside(each.layer, name) for name in unused.split_layers)
    ]


def _inside(left: list[LeftAlone], unused: Rewritings) -> list[LeftAlone]:
    """The layers inside a stack or attention that stays whole."""
    return [
        dataclasses.replace(
            each, reason=SkipReason("within_stack", f"stays within {name}: {each.reason}")
        )
        for name in unused.split_layers
        for each in left
        if _is_inside(each.layer, name)
    ]


def _undone(consumer: Consumer, unused: Rewritings, names: dict[str, str]) -> Consumer:
    stack, _, place = consumer.layer.rpartition(".")
    return dataclasses.replace(
        consumer,
        layer=stack if place == "0" and stack in unused.split_layers else consumer.layer,
        node=names.get(consumer.node, consumer.node),
        path=tuple(names.get(step, step) for step in consumer.path),
    )


def _is_inside(layer: str, stack: str) -> bool:
    """Whether a layer is inside a split one, but not its first, which reads the stack's input."""
    return layer.startswith(f"{stack}.") and layer != f"{stack}.0"


def _passes_inside(name: str, layer: nn.Module, options: Options) -> bool:
    """Whether the user's filter_fn accepts a layer, or a later layer of a stack."""
    count = int(getattr(layer, "num_layers", 1))
    names = (name, *(f"{name}.{index}" for index in range(1, count)))
    return options.filter_fn is None or any(options.filter_fn(layer, each) for each in names)
