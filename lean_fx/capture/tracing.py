"""torch.fx's tracer, extended for models as people write them."""

from __future__ import annotations

import inspect
import itertools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.fx import Graph, Node, Proxy, Tracer, _symbolic_trace
from torch.fx.proxy import TraceError
from torch.nn.utils import rnn

from lean_fx.capture.arguments import (
    arguments_of,
    called_by_position,
    checked_arguments,
    is_own_container,
)
from lean_fx.capture.guards import counting_items
from lean_fx.capture.in_place import write_in_place
from lean_fx.capture.own_code import OWN_CALL, own_call
from lean_fx.capture.proxies import KeepsData, WeightProxy
from lean_fx.capture.questions import AskedTracer, answering, converting_sizes
from lean_fx.capture.reads import AttributeReads, ParameterReads
from lean_fx.capture.refusals import refusing_functions
from lean_fx.capture.side_effects import (
    Draws,
    SideEffect,
    StateSnapshot,
    autocasting,
    backup_state,
    may_have_gradient,
)
from lean_fx.graph.captured import update_record
from lean_fx.graph.model_code import globals_of, package_of
from lean_fx.graph.patching import patching, without_caches
from lean_fx.graph.reachable import leaving_state
from lean_fx.layers.attention import AttentionHeads
from lean_fx.layers.kinds import kind_of
from lean_fx.layers.modes import ByMode, InMode
from lean_fx.passes.track_writes import written_by
from lean_fx.reduction.packed import SequenceDropout, layer_states, with_data
from lean_fx.reduction.registry import is_reduction

_TORCHS_TRACER = Tracer()
_LEAVES = (SequenceDropout, AttentionHeads, ByMode, InMode)
# Functions that become nodes; the tracer never enters them. A graph that torch.fx itself traced
# with concrete_args holds _assert_is_none.
_NODES = (
    *(rnn.pack_padded_sequence, rnn.pad_packed_sequence, rnn.pack_sequence, rnn.pad_sequence),
    *(rnn.unpack_sequence, rnn.unpad_sequence, with_data, layer_states),
    _symbolic_trace._assert_is_none,
    *(torch.finfo, torch.iinfo),  # they take a proxy for a dtype, whichever its memory looks like
)


def is_leaf(module: nn.Module) -> bool:
    """Whether a call of a module becomes one node wherever it is: it is torch's, or a layer.

    Example:
        >>> is_leaf(nn.ReLU()), is_leaf(nn.Sequential())
        (True, False)
    """
    ours = kind_of(module) or isinstance(module, _LEAVES) or is_reduction(module)
    return bool(ours) or _TORCHS_TRACER.is_leaf_module(module, "")


