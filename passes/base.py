"""What a pass is, and how passes are chained.

An **analysis** learns about a graph and writes what it learns into :func:`facts` of its nodes; it
leaves the graph as it is. A **transformation** rewrites the graph and reads such facts; it never
writes them. After every pass the graph lints and runs: a rewrite that inserts and one that rebuilds
are one pass if only both together make a graph that runs.

Four laws hold for every pass, and one test checks them all:

1. a graph in which nothing matches comes back unchanged, textually;
2. ``modified`` is true exactly when the graph's text or its modules changed;
3. a second run changes nothing;
4. the numbers that the module computes are what the pass says they should be.
"""

from __future__ import annotations

import abc
import copy
import itertools
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from lean_fx.errors import LeanError, PassError
from lean_fx.passes.reducing import stop_reducing

if TYPE_CHECKING:
    from lean_fx.passes.graph_context import Read
    from lean_fx.passes.track_channels import Channels

_KEY = "lean_fx"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


@dataclass
class Facts:
    """What the analyses know of one node; None where they know nothing.

    Attributes:
        shape: of the node's value, if that is one tensor, or of the data of packed sequences
            (``PropagateShapes``).
        packed: whether the value is packed sequences (``PropagateShapes``, ``MeasureScale``).
        rms: its root mean square, for inputs of unit variance (``MeasureScale``).
        storage: the node whose storage the value shares; its own name if none (``TrackWrites``).
        writes: whether the call changes values in place (``TrackWrites``).
        nonnegative: whether no element of the value is below 0 (``InferSign``).
        follows_mode: whether an argument of the call is train() or eval() (capture).
        channels: where the channels of the value are (``TrackChannels``).
        read: what the layer called here reads, if it can be reduced (``FindConsumers``).
        refusal: why the layer called here is left alone, if it is (``FindConsumers``).
        splits: whether it is attention, which may be split into its layers (``FindConsumers``).
        weight: the name of the parameter of no layer that the call multiplies a value with; it can
            become a layer if there is no refusal (``FindConsumers``).
    """

    shape: tuple[int, ...] | None = None
    packed: bool = False
    rms: float | None = None
    follows_mode: bool = False
    storage: str = ""
    writes: bool = False
    nonnegative: bool = False
    channels: Channels | None = None
    read: Read | None = None
    refusal: str = ""
    splits: bool = False
    weight: str = ""


def facts(node: Node) -> Facts:
    """The facts known of ``node``, empty ones if there are none yet."""
    known = node.meta.setdefault(_KEY, Facts())
    assert isinstance(known, Facts)
    return known


def forget_facts(graph_module: GraphModule) -> None:
    """Drop all facts: they speak of the graph before a transformation."""
    for node in graph_module.graph.nodes:
        node.meta.pop(_KEY, None)


def called(node: Node, modules: Mapping[str, nn.Module]) -> Any:
    """What a node calls: a function, the name of a method, or the type of a module.

    A module whose call does more than its type says (it has hooks, or a forward of its own) is
    itself what is called.
    """
    if node.op != "call_module":
        return node.target
    module = modules[str(node.target)]
    return module if is_altered(module) else type(module)


def is_altered(module: nn.Module) -> bool:
    """Whether a call of the module does more than its type says: it has hooks, or its own forward.

    Example:
        >>> is_altered(nn.ReLU())
        False
    """
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS)


def has_hooks(module: nn.Module) -> bool:
    """Whether something else runs when the module is called, or when a gradient reaches it.

    Example:
        >>> has_hooks(nn.ReLU())
        False
    """
    return any(getattr(module, hooks) for hooks in (*_HOOKS, *_BACKWARD_HOOKS))


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def shallow(module: nn.Module) -> nn.Module:
    """A copy to run without a trace: no hooks but ours, and what forward sets is not kept."""
    if next(module.children(), None) is not None:
        copied = sharing_copy(module)
        for each in copied.modules():
            ours = {key: hook for key, hook in each._forward_hooks.items() if hook is stop_reducing}
            each._forward_hooks = OrderedDict(ours)
            for hooks in _BACKWARD_HOOKS:
                setattr(each, hooks, OrderedDict())
        return copied
    copied = object.__new__(type(module))  # copy.copy refuses parametrized modules
    copied.__dict__.update(module.__dict__)
    for hooks in ("_forward_hooks", *_BACKWARD_HOOKS):
        setattr(copied, hooks, OrderedDict())
    return copied


def run_on(
    module: nn.Module, tensor: Callable[[Tensor], Tensor], args: Any, kwargs: Any = None
) -> Any:
    """Call a module without a trace left, on what ``tensor`` gives for its parameters and buffers.

    With its own it would write to buffers, as batch norm does.
    """
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    replaced = {name: tensor(each) for name, each in state.items()}
    return torch.func.functional_call(shallow(module), replaced, args, kwargs)


