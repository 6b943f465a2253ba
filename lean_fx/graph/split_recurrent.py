"""Split a stack of n recurrent layers into n layers.

The values between the layers of ``nn.LSTM(..., num_layers=n)`` are intermediate values like any
other, but the graph has no nodes for them. Before::

    x, (h0, c0) -> lstm -> (out, (h, c))

After, with D = 2 directions, or 1::

    x,   (h0[:D], c0[:D])       -> lstm.0 -> (out0, (h1, c1)) -> lstm.dropout
    ..., (h0[D:2D], c0[D:2D])   -> lstm.1 -> (out,  (h2, c2))
    h = cat(h1, h2), c = cat(c1, c2)

Rules:

1. The stack is an RNN, LSTM or GRU of two layers or more, called once and without hooks.
2. The layers have its weights, so outputs and hidden states are equal. In training, dropout draws
   other numbers from the same distribution. If the stack has dropout, a ``SequenceDropout`` stands
   between the layers; it takes packed sequences too.
3. Given hidden states are split along their first axis; final ones are concatenated.
4. In a model that keeps its class there is no graph to rewrite: a :class:`SplitStack` replaces the
   stack.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from lean_fx.graph.calls import argument, is_altered
from lean_fx.graph.rewriting import item, replace_node, rewire, take_place
from lean_fx.reduction.packed import SequenceDropout, layer_states

_STACKS = (nn.RNN, nn.LSTM, nn.GRU)


def can_split(layer: Any) -> bool:
    """Whether a module is an RNN, LSTM or GRU of two layers or more, without hooks."""
    return type(layer) in _STACKS and layer.num_layers > 1 and not is_altered(layer)


def is_split(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether the stack ``name`` has been split already."""
    return type(modules.get(f"{name}.0")) in _STACKS


def split(graph_module: GraphModule, node: Node) -> None:
    """Split the layer that a node calls."""
    name, graph = str(node.target), node.graph
    stack: Any = graph_module.get_submodule(name)
    home = nn.Module().train(stack.training)
    for part, module in stack_parts(stack):
        home.add_module(part, module)
    graph_module.set_submodule(name, home)

    value, states = argument(node, 0, "input"), argument(node, 1, "hx")
    ends = []
    with graph.inserting_before(node):
        for index in range(stack.num_layers):
            if index and stack.dropout:
                value = graph.call_module(f"{name}.dropout", (value,))
            begin: tuple[Any, ...] = ()
            if states is not None:
                cut = (states, *_states_of(stack, index))
                cut_name = f"{node.name}_{index}_begin"
                begin = (graph.create_node("call_function", layer_states, cut, name=cut_name),)
            call = graph.call_module(f"{name}.{index}", (value, *begin))
            value = item(graph, call, 0, name=f"{call.name}_output")
            ends.append(call)
    take_place(ends[0], node, name)
    _hand_over(node, value, ends, pair=isinstance(stack, nn.LSTM))


def _hand_over(node: Node, output: Node, ends: list[Node], *, pair: bool) -> None:
    """Let the readers of the stack's result read the results of its layers."""
    graph, stack = node.graph, str(node.target)

    def joined(*path: int) -> Node:
        """The states of all layers, along their first axis."""
        parts = []
        for end in ends:
            name = f"{end.name}_state"
            state = item(graph, end, 1, name=name)
            for index in path:
                state = item(graph, state, index, name=f"{name}_{index}")
            parts.append(state)
        name = "_".join([node.name, "states", *map(str, path)])
        return graph.create_node("call_function", torch.cat, (parts,), name=name)

    def states() -> Any:
        return (joined(0), joined(1)) if pair else joined()

    for user in list(node.users):
        index = user.args[1] if user.target is operator.getitem and user.args[0] is node else None
        with graph.inserting_before(user):
            if not user.users and user.op != "output":  # unpacked and never read
                graph.erase_node(user)
            elif index in (0, -2):
                replace_node(user, output, stack)
            elif index in (1, -1):
                replace_node(user, states(), stack)
            else:
                rewire(user, node, (output, states()))
    graph.erase_node(node)


