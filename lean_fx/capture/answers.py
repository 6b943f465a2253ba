"""Answer what Python asks about known values, and add the checks that keep the answers true.

1. The outcome of a branch, a number, a key that is looked up: a
   :func:`~lean_fx.capture.guards.check_branch`.
2. The number of axes: it follows from that of the inputs, which is checked.
3. The keys, items and attributes of inputs, their types, and which of them are None: checks of the
   inputs.
"""

from __future__ import annotations

import inspect
import linecache
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, Proxy
from torch.fx.proxy import TraceError

from lean_fx.capture.guards import (
    check_absent,
    check_branch,
    check_given,
    check_kind,
    count_items,
    has_attribute,
    kind_name,
)
from lean_fx.capture.proxies import FIXED, UNKNOWN, value_of
from lean_fx.capture.tracing import LeanTracer


class AnsweringTracer(LeanTracer):
    """A tracer that answers questions about values; a subclass keeps these in the nodes.

    Args:
        leaves: names of modules that are leaves.
        leaf_on_failure: whether modules whose forward cannot be traced become leaves.
    """

    def __init__(
        self, leaves: frozenset[str] = frozenset(), *, leaf_on_failure: bool = False
    ) -> None:
        super().__init__(leaves, leaf_on_failure=leaf_on_failure)
        self._decided: set[tuple[str, Any]] = set()
        self._counted: set[Node] = set()

    def is_instance(self, proxy: Proxy, kinds: Any, by_model: bool) -> bool | None:
        """Whether the value is of some type."""
        value = value_of(proxy.node)
        if value is UNKNOWN:
            return super().is_instance(proxy, kinds, by_model)
        if by_model:
            self._check_kind(proxy.node)
        return isinstance(value, kinds)

    def has_attribute(self, proxy: Proxy, name: str) -> bool:
        """Whether the value has an attribute."""
        node, value = proxy.node, value_of(proxy.node)
        if value is UNKNOWN:
            return super().has_attribute(proxy, name)
        found = hasattr(value, name)
        if isinstance(value, Tensor):
            self._check_kind(node)
        elif self.is_of_input(node):
            asked = self.create_node("call_function", has_attribute, (node, name), {})
            self._check(asked, found)
        return found

    def type_of(self, proxy: Proxy) -> type:
        """The type of the value; what stands for a tensor is one."""
        value = value_of(proxy.node)
        if value is UNKNOWN:
            return super().type_of(proxy)
        self._check_kind(proxy.node)
        return Tensor if isinstance(value, Tensor) else type(value)

    def decide(self, proxy: Proxy, kind: Callable[[Any], Any]) -> Any:
        """Convert a value for Python, and let the graph check the result.

        Raises:
            TraceError: it depends on the numbers in a tensor.
        """
        node = proxy.node
        value = value_of(node)
        if value is UNKNOWN or isinstance(value, Tensor):
            raise TraceError(f"{self._place()} depends on the numbers in a tensor")
        outcome = kind(value)
        self._check(node, outcome)
        return outcome

    def count(self, proxy: Proxy, checked: bool = True) -> int:
        """How many items a value has."""
        value = value_of(proxy.node)
        found = len(value)
        if checked and isinstance(value, torch.Size):
            self._check_axes(proxy.node)
        elif checked:
            self._check(self.create_node("call_function", count_items, (proxy.node,), {}), found)
        return found

    def count_axes(self, proxy: Proxy) -> int:
        """How many axes a tensor has; the graph checks those of the inputs it comes from."""
        self._check_axes(proxy.node)
        return int(value_of(proxy.node).dim())

    def check_keys(self, proxy: Proxy) -> None:
        """Let the graph check that a dictionary among the inputs has the same keys."""
        if self.is_of_input(proxy.node):
            self._check(proxy.node, tuple(value_of(proxy.node)))

    def holds(self, proxy: Proxy, key: Any) -> bool:
        """Whether a dictionary has a key."""
        found = key in value_of(proxy.node)
        if self.is_of_input(proxy.node):
            asked = self.create_node("call_function", operator.contains, (proxy.node, key), {})
            self._check(asked, found)
        return found

    def check_presence(self, node: Node) -> None:
        """Let the graph check that an item or attribute of an input is None, or that it is not."""
        known = value_of(node) is not UNKNOWN
        if known and node.target in (operator.getitem, getattr) and self.is_of_input(node):
            check = check_absent if value_of(node) is None else check_given
            self.create_node("call_function", check, (node, _path_of(node)), {})

    def _check_axes(self, node: Node) -> None:
        """Let the graph check the number of axes of the inputs that a value comes from."""
        todo, seen = [node], {node}
        while todo:
            each = todo.pop()
            if isinstance(value_of(each), Tensor) and self.is_of_input(each):
                if each not in self._counted:
                    self._counted.add(each)
                    axes = self.create_node("call_method", "dim", (each,), {})
                    self._check(axes, value_of(each).dim())
                continue
            todo += [source for source in each.all_input_nodes if source not in seen]
            seen.update(each.all_input_nodes)

    def _check_kind(self, node: Node) -> None:
        kind = kind_name(value_of(node))
        if self.is_of_input(node) and (node.name, kind) not in self._decided:
            self._decided.add((node.name, kind))
            self.create_node("call_function", check_kind, (node, kind, self._place()), {})

    def is_of_input(self, node: Node) -> bool:
        """Whether a value is an input, or an item or attribute of one that is not a tensor."""
        if node.op == "placeholder":
            return True
        if node.target not in (operator.getitem, getattr):
            return False
        source = node.args[0]
        if not isinstance(source, Node) or isinstance(value_of(source), Tensor):
            return False
        return self.is_of_input(source)

    def _check(self, node: Node, outcome: Any) -> None:
        if node.meta[FIXED] or (node.name, outcome) in self._decided:
            return
        self._decided.add((node.name, outcome))
        self.create_node("call_function", check_branch, (node, outcome, self._place()), {})

    def _place(self) -> str:
        """Where the model's code is now: the module, the file, the line and its text."""
        frame = inspect.currentframe()
        while frame and _is_machinery(frame.f_globals.get("__name__", "")):
            frame = frame.f_back
        module = self.scope.module_path or self.root_module_name
        if frame is None:
            return module
        path, line = frame.f_code.co_filename, frame.f_lineno
        text = linecache.getline(path, line).strip()
        return f"{module} ({Path(path).name}:{line}: {text})"


def _path_of(node: Node) -> str:
    """An input, or an item or attribute of one, as the model's code writes it."""
    if node.op == "placeholder":
        return str(node.target)
    source, name = node.args
    assert isinstance(source, Node)
    inner = f".{name}" if node.target is getattr else f"[{name!r}]"
    return _path_of(source) + inner


def _is_machinery(module: str) -> bool:
    return module == "torch" or module.startswith(("torch.", "lean_fx.capture."))