def sharing_copy(
    module: nn.Module, tensor: Callable[[Tensor], Tensor] = lambda each: each
) -> nn.Module:
    """A deep copy to run or trace without a trace left, with the same parameters and buffers.

    Args:
        module: what to copy.
        tensor: gives what takes the place of a parameter or buffer.
    """
    state = [*module.parameters(), *module.buffers()]
    replaced = {id(each): tensor(each) for each in state}
    with unset_fake_temporarily():  # which cannot copy other tensors
        return copy.deepcopy(module, replaced)


def fake_of(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A tensor of the same shape without numbers; on the CPU, if it is on the meta device.

    What is on the meta device has no numbers either, and is to be put on some device yet.
    """
    if not tensor.is_meta:
        return mode.from_tensor(tensor)
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


def add_module(graph_module: GraphModule, folder: str, name: str, module: nn.Module) -> str:
    """Add ``module`` as ``folder.name``, or with a number behind either if that is taken.

    Returns:
        The name that it got.
    """
    home = next(
        each
        for each in numbered(folder)
        if type(getattr(graph_module, each, None)) in (nn.Module, type(None))
    )
    if not hasattr(graph_module, home):
        graph_module.add_module(home, nn.Module().train(graph_module.training))
    there = graph_module.get_submodule(home)
    free = next(each for each in numbered(name) if not hasattr(there, each))
    there.add_module(free, module)
    return f"{home}.{free}"


def item(graph: Graph, value: Any, index: Any, name: str | None = None) -> Node:
    """A node that reads ``value[index]``."""
    return graph.create_node("call_function", operator.getitem, (value, index), name=name)


def replace_node(node: Node, value: Any) -> None:
    """Put ``value``, a node or a tuple of nodes, in the place of ``node``, and erase that."""
    for user in list(node.users):
        if isinstance(value, tuple) and user.target is operator.getitem and user.args[0] is node:
            replace_node(user, value[user.args[1]])  # type: ignore[index]
        else:
            rewire(user, node, value)
    node.graph.erase_node(node)


def rewire(user: Node, node: Node, value: Any) -> None:
    """Give ``user`` ``value``, a node or a tuple of nodes, where it read ``node``."""

    def swapped(argument: Node) -> Any:
        return value if argument is node else argument

    user.args = torch.fx.map_arg(user.args, swapped)
    user.kwargs = torch.fx.map_arg(user.kwargs, swapped)


def numbered(name: str) -> Iterator[str]:
    """A name, and the names with a number behind it."""
    yield name
    yield from (f"{name}_{number}" for number in itertools.count(1))


class Pass(abc.ABC):
    """One step over a graph. Call it; write :meth:`run`.

    Unlike torch's ``PassBase``, ``ensures`` is checked on the result.
    """

    @property
    def name(self) -> str:
        """The name of the pass, for messages."""
        return type(self).__name__

    @abc.abstractmethod
    def run(self, graph_module: GraphModule) -> bool:
        """Analyse or rewrite ``graph_module`` in place; return whether it was modified."""

    def requires(self, graph_module: GraphModule) -> None:  # noqa: B027 (optional)
        """Raise a LeanError unless the pass may run on ``graph_module``."""

    def ensures(self, graph_module: GraphModule) -> None:  # noqa: B027 (optional)
        """Raise a LeanError unless the result is what the pass promises."""

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Run the pass between its two checks.

        Raises:
            LeanError: of the check that fails.
        """
        self.requires(graph_module)
        modified = self.run(graph_module)
        if modified:
            graph_module.graph.lint()
            graph_module.recompile()
        self.ensures(graph_module)
        return PassResult(graph_module, modified)


class Pipeline(Pass):
    """Passes in a row, as one pass.

    Args:
        passes: at least one.

    Raises:
        PassError: a pass fails with anything but a LeanError; the message names it and those
            that had run before it.
    """

    def __init__(self, passes: Iterable[Pass]) -> None:
        self.passes = tuple(passes)

    def run(self, graph_module: GraphModule) -> bool:
        """Run all; modified if any of them modified."""
        modified = False
        for index, each in enumerate(self.passes):
            try:
                modified |= each(graph_module).modified
            except LeanError:
                raise
            except Exception as error:
                before = ", ".join(done.name for done in self.passes[:index]) or "none"
                raise PassError(
                    f"{each.name} failed ({type(error).__name__}: {error}); passes before it: "
                    f"{before}"
                ) from error
        return modified
