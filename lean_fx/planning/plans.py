"""The plan: what to reduce, where, to how many channels, and why the rest is left alone."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from lean_fx.capture.capturing import capture, unfused_clone
from lean_fx.capture.example_inputs import as_inputs
from lean_fx.errors import ArgumentError, PlanError
from lean_fx.graph.site_reductions import check_registered
from lean_fx.locks import SHARED_STATE
from lean_fx.passes import (
    Consumer,
    InferSign,
    InsertReductions,
    ModularizeWeights,
    Pipeline,
    Site,
    SplitLayers,
    SwapLayers,
    TrackWrites,
)
from lean_fx.passes.swap_layers import swap_layer
from lean_fx.reduction.base import check_channels
from lean_fx.reduction.registry import ReductionFactory, reduction_name, reductions, registered_name
from lean_fx.skip_reason import SkipReason

#: The key of a plan in the ``meta`` of a reduced model and in the metadata of its ONNX file.
PLAN = "lean_fx.plan"
_VERSION = 2
_MOST_AXES = 64  # as most of torch's functions take


@dataclass(frozen=True)
class LeftAlone:
    """A layer that is not reduced, or a parameter that multiplies values outside any layer.

    Attributes:
        layer: its qualified name; for a functional call without a parameter, the node's name.
        kind: its type, such as ``"Conv2d"``, or the function, such as ``"einsum"``.
        reason: why; a code for programs and a line for people.

    Example:
        >>> import lean_fx
        >>> (left,) = lean_fx.plan(nn.Sequential(nn.Conv2d(3, 50, 3))).left_alone
        >>> left.layer, left.reason.code
        ('0', 'min_channels')
    """

    layer: str
    kind: str
    reason: SkipReason


@dataclass(frozen=True)
class Plan:
    """Everything that leanify would do. ``print(plan)`` shows it as a table.

    The table's MACs are the multiply-adds of the reduction at one position; they are more if the
    sign of the value is unknown. A reduction before a recurrent layer saves only the products with
    the input. For a grouped convolution, channels are counted in one group.

    Attributes:
        model: the name of the model's class.
        sites: the values to reduce, and the layers that share each reduction.
        left_alone: every other conv, linear, recurrent and attention layer, with its reason.
        reduction: a registered name, or a factory.
        parameters: how many the model has before.
        split_layers: the stacks of recurrent layers and the attention layers to split first
            (:class:`~lean_fx.passes.SplitLayers`): into ``<stack>.0``, ``<stack>.1``, ..., and into
            ``<attention>.in_proj`` (or ``q_proj``, ``k_proj``, ``v_proj``) and ``out_proj``.
        weights: the parameters outside any layer to turn into layers first
            (:class:`~lean_fx.passes.ModularizeWeights`).
        traced: whether the model can be captured as a graph. If not, each layer reduces its own
            input, and the model keeps its class.

    Example:
        >>> import lean_fx
        >>> model = nn.Sequential(nn.Conv2d(3, 50, 3), nn.ReLU(), nn.Conv2d(50, 20, 3))
        >>> plan = lean_fx.plan(model, channels=10)
        >>> print(plan)
        Plan for Sequential: 1 reduction (lean) before 1 of 2 layers
        their weights: 9,000 -> 1,800, of 10,420 parameters in all
        value  sign  MACs  layer  type    channels  weights         note
        _1     >= 0  200   2      Conv2d  50 -> 10  9,000 -> 1,800
        left alone
        0  Conv2d  in_channels=3 is below min_channels=16
        >>> Plan.from_json(plan.to_json()) == plan
        True
    """

    model: str
    sites: tuple[Site, ...]
    left_alone: tuple[LeftAlone, ...] = ()
    reduction: str | ReductionFactory = "lean"
    parameters: int = 0
    split_layers: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    traced: bool = True

    def apply(self, model: nn.Module, example_inputs: Any = None) -> nn.Module:
        """Make the reduced model.

        Args:
            model: the model that the plan was made from, or another instance of it; it is copied.
            example_inputs: the inputs that the plan was made with. A model that branches on sizes
                or has optional inputs needs them.

        Returns:
            An ordinary module (a GraphModule, if the model can be traced) with the plan in its
            ``meta["lean_fx.plan"]``; deepcopy keeps that, pickle of a GraphModule does not.

        Raises:
            ArgumentError: ``model`` is not a module that can be captured, or the example inputs are
                neither a tensor nor a tuple.
            CaptureError: the model cannot be copied or traced; or it branches on sizes, and there
                are no example inputs.
            PlanError: the plan does not fit the model.
        """
        if isinstance(model, nn.Module):
            check_registered(model, self.sites)
        with (
            SHARED_STATE,
            torch.inference_mode(False),
        ):  # tensors made in inference mode cannot be trained
            if self.traced:
                given = example_inputs is not None
                inputs = as_inputs(example_inputs, model) if given else ()
                return self.apply_to_graph(capture(model, inputs))
            copied = unfused_clone(model)
            for site in self.sites:
                swap_layer(copied, site, self.reduction, nonnegative=False)
        held = getattr(copied, "meta", None)
        if held is None:
            copied.meta = {PLAN: self}  # type: ignore[assignment]
        elif isinstance(held, dict):
            held[PLAN] = self
        else:  # the model has a meta of its own
            copied.__dict__[PLAN] = self
        return copied

    def apply_to_graph(self, graph_module: GraphModule) -> GraphModule:
        """Like :meth:`apply`, but in place, on a model that is captured already."""
        self._check_depths(graph_module)
        swap = SwapLayers(self.sites, self.reduction)
        insert = InsertReductions(self.sites, self.reduction)
        rewrite = ModularizeWeights(self.weights), SplitLayers(self.split_layers)
        with SHARED_STATE, torch.inference_mode(False):
            Pipeline([*rewrite, TrackWrites(), InferSign(), swap, insert])(graph_module)
        graph_module.meta[PLAN] = self
        return graph_module

    def _check_depths(self, graph_module: GraphModule) -> None:
        """Check that every stack to split has as many layers as the plan names."""
        modules = dict(graph_module.named_modules())
        names = {layer for site in self.sites for layer in site.layers}
        names |= {each.layer for each in self.left_alone}
        for stack in self.split_layers:
            found = getattr(modules.get(stack), "num_layers", 1)
            planned = sum(name.rpartition(".")[0] == stack for name in names)
            if found > 1 and found != planned:  # SplitLayers refuses a layer that is not a stack
                raise PlanError(
                    f"plan: layer {stack!r} has {found} layers, but the plan names {planned}; "
                    "make the plan anew from this model"
                )

    def to_json(self) -> str:
        """The plan as JSON.

        Raises:
            PlanError: the reduction is a class without a registered name.
        """
        name = registered_name(self.reduction)
        if name is None:
            raise PlanError(
                f"plan: the reduction {reduction_name(self.reduction)} has no registered name; "
                "give it one with lean_fx.register_reduction('my_name', factory)"
            )
        content = {"format": PLAN, "version": _VERSION}
        content |= dataclasses.asdict(dataclasses.replace(self, reduction=name))
        return json.dumps(content, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read what :meth:`to_json` wrote.

        Raises:
            PlanError: the text is not a plan, its version is unknown, or its reduction is not
                registered.
        """
        try:
            content: dict[str, Any] = json.loads(text)
            form, version = content.pop("format"), content.pop("version")
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise PlanError(
                f"plan: the text is not a plan in JSON ({error}); give Plan.to_json()"
            ) from error
        if (form, version) != (PLAN, _VERSION):
            raise PlanError(
                f"plan: format {form!r} version {version!r} is not {PLAN!r} version {_VERSION}; "
                "make the plan anew"
            )
        try:
            sites = [_site_from(entry) for entry in content.pop("sites")]
            _check_different(sites)
            left = [_left_alone_from(entry) for entry in content.pop("left_alone")]
            split, weights = (
                _names(key, content.pop(key, ())) for key in ("split_layers", "weights")
            )
            plan = Plan(
                sites=tuple(sites),
                left_alone=tuple(left),
                split_layers=split,
                weights=weights,
                **content,
            )
            for part in (plan, *left):
                _check_types(part)
        except (TypeError, KeyError, AttributeError, ArgumentError) as error:
            raise PlanError(
                f"plan: a part is missing or unknown ({error}); make it anew"
            ) from error
        if plan.reduction not in reductions():
            raise PlanError(
                f"plan: the reduction {plan.reduction!r} is not registered; call "
                f"lean_fx.register_reduction({plan.reduction!r}, factory) first"
            )
        return plan

    def __str__(self) -> str:
        """The plan as a table of plain text."""
        count = sum(len(site.consumers) for site in self.sites)
        layers = sum(each.reason.code != "within_stack" for each in self.left_alone) + count
        plural = "" if len(self.sites) == 1 else "s"
        head = (
            f"Plan for {self.model}: {len(self.sites)} reduction{plural} "
            f"({reduction_name(self.reduction)}) before {count} of {layers} "
            "layers"
        )
        lines = [head]
        if self.sites:
            before = sum(consumer.weights for site in self.sites for consumer in site.consumers)
            after = sum(_after(c, site) for site in self.sites for c in site.consumers)
            lines.append(
                f"their weights: {before:,} -> {after:,}, of {self.parameters:,} parameters in all"
            )
        if self.split_layers:
            lines.append(f"split into single layers: {', '.join(self.split_layers)}")
        if self.weights:
            lines.append(f"parameters made layers: {', '.join(self.weights)}")
        if self.sites:
            header = ("value", "sign", "MACs", "layer", "type", "channels", "weights", "note")
            lines += _aligned([header, *(row for site in self.sites for row in _rows(site))])
        if self.left_alone:
            lines.append("left alone")
            lines += _aligned(
                [(each.layer, each.kind, each.reason.text) for each in self.left_alone]
            )
        return "\n".join(lines)