def split_module(layer: Any, name: str, planned: Collection[str]) -> nn.Module:
    """The module that replaces a stack where there is no graph.

    Args:
        layer: the stack.
        name: its name.
        planned: the names of the layers in a plan.
    """
    return SplitStack(layer)


class SplitStack(nn.Module):
    """A stack of recurrent layers as modules ``0``, ``1``, ..., which forward calls in turn.

    Between them it calls ``dropout``, if the stack has any. The weights and the public attributes
    are those of the stack.

    Args:
        stack: the RNN, LSTM or GRU.

    Shape:
        As the stack's; packed sequences too.

    Example:
        >>> stack, x = nn.GRU(4, 3, num_layers=2), torch.rand(5, 2, 4)
        >>> split = SplitStack(stack)
        >>> torch.allclose(split(x)[0], stack(x)[0])
        True
    """

    bidirectional: bool
    num_layers: int

    def __init__(self, stack: nn.RNNBase) -> None:
        super().__init__()
        for name, value in vars(stack).items():  # such as hidden_size and bidirectional
            if name not in vars(self) and not name.startswith("_"):
                self.__dict__[name] = value
        self.__dict__.pop("dropout")
        for name, part in stack_parts(stack):
            self.add_module(name, part)
        self.train(stack.training)
        self._pair = isinstance(stack, nn.LSTM)

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """Run the layers in turn; the arguments are those of the stack."""
        ends = []
        for index in range(self.num_layers):
            if index and "dropout" in self._modules:
                input = self._modules["dropout"](input)  # type: ignore[misc]
            states = layer_states(hx, *_states_of(self, index))
            input, end = self._modules[str(index)](input, states)  # type: ignore[misc]
            ends.append(end)
        if self._pair:
            return input, tuple(torch.cat(each) for each in zip(*ends, strict=True))
        return input, torch.cat(ends)

    def flatten_parameters(self) -> None:
        """Flatten the parameters of each layer; a forward may call this on the stack."""
        for index in range(self.num_layers):
            self._modules[str(index)].flatten_parameters()  # type: ignore[union-attr, operator]


def stack_parts(stack: Any) -> Iterable[tuple[str, nn.Module]]:
    """The layers of a stack, with its weights, and its dropout, by name and in order."""
    for index in range(stack.num_layers):
        yield str(index), _layer(stack, index)
    if stack.dropout:
        yield "dropout", SequenceDropout(stack.dropout).train(stack.training)


def _states_of(stack: Any, index: int) -> tuple[int, int | None]:
    """Where the hidden states of a layer begin and end among those of a stack.

    The last layer gets all that are left, and refuses too many.
    """
    directions = 2 if stack.bidirectional else 1
    last = index == stack.num_layers - 1
    return index * directions, None if last else (index + 1) * directions


def _layer(stack: Any, index: int) -> nn.Module:
    """One layer of a stack, with its weights."""
    directions = 2 if stack.bidirectional else 1
    width = directions * (stack.proj_size or stack.hidden_size)
    names = ["bias", "batch_first", "bidirectional"]
    names += ["nonlinearity"] * isinstance(stack, nn.RNN)
    names += ["proj_size"] * isinstance(stack, nn.LSTM)
    weight = stack.weight_ih_l0
    layer: nn.Module = type(stack)(
        width if index else stack.input_size,
        stack.hidden_size,
        device="meta",  # drawing values would move torch's random numbers
        dtype=weight.dtype,
        **{name: getattr(stack, name) for name in names},
    )
    layer.to_empty(device=weight.device)
    for name, parameter in layer.named_parameters():
        old = stack.get_parameter(name.replace("_l0", f"_l{index}"))
        if not old.is_meta:
            parameter.data.copy_(old)
        parameter.requires_grad_(old.requires_grad)
    return layer.train(stack.training)
