"""torch.fx's tracer for the models that people have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import Graph, Tracer
from torch.nn.utils import rnn

from lean_fx.attention import AttentionHeads
from lean_fx.modes import ByMode, InMode
from lean_fx.packed import SequenceDropout
from lean_fx.rebuild import REBUILDERS
from lean_fx.registry import is_reduction

_SEQUENCE_FUNCTIONS = (
    *(rnn.pack_padded_sequence, rnn.pad_packed_sequence, rnn.pack_sequence, rnn.pad_sequence),
    *(rnn.unpack_sequence, rnn.unpad_sequence),
)


class LeanTracer(Tracer):
    """torch.fx's tracer, with four differences.

    Subclasses of conv, linear and recurrent layers are leaves too: they would otherwise dissolve
    into functional calls; as leaves they are seen, and left alone with a reason. Buffers are values
    of the graph, so that what forward computes of them is computed at every call, not once. The
    functions that pack and pad sequences are nodes, since they cannot run without lengths. Modules
    whose forward cannot be traced may become leaves.

    Args:
        opaque: names of modules that are leaves, whatever they are.
        give_up: whether a module whose forward cannot be traced becomes a leaf, the innermost
            first. ``opaque`` has its name then, and the graph has remains of it: trace anew.
        wrapped: further functions that are nodes.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        opaque: frozenset[str] = frozenset(),
        *,
        give_up: bool = False,
        wrapped: tuple[Callable[..., Any], ...] = (),
    ) -> None:
        super().__init__(autowrap_functions=(*_SEQUENCE_FUNCTIONS, *wrapped))
        self._autowrap_search.append(rnn)  # for calls by the module's name
        self.opaque = opaque
        self.give_up = give_up

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> Graph:
        """As torch.fx's, but for a mark that makes its generated code wrap ``torch.nn...``."""
        graph = super().trace(root, concrete_args)
        for node in graph.nodes:
            if id(node.target) in self._autowrap_function_ids:
                node.meta.pop("is_wrapped", None)  # no later trace would find it: a KeyError
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a call of ``m`` becomes one node."""
        kinds = (*REBUILDERS, SequenceDropout, AttentionHeads, ByMode, InMode)
        leaf = isinstance(m, kinds) or is_reduction(m) or module_qualified_name in self.opaque
        return leaf or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """A node for a leaf; what forward returns for another module."""
        path = self.path_of_module(m)
        depth = len(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if not self.give_up or self.is_leaf_module(m, path):
                raise
            while len(self.module_stack) > depth:
                self.module_stack.popitem(last=True)
            self.opaque |= {path}
            return super().call_module(m, forward, args, kwargs)