class LeanTracer(AskedTracer):
    """torch.fx's tracer, with these differences.

    1. Subclasses of conv, linear and recurrent layers, and registered layers, are leaves. Otherwise
       they would dissolve into functional calls, which no pass would recognise.
    2. Buffers are nodes, so that what forward computes from them is computed at every call.
    3. Functions that pack and pad sequences are nodes, since they need real lengths; so are
       torch.finfo and torch.iinfo.
    4. The shape of a parameter is a constant.
    5. A forward with side effects (:mod:`lean_fx.capture.side_effects`) raises.
    6. Modules whose forward cannot be traced may become leaves.
    7. Inputs that are None keep their names.
    8. Modules that other threads call during the trace run as usual.

    Args:
        leaves: names of modules that are leaves, whatever their type.
        leaf_on_failure: whether a module whose forward cannot be traced becomes a leaf, the
            innermost first. Its name is added to ``leaves``, but the graph still holds nodes of
            the failed attempt: trace anew.

    Attributes:
        as_nodes: the functions that become nodes.
    """

    as_nodes: tuple[Callable[..., Any], ...] = _NODES

    def __init__(
        self, leaves: frozenset[str] = frozenset(), *, leaf_on_failure: bool = False
    ) -> None:
        super().__init__(autowrap_functions=self.as_nodes)
        self._autowrap_search += [rnn, _symbolic_trace, torch]  # for calls by the module's name
        self.leaves = leaves
        self.leaf_on_failure = leaf_on_failure
        self.reads = AttributeReads()
        self.computing = False
        self._thread = threading.get_ident()
        self._names: dict[int, str] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._autocast: tuple[Any, ...] = ()
        self._learned: set[Node] = set()
        self._layers: set[int] = set()  # the ids of the modules that are leaves by their type

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> Graph:
        """Trace a module, and record in the graph what forward has read of its attributes."""
        self._parameters = dict(root.named_parameters())
        self.held = {**dict(root.named_buffers()), **self._parameters}
        self._names = {id(tensor): name for name, tensor in self.held.items()}
        self._autocast = autocasting()
        self._proxies: dict[str, Proxy] = {}
        self._layers = {id(each) for each in root.modules() if is_leaf(each)}
        watched = [each for name, each in root.named_modules() if self._looks_into(each, name)]
        self._draws = Draws(lambda: self.computing)
        homes = globals_of(watched)
        self.homes = {id(home) for home in homes}
        patches = [*counting_items(homes), *converting_sizes(watched), *without_caches(root)]
        patches += answering(self, homes)
        with (
            torch.enable_grad(),
            self.reads.watching(watched),
            refusing_functions(homes, lambda: self.computing),
            patching(patches),
            leaving_state(root),
            self._draws,
        ):
            before = StateSnapshot.of(root, self._draws)
            with ParameterReads(self):
                graph = super().trace(root, concrete_args)
            before.check()
        write_in_place(graph, dict(root.named_modules()))
        self._record_reads(graph, root)
        for node in reversed(graph.nodes):  # only a shape was asked for, or nothing at all
            if node.op == "get_attr" and not node.users:
                graph.erase_node(node)
        for node in graph.nodes:
            if id(node.target) in self._autowrap_function_ids:
                node.meta.pop("is_wrapped", None)  # its generated code would wrap ``torch.nn...``
        return graph

    def _record_reads(self, graph: Graph, root: nn.Module) -> None:
        """Record what forward has read of modules: attributes, and which modules' modes."""
        read = self.reads.by_name(root)
        modes = frozenset(name for name, each in read.items() if "training" in each)
        frozen = {
            name: {key: value for key, value in each.items() if key != "training"}
            for name, each in read.items()
            if name not in self.leaves
        }
        frozen = {name: each for name, each in frozen.items() if each}
        update_record(graph, frozen=frozen, mode_readers=modes)

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: dict[str, Any] | tuple[Any, ...] | None = None,
    ) -> tuple[Any, list[Any]]:
        """Placeholders named as the parameters, and checks of the inputs that are None."""
        bare = inspect.unwrap(root_fn)
        function, args = super().create_args_for_root(bare, is_module)
        if bare is not root_fn or inspect.getfullargspec(bare).kwonlyargs:
            function = called_by_position(root_fn, bare)
        if isinstance(concrete_args, dict):  # not where torch.fx unpickles a graph
            args = checked_arguments(self, args, concrete_args)
        return function, args

    def create_arg(self, a: Any) -> Any:
        """As the base class, but a container of the user's own class keeps its class.

        Scalars of NumPy become Python's: generated code could not name them.
        """
        numpy = sys.modules.get("numpy")
        if numpy and issubclass(type(a), numpy.generic):
            a = a.item()
        if not is_own_container(a):
            return super().create_arg(a)
        args, kwargs = arguments_of(a)
        given, named = super().create_arg(args), super().create_arg(kwargs)
        return self.create_node("call_function", type(a), given, named)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Make a node; raise if the graph would lose a setting around the call."""
        node = super().create_node(kind, target, *args, **kwargs)
        if may_have_gradient(node, self.root, self._learned):
            self._learned.add(node)
            if not is_grad_enabled():
                raise SideEffect(f"{node.name} is computed without a gradient")
        if node.op != "call_module":
            for each in written_by(node, {}):
                if str(each.target).startswith("_tensor_constant"):  # later calls would see it
                    raise TraceError(
                        f"{node.name} writes to a tensor that is not a value of the graph"
                    )
        if autocasting() != self._autocast:
            raise SideEffect(f"autocast is turned on or off around {node.name}")
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a call of ``m`` becomes one node."""
        return module_qualified_name in self.leaves or id(m) in self._layers

    def _looks_into(self, module: nn.Module, name: str) -> bool:
        """Whether the code of a module's forward is the user's, and is traced."""
        return package_of(type(module)) != "torch" and not self.is_leaf_module(module, name)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """The proxy of a parameter or buffer, looked up by id; torch.fx would search them all."""
        if self._is_other_thread() or not self.is_held(attr_val):
            return attr_val
        return self.proxy_of(attr_val)

    def is_held(self, value: Any) -> bool:
        """Whether a value is a parameter or buffer of the model."""
        return id(value) in self._names

    def proxy_of(self, tensor: Tensor) -> Proxy:
        """The proxy of a parameter or buffer of the model."""
        name = self._names[id(tensor)]
        if name not in self._proxies:
            self._proxies[name] = self.create_proxy("get_attr", name, (), {})
        return self._proxies[name]

    def _is_other_thread(self) -> bool:
        """Whether another thread runs a model here: torch.fx patches nn.Module for all threads."""
        return threading.get_ident() != self._thread

    def proxy(self, node: Node) -> Proxy:
        """A proxy; that of a parameter answers for its shape without a node."""
        name = str(node.target)
        if node.op == "get_attr" and name in self._parameters:
            return WeightProxy(self, node, name, self._parameters[name])
        return KeepsData(node, self)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Make a node for a leaf; trace into any other module.

        That includes a module that forward itself has made, without parameters or with those of the
        model.
        """
        if self._is_other_thread():
            return forward(*args, **kwargs)
        try:
            path = self.path_of_module(m)
        except NameError:  # forward has made the module, as self.layers[:2] does
            if not all(map(self.is_held, itertools.chain(m.parameters(), m.buffers()))):
                raise
            return forward(*args, **kwargs)
        depth = len(self.module_stack)
        if self.is_leaf_module(m, path):
            if own_call(m) == OWN_CALL:  # it is running now, and the node would run it again
                raise SideEffect(f"{path} {OWN_CALL}")
            return super().call_module(m, forward, args, kwargs)
        # If failing modules do not become leaves, the root's snapshot checks the random numbers.
        before = StateSnapshot.of(m, self._draws if self.leaf_on_failure else None)
        restore = backup_state(m) if self.leaf_on_failure else None
        try:
            returned = super().call_module(m, forward, args, kwargs)
            before.check()
            return returned
        except Exception:
            if restore is None:
                raise
            restore()
            while len(self.module_stack) > depth:
                self.module_stack.popitem(last=True)
            self.leaves |= {path}
            return super().call_module(m, forward, args, kwargs)
