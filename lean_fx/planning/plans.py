"""The plan: what to reduce, where, to how many channels, and why the rest is left alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from torch.fx import GraphModule

from lean_fx.capture.capturing import capture, clone_graph, unfused_clone
from lean_fx.capture.example_inputs import as_inputs
from lean_fx.errors import PlanError
from lean_fx.graph.calls import modules_by_name
from lean_fx.graph.site_reductions import check_registered
from lean_fx.locks import rebuilding
from lean_fx.passes import (
    InferSign,
    InsertReductions,
    ModularizeWeights,
    Pipeline,
    Site,
    SplitLayers,
    SwapLayers,
    TrackWrites,
)
from lean_fx.passes.split_layers import split_modules
from lean_fx.passes.swap_layers import proved_layers, swap_layers
from lean_fx.reduction.registry import ReductionFactory
from lean_fx.skip_reason import LeftAlone

#: The key of a plan in the ``meta`` of a reduced model and in the metadata of its ONNX file.
PLAN = "lean_fx.plan"
#: What leanify makes.
Form = Literal["graph", "module"]


@dataclass(frozen=True)
class Plan:
    """Everything that leanify would do. ``print(plan)`` shows it as a table.

    The table's MACs are the multiply-adds of the reduction at one position; they are more if the
    sign of the value is unknown. A reduction before a recurrent layer saves only the products with
    the input. For a grouped convolution, channels are counted in one group.

    Attributes:
        model: the name of the model's class.
        sites: the values to reduce, and the layers that share each reduction.
        left_alone: every other conv, linear, recurrent and attention layer, with the reason.
        reduction: a registered name, or a factory.
        parameters: the number of parameters of the model, before.
        split_layers: the stacks of recurrent layers and the attention layers to split first
            (:class:`~lean_fx.passes.SplitLayers`): into ``<stack>.0``, ``<stack>.1``, ..., and into
            ``<attention>.in_proj`` (or ``q_proj``, ``k_proj``, ``v_proj``) and ``out_proj``.
        weights: the parameters outside any layer to turn into layers first
            (:class:`~lean_fx.passes.ModularizeWeights`).
        traced: whether the sites come from a graph of the model. If not, they come from one
            observed run, and have no values.
        form: of the result: ``"graph"``, a GraphModule whose reductions are nodes; or
            ``"module"``, the model's own class, in which each layer reduces its own input.
        sensitivity: how far noise on the inputs moves the outputs (:func:`lean_fx.sensitivity`) of
            the model, and of the result with the weights that it was made with; None where it was
            not measured.

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
    form: Form = "graph"
    sensitivity: tuple[float, float] | None = field(default=None, compare=False)

    def apply(self, model: nn.Module, example_inputs: Any = None) -> nn.Module:
        """Make the reduced model.

        Args:
            model: the model that the plan was made from, or another instance of it; it is copied.
            example_inputs: the inputs that the plan was made with. A model that branches on sizes
                or has optional inputs needs them.

        Returns:
            An ordinary module, a GraphModule or of the model's class as ``form`` says, with the
            plan in its ``meta["lean_fx.plan"]``; deepcopy keeps that, pickle of a GraphModule does
            not.

        Raises:
            ArgumentError: ``model`` is not a module that can be captured, or the example inputs are
                not a tensor, a tuple or a mapping.
            CaptureError: the model cannot be copied or traced; or it branches on sizes, and there
                are no example inputs.
            PlanError: the plan does not fit the model.
        """
        self.check()
        if isinstance(model, nn.Module):
            check_registered(model, self.sites)
        with rebuilding(runs=example_inputs is not None):
            inputs = () if example_inputs is None else as_inputs(example_inputs, model)
            if self.form == "graph":
                return self.apply_to_graph(capture(model, inputs))
            shown = capture(model, inputs, purpose="facts") if self.traced else None
            return self.apply_to_copy(model, shown)

    def check(self) -> None:
        """Check that every layer is at one site.

        Raises:
            PlanError: one is at two.
        """
        seen: set[str] = set()
        for site in self.sites:
            if twice := seen.intersection(site.layers):
                raise PlanError(f"plan: layer {min(twice)!r} is at two sites; leave one out")
            seen.update(site.layers)

    def apply_to_copy(self, model: nn.Module, captured: GraphModule | None) -> nn.Module:
        """Like :meth:`apply` for ``form="module"``.

        Args:
            model: it is copied.
            captured: the model's graph, which shows the signs of values; None without one. It
                stays as it is.
        """
        if self.weights:
            raise PlanError(
                f"plan: form='module' keeps forward as it is, so {self.weights[0]!r} cannot become "
                "a layer; make the plan anew with form='module'"
            )
        with rebuilding():
            proved: frozenset[str] = frozenset()
            if captured is not None:
                shown = clone_graph(captured)
                split = SplitLayers(self.split_layers, self.named())
                Pipeline([split, TrackWrites(), InferSign()])(shown)
                InsertReductions(self.sites, self.reduction).requires(shown)
                proved = proved_layers(shown)
            copied = unfused_clone(model)
            split_modules(copied, self.split_layers, self.named())
            swap_layers(copied, self.sites, self.reduction, proved=proved)
        self._as_made(copied).attach_to(copied)
        return copied

    def apply_to_graph(self, graph_module: GraphModule) -> GraphModule:
        """Like :meth:`apply`, but in place, on a model that is captured already."""
        self._check_depths(graph_module)
        swap = SwapLayers(self.sites, self.reduction)
        insert = InsertReductions(self.sites, self.reduction)
        split = SplitLayers(self.split_layers, self.named())
        rewrite = ModularizeWeights(self.weights), split
        with rebuilding():
            Pipeline([*rewrite, TrackWrites(), InferSign(), swap, insert])(graph_module)
        self._as_made(graph_module).attach_to(graph_module)
        return graph_module

    def attach_to(self, lean: nn.Module) -> None:
        """Store the plan in a reduced model, where :func:`lean_fx.plan_of` finds it."""
        held = getattr(lean, "meta", None)
        if held is None:
            vars(lean)["meta"] = {PLAN: self}  # a class may refuse attributes
        elif isinstance(held, dict):
            held[PLAN] = self
        else:  # the model has a meta of its own
            lean.__dict__[PLAN] = self

    def _as_made(self, lean: nn.Module) -> Plan:
        """The plan with the signs that were proved of the model that it was applied to."""
        modules = modules_by_name(lean)
        sites = []
        for site in self.sites:
            layer = modules[site.layers[0]]
            made = modules.get(f"reductions.{site.name}", getattr(layer, "reduction", None))
            if site.nonnegative and not getattr(made, "nonnegative", True):
                macs = getattr(made, "macs_per_position", None)
                site = dataclasses.replace(site, nonnegative=False, macs=macs)
            sites.append(site)
        return dataclasses.replace(self, sites=tuple(sites))

    def _check_depths(self, graph_module: GraphModule) -> None:
        """Check that every stack to split has as many layers as the plan names."""
        modules, names = modules_by_name(graph_module), self.named()
        for stack in self.split_layers:
            found = getattr(modules.get(stack), "num_layers", 1)
            planned = sum(name.rpartition(".")[0] == stack for name in names)
            if found > 1 and found != planned:  # SplitLayers refuses a layer that is not a stack
                raise PlanError(
                    f"plan: layer {stack!r} has {found} layers, but the plan names {planned}; "
                    "make the plan anew from this model"
                )

    def named(self) -> set[str]:
        """The names of all layers in the plan."""
        reduced = {layer for site in self.sites for layer in site.layers}
        return reduced | {each.layer for each in self.left_alone}

    def to_json(self) -> str:
        """The plan as JSON.

        Raises:
            PlanError: the reduction is a class without a registered name.
        """
        from lean_fx.planning.plan_json import plan_to_json  # loaded when it is used

        return plan_to_json(self)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read what :meth:`to_json` wrote.

        Raises:
            PlanError: the text is not a plan, its version is unknown, or its reduction is not
                registered.
        """
        from lean_fx.planning.plan_json import plan_from_json  # loaded when it is used

        return plan_from_json(text)

    def __str__(self) -> str:
        """The plan as a table of plain text."""
        from lean_fx.planning.plan_table import plan_table  # loaded when it is used

        return plan_table(self)