def _rows(site: Site) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for consumer in site.consumers:
        rows.append(
            (
                "" if rows else site.value or "its input",
                "" if rows else (">= 0" if site.nonnegative else "any"),
                "" if rows or site.macs is None else f"{site.macs:,}",
                consumer.layer,
                consumer.kind,
                f"{site.in_channels} -> {site.out_channels}"
                + (f" in {site.groups} groups" if site.groups > 1 else ""),
                f"{consumer.weights:,} -> {_after(consumer, site):,}",
                "" if rows else site.note,
            )
        )
    return rows


def _after(consumer: Consumer, site: Site) -> int:
    return consumer.weights * (site.out_channels or 0) // site.in_channels


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _check_types(part: Any) -> None:
    """Check the plain fields of a dataclass by their annotations."""
    kinds = {"str": str, "int": int, "int | None": int | None, "float": float | int, "bool": bool}
    kinds["str | None"] = str | None
    for field in dataclasses.fields(part):
        kind, value = kinds.get(str(field.type)), getattr(part, field.name)
        if kind is not None and (not isinstance(value, kind) or type(value) is bool is not kind):
            raise TypeError(f"{field.name}={value!r} is not {field.type}")


def _names(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(n, str) and n for n in value):
        raise TypeError(f"{key}= is not a list of names of layers")
    return tuple(value)


