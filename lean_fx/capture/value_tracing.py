"""Tracing with values: branches on sizes go the way that the example inputs take.

A proxy of torch.fx stands for any value, so ``if x.shape[1] > 8`` cannot be traced. Here every
proxy also has the value that the example inputs lead to: for a tensor a fake one, with a shape, a
dtype and a device but no numbers; for anything else the value itself. Rules:

1. Sizes stay nodes: padding and positions that depend on them are computed at every call.
2. Where Python needs a value to branch (``bool``), to count (``len``, ``range``) or as a number
   (``int``), it gets that of the example inputs. The graph gets a
   :func:`~lean_fx.capture.guards.check_branch`, which refuses inputs that lead to another value.
3. A value that follows only from the parameters and is not a tensor is a constant. The graph also
   checks the number of axes of its inputs, their keys, items and attributes, and the types of
   these. The number of axes of any other tensor follows from the inputs.
4. What depends on the numbers in a tensor is an error, as with torch.fx.
5. A function that makes a tensor (``torch.zeros``) is a node, whatever its arguments.
6. A recurrent cell that is called twice is in a loop whose steps would be frozen: an error.
7. In the end, nodes that compute no tensor and only led to a decision are removed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.fx import Graph, Node, Proxy
from torch.fx.node import map_aggregate
from torch.fx.proxy import TraceError
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lean_fx.capture.answers import AnsweringTracer
from lean_fx.capture.guards import (
    check_absent,
    check_branch,
    check_given,
    check_kind,
    count_items,
    has_attribute,
    round_number,
)
from lean_fx.capture.proxies import (
    FIXED,
    UNKNOWN,
    VALUE,
    ItemsProxy,
    KeepsData,
    ValueProxy,
    value_of,
)
from lean_fx.capture.side_effects import keeping_rng_state
from lean_fx.graph.calls import META_METHODS
from lean_fx.graph.running import fake_of, run_on, runnable, without_gradients

_CALLS = ("call_function", "call_method")
_NO_VALUE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
_MAKERS: tuple[Callable[..., Any], ...] = (
    *(torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.zeros),
    *(torch.rand, torch.randint, torch.randn, torch.randperm),
)
_MAKERS_OF_VALUES: tuple[Callable[..., Any], ...] = (torch.tensor, torch.as_tensor)
_CHECKS = (check_branch, check_kind, check_absent, check_given)
_DECIDING = {getattr(operator, name) for name in operator.__all__} | {
    getattr,
    count_items,
    round_number,
    has_attribute,
    torch.sym_int,
    torch.sym_float,
}
_DECIDING -= {operator.setitem, operator.delitem}


class ValueTracer(AnsweringTracer):
    """A tracer whose proxies have the values that the example inputs lead to.

    Args:
        inputs: the positional example inputs.
        leaves: names of modules that are leaves.
        leaf_on_failure: whether modules whose forward cannot be traced become leaves.
    """

    as_nodes = (*AnsweringTracer.as_nodes, *_MAKERS, *_MAKERS_OF_VALUES)

    def __init__(
        self,
        inputs: Sequence[Any] = (),
        leaves: frozenset[str] = frozenset(),
        *,
        leaf_on_failure: bool = False,
    ) -> None:
        super().__init__(leaves, leaf_on_failure=leaf_on_failure)
        self._inputs = tuple(inputs)
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._state: dict[Tensor, Tensor] = {}
        self._cells: set[nn.Module] = set()

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> Graph:
        """Trace, then drop the values."""
        with _Recording(self):
            graph = super().trace(root, concrete_args)
        for node in reversed(graph.nodes):
            if not node.users and _only_decides(node):
                graph.erase_node(node)
        for node in graph.nodes:
            for key in (VALUE, FIXED):
                node.meta.pop(key, None)
        return graph

    # The methods that torch.fx's tracer calls.

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Make a node, and its value."""
        node = super().create_node(kind, target, *args, **kwargs)
        try:
            node.meta[VALUE] = self._value_of(node)
        except Exception:  # the model's own code may expect it
            if not node.users:
                self.graph.erase_node(node)
            raise
        value, sources = value_of(node), node.all_input_nodes
        if isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex()):
            self._learned.discard(node)
        node.meta[FIXED] = kind != "placeholder" and all(n.meta[FIXED] for n in sources)
        return node

    def create_arg(self, a: Any) -> Any:
        """As the base class, which would take a proxy that claims to be a tensor for one."""
        return a.node if issubclass(type(a), Proxy) else super().create_arg(a)

    def proxy(self, node: Node) -> Proxy:
        """A proxy of the class that fits the value."""
        value = value_of(node)
        if value is UNKNOWN:
            return KeepsData(node, self)
        return (ItemsProxy if hasattr(type(value), "__iter__") else ValueProxy)(node, self)

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        """A proxy; or the value, if it is a constant, or an item or attribute that is None."""
        proxy = super().create_proxy(*args, **kwargs)
        node, value = proxy.node, value_of(proxy.node)
        if node.meta[FIXED] and isinstance(value, int | float | torch.Size) and node.op in _CALLS:
            self.graph.erase_node(node)
            return value
        self.check_presence(node)
        return None if value is None and node.target in (operator.getitem, getattr) else proxy

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """As the base class, unless a value is being computed."""
        if self.computing:
            return forward(*args, **kwargs)
        if isinstance(m, nn.RNNCellBase):
            if m in self._cells:
                raise TraceError(f"{self.path_of_module(m)} is called in a loop")
            self._cells.add(m)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """As the base class, unless a value is being computed."""
        if self.computing:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: Proxy) -> bool:
        """The outcome of a branch."""
        return bool(self.decide(obj, bool))

    def keys(self, obj: Proxy) -> Any:
        """The names in a dictionary."""
        value = value_of(obj.node)
        return list(value) if isinstance(value, dict) else super().keys(obj)

    # The values.

    def _value_of(self, node: Node) -> Any:
        if node.op == "output" or node.target in _CHECKS:
            return None
        if any(value_of(each) is UNKNOWN for each in node.all_input_nodes):
            return UNKNOWN
        args, kwargs = (map_aggregate(each, _value) for each in (node.args, node.kwargs))
        before, self.computing = self.computing, True
        try:
            with self._fakes, torch._C.DisableTorchFunction():
                return without_gradients(lambda: self._run(node, args, kwargs))
        except _NO_VALUE:
            return UNKNOWN
        finally:
            self.computing = before

    def _run(self, node: Node, args: Any, kwargs: Any) -> Any:
        match node.op:
            case "placeholder":
                return self._input(str(node.target), args)
            case "get_attr":
                value = operator.attrgetter(str(node.target))(self.root)
                if isinstance(value, nn.Module):
                    return runnable(value, self._fake)
                return self._fake(value) if isinstance(value, Tensor) else value
            case "call_function":
                return node.target(*args, **kwargs)  # type: ignore[operator]
            case "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        with keeping_rng_state():
            module = self.root.get_submodule(str(node.target))
            return run_on(module, self._fake, args, kwargs)

    def _input(self, name: str, default: tuple[Any, ...]) -> Any:
        if not self._inputs:  # torch.fx unpickles a graph, and gives no inputs
            return UNKNOWN
        place = sum(node.op == "placeholder" for node in self.graph.nodes) - 1
        if name.startswith("**"):
            return {}
        if name.startswith("*"):
            given: Any = self._inputs[place:]
        elif place < len(self._inputs):
            given = self._inputs[place]
        else:
            return default[0] if default else UNKNOWN
        return pytree.tree_map_only(Tensor, self._fake, given)

    def _fake(self, tensor: Tensor) -> Tensor:
        if tensor not in self._state:
            self._state[tensor] = fake_of(tensor, self._fakes)
        return self._state[tensor]


class _Recording(TorchFunctionMode):
    """Records the calls of torch's functions that reach no proxy."""

    def __init__(self, tracer: ValueTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        leaves += [
            end
            for each in leaves
            if isinstance(each, slice)
            for end in (each.start, each.stop, each.step)
        ]
        proxied = any(issubclass(type(each), Proxy) for each in leaves)
        if not proxied and func not in _MAKERS:
            return func(*args, **kwargs)
        if torch.overrides.is_tensor_method_or_property(func):
            return self._tracer.create_proxy("call_method", func.__name__, args, kwargs)
        return self._tracer.create_proxy("call_function", func, args, kwargs)


def _value(argument: Any) -> Any:
    return value_of(argument) if isinstance(argument, Node) else argument


def _only_decides(node: Node) -> bool:
    """Whether a node without users has done its work: it led to a decision."""
    if node.op == "get_attr":
        return True
    if isinstance(value_of(node), Tensor) or value_of(node) is UNKNOWN:
        return False
    if node.op == "call_method":
        return node.target in META_METHODS
    return node.op == "call_function" and node.target in _DECIDING
