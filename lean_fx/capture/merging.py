"""Merge the graphs of a model's two modes into one that follows train() and eval().

Tracing freezes ``self.training``. So a model is traced in its own mode and in the opposite one, and
the two graphs are aligned::

    # training                     # evaluation                   # both
    x = self.body(x)               x = self.body(x)               x = self.body(x)
    aux = self.aux(x)                                             aux, = in_training(x, self.aux)
                                                                  flag = by_mode(True, False)
    y = F.rrelu(x, training=True)  y = F.rrelu(x, training=False) y = F.rrelu(x, training=flag)
    return y, aux                  return y                       return by_mode((y, aux), y)

Rules:

1. Calls of the same target, in the same module and order, become one. Where their arguments
   differ, a :class:`~lean_fx.layers.modes.ByMode` chooses.
2. The calls between two such that only one mode makes become one
   :class:`~lean_fx.layers.modes.InMode`.
3. Both follow the innermost module around the call whose ``training`` was read, and start in its
   mode. If several such modules decide together, these must be whole.
4. A layer called within an ``InMode`` must not be called elsewhere.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from operator import attrgetter
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph_module import _copy_attr
from torch.fx.node import map_arg

from lean_fx.graph.captured import record_of
from lean_fx.graph.facts import facts
from lean_fx.graph.rewriting import add_module, home_of, item
from lean_fx.layers.modes import ByMode, InMode
from lean_fx.passes.modularize_calls import FUNCTIONS, can_follow_mode, flag_of


class CannotMerge(Exception):  # noqa: N818
    """No single graph can stand for the graphs of both modes.

    Attributes:
        leaves: the modules that must be leaves for that; empty if none help.
    """

    def __init__(self, reason: str, leaves: Collection[str] = ()) -> None:
        super().__init__(reason)
        self.leaves = frozenset(leaves)


def merge_modes(captured: GraphModule, model: nn.Module, opposite: Graph, other: nn.Module) -> None:
    """Make a captured model follow train() and eval(), in place.

    Functional dropout whose flag follows the mode is only marked;
    :class:`~lean_fx.passes.ModularizeCalls` replaces it.

    Args:
        captured: the model, captured in its own mode.
        model: the model, which knows the mode of each module.
        opposite: the graph of the model in the opposite mode.
        other: the copy of the model that this graph was traced from.

    Raises:
        CannotMerge: by rule 4, and ``captured`` is unchanged; or by rule 3 with ``leaves``, and
            ``captured`` is unusable.
    """
    blocks = _blocks(list(captured.graph.nodes), list(opposite.nodes))
    _check(blocks)
    _Merger(captured, model, opposite, other).merge(blocks)


@dataclass(frozen=True)
class _Block:
    """A run of nodes of the two graphs: the same calls in both, or those that differ."""

    mine: list[Node]
    theirs: list[Node]
    shared: bool


def _blocks(mine: list[Node], theirs: list[Node]) -> list[_Block]:
    ours, others = ([_key(node) for node in nodes] for nodes in (mine, theirs))
    if ours == others:
        return [_Block(mine, theirs, True)]
    matcher = SequenceMatcher(None, ours, others, autojunk=False)
    return [
        _Block(mine[i:j], theirs[k:m], tag == "equal") for tag, i, j, k, m in matcher.get_opcodes()
    ]


def _key(node: Node) -> tuple[Any, ...]:
    return node.op, node.target, home_of(node), len(node.args), tuple(node.kwargs)


def _check(blocks: Sequence[_Block]) -> None:
    called = Counter(
        node.target
        for block in blocks
        for node in (*block.mine, *(() if block.shared else block.theirs))
        if node.op == "call_module"
    )
    for block in blocks:
        if block.shared:
            continue
        for node in (*block.mine, *block.theirs):
            if node.op in ("placeholder", "output"):
                raise CannotMerge(f"{node.name} is not alike in both")
            if node.op == "call_module" and called[node.target] > 1:
                raise CannotMerge(f"{node.target} is called in different places")


def _same(homes: set[str]) -> str:
    """The one module that parts of a graph follow."""
    if len(homes) > 1:
        names = ", ".join(sorted(homes))
        raise CannotMerge(f"the modes of {names} decide together", homes - {""})
    return next(iter(homes), "")


@dataclass(frozen=True)
class _Part:
    """Calls as a graph of their own.

    Attributes:
        graph: it is given the values that the calls read, and then the modules that they call.
        read: these values.
        modules: the names of these modules.
        returned: the calls whose results others read, which the graph returns.
    """

    graph: Graph
    read: list[Node]
    modules: list[str]
    returned: list[Node]

    @classmethod
    def of(cls, calls: Sequence[Node]) -> _Part:
        """Copy calls into a graph."""
        inside = set(calls)
        sources = dict.fromkeys(each for node in calls for each in node.all_input_nodes)
        read = [node for node in sources if node not in inside]
        paths = list(dict.fromkeys(str(n.target) for n in calls if n.op == "call_module"))
        graph = Graph()
        copies = {node: graph.placeholder(f"input_{place}") for place, node in enumerate(read)}
        modules = {path: graph.placeholder(f"module_{place}") for place, path in enumerate(paths)}
        for node in calls:
            if node.op == "call_module":
                args, kwargs = map_arg((node.args, node.kwargs), copies.__getitem__)
                module = modules[str(node.target)]
                copies[node] = graph.call_method("__call__", (module, *args), kwargs)
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        returned = [node for node in calls if any(user not in inside for user in node.users)]
        graph.output(tuple(copies[node] for node in returned))
        return cls(graph, read, paths, returned)


class _Merger:
    def __init__(
        self, captured: GraphModule, model: nn.Module, opposite: Graph, other: nn.Module
    ) -> None:
        self.captured, self.model, self.other = captured, model, other
        self.graph = captured.graph
        self.found: dict[Node, Node] = {}  # a node of the opposite graph -> its twin in ours
        self.made: dict[Node, str] = {}  # a value of one mode -> the module that has the mode
        self.changed = False
        self.readers = record_of(self.graph).mode_readers | record_of(opposite).mode_readers

    def merge(self, blocks: Sequence[_Block]) -> None:
        for block, after in zip(blocks, (*blocks[1:], None), strict=True):
            if block.shared:
                for mine, their in zip(block.mine, block.theirs, strict=True):
                    self._join(mine, their)
            elif after is not None:  # the last block is shared: it has the output
                called = [n for n in (*block.theirs, *block.mine) if n.op != "get_attr"]
                _same({self._mode_home(node) for node in called})
                self._part(block.theirs, False, after.mine[0])
                self._part(block.mine, True, after.mine[0])
        if self.changed:
            self.graph.lint()
            self.captured.recompile()

    def _join(self, mine: Node, their: Node) -> None:
        """Make one node of two (rule 1)."""
        self.found[their] = mine
        args, kwargs = (
            map_arg(each, self.found.__getitem__) for each in (their.args, their.kwargs)
        )
        if mine.target in FUNCTIONS:
            flags = [flag_of(node) for node in (mine, their)]
            home = self._mode_home(mine)
            if flags == [self._trains(home), not self._trains(home)]:
                facts(mine).mode_home = home
            if can_follow_mode(mine):
                args, kwargs = _with_flags(args, mine.args), _with_flags(kwargs, mine.kwargs)
        if (mine.args, mine.kwargs) != (args, kwargs):
            mine.args = self._either(mine.args, args, mine)
            mine.kwargs = self._either(mine.kwargs, kwargs, mine)

    def _either(self, mine: Any, their: Any, reader: Node) -> Any:
        """An argument that takes ``mine`` in the model's mode and ``their`` in the opposite one."""
        if mine is their or (type(mine) is type(their) and mine == their):
            return mine
        if isinstance(mine, dict) and isinstance(their, dict) and mine.keys() == their.keys():
            return {name: self._either(mine[name], their[name], reader) for name in mine}
        alike = type(mine) is type(their) and isinstance(mine, tuple | list)
        if alike and len(mine) == len(their):
            pairs = zip(mine, their, strict=True)
            return type(mine)([self._either(*pair, reader) for pair in pairs])
        nodes = [each for each in (mine, their) if isinstance(each, Node)]
        home = _same({self.made[each] for each in nodes if each in self.made})
        home = home if any(each in self.made for each in nodes) else self._mode_home(reader)
        values = (mine, their) if self._trains(home) else (their, mine)
        return self._call(ByMode(), "by_mode", values, reader, home)

    def _part(self, nodes: Sequence[Node], own: bool, before: Node) -> None:
        """Move nodes that only one mode has into an InMode (rule 2)."""
        for node in nodes:
            if node.op == "get_attr" and not own:
                self.found[node] = self._attribute(str(node.target), before)
        calls = [node for node in nodes if node.op != "get_attr"]
        if not calls:
            return
        part = _Part.of(calls)
        given = [node if own else self.found[node] for node in part.read]
        home = self._mode_home(calls[0])
        _same({home, *(self.made[each] for each in given if each in self.made)})
        given += [self._attribute(path, before) for path in part.modules]
        mode = self._trains(home) == own
        name = "in_training" if mode else "in_evaluation"
        only = InMode(GraphModule(nn.Module(), part.graph), mode)
        call = self._call(only, name, tuple(given), before, home)
        inside = set(calls)
        for place, node in enumerate(part.returned):
            with self.graph.inserting_before(before):
                value = item(self.graph, call, place)
            self.made[value] = home
            if own:
                node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in inside)
            else:
                self.found[node] = value
        if own:
            for node in reversed(calls):
                self.graph.erase_node(node)

    def _attribute(self, path: str, before: Node) -> Node:
        """A parameter, buffer or module of the model as a value of the graph."""
        name = path
        if path.rpartition(".")[2].startswith("_tensor_constant"):  # each trace has its own
            taken = (f"_tensor_constant{number}" for number in itertools.count())
            name = next(each for each in taken if not hasattr(self.captured, each))
            self.captured.register_buffer(name, attrgetter(path)(self.other))
        elif not _has(self.captured, path):
            _copy_attr(self.other, self.captured, path)
        with self.graph.inserting_before(before):
            return self.graph.get_attr(name)

    def _call(
        self, module: nn.Module, name: str, args: tuple[Any, ...], before: Node, home: str
    ) -> Node:
        """Call a ByMode or InMode that follows the mode of a module of the model."""
        self.changed = True
        module.train(self._trains(home))
        target = add_module(self.captured, "calls", name, module, home)
        with self.graph.inserting_before(before):
            return self.graph.call_module(target, args)

    def _trains(self, home: str) -> bool:
        return self.model.get_submodule(home).training

    def _mode_home(self, node: Node) -> str:
        """The module that a call follows: the innermost around it whose mode was read."""
        stack = node.meta.get("nn_module_stack", {}).values()
        around = ["", *(str(path) for path, _ in stack)]
        reading = [path for path in around if path in self.readers]
        return reading[-1] if reading else around[-1]


def _with_flags(theirs: Any, mine: Any) -> Any:
    """The arguments of a call, with the flags of another."""
    if isinstance(mine, dict):
        return {name: _with_flags((theirs[name],), (mine[name],))[0] for name in mine}
    pairs = zip(theirs, mine, strict=True)
    return tuple(own if isinstance(own, bool) else their for their, own in pairs)


def _has(root: nn.Module, path: str) -> bool:
    try:
        attrgetter(path)(root)
    except AttributeError:
        return False
    return True