def _left_alone_from(entry: dict[str, Any]) -> LeftAlone:
    return LeftAlone(**{**entry, "reason": SkipReason(**entry["reason"])})


def _check_different(sites: list[Site]) -> None:
    seen: set[tuple[str, Consumer]] = set()
    for site in sites:
        for consumer in site.consumers:
            if (site.value, consumer) in seen:
                raise TypeError(f"layer {consumer.layer!r} reads {site.value!r} at two sites")
            seen.add((site.value, consumer))


def _site_from(entry: dict[str, Any]) -> Site:
    consumers = [
        Consumer(**{**each, "path": tuple(each["path"])}) for each in entry.pop("consumers")
    ]
    site = Site(consumers=tuple(consumers), **entry)
    for part in (site, *consumers):
        _check_types(part)
    texts = [site.name, *(t for c in consumers for t in (c.layer, *c.path))]
    if site.value:
        texts += [consumer.node for consumer in consumers]
    elif len(consumers) != 1:
        raise TypeError("a site without a value has one layer")
    if not consumers or not all(isinstance(text, str) and text for text in texts):
        raise TypeError(f"site {site.value!r} has no consumers, or a part without a name")
    check_channels("site", site.in_channels, site.out_channels or 0)
    if site.groups < 1:
        raise TypeError(f"site {site.value!r} has groups={site.groups}")
    if not -_MOST_AXES <= site.dim < _MOST_AXES:
        raise TypeError(f"site {site.value!r} has dim={site.dim}, which no tensor has")
    if not 0 <= site.rms < math.inf:
        raise TypeError(f"site {site.value!r} has rms={site.rms}")
    return site
