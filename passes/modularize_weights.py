"""Transformation: a parameter that multiplies the channels of a value becomes a layer.

A model may hold weights that belong to no layer, and multiply with them itself. Here such a
parameter becomes the layer that it stands for, of the same name::

    matmul = x @ self.projection                  # before: a parameter, C_in x C_out
    projection_call = self.projection(x)          # after: nn.Linear(C_in, C_out, bias=False)

    conv2d = torch.nn.functional.conv2d(x, self.kernel, self.shift, stride = 2)
    kernel_call = self.kernel(x);  add = kernel_call + self.shift.reshape(-1, 1, 1)

Rules:

1. It acts on F.linear, F.conv1d, conv2d, conv3d with numbers for their settings, and on products
   (``@``, torch.matmul, torch.mm, torch.addmm) with a matrix on the right.
2. The weight is a parameter, in a product possibly transposed; it has one name, and nothing else
   reads it, nor a module that is called whole. That of a layer is left alone (see
   :class:`~lean_fx.passes.ModularizeCalls`).
3. The bias stays what it is, and is added behind the layer.
4. The layer's weight is the parameter itself where its shape allows it, else a transposed copy.
5. It acts on the parameters that it is given by name; :func:`weights_of_products` finds them all.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from lean_fx.errors import PlanError
from lean_fx.graph.calls import argument
from lean_fx.graph.rewriting import replace_node
from lean_fx.layers.kinds import LAYER_OF_CALL, has_own_kind
from lean_fx.passes.base import Pass
from lean_fx.passes.modularize_calls import (
    SETTINGS,
    add_bias,
    erase_unread,
    readers,
    within_called,
)

_PRODUCTS = {operator.matmul, torch.matmul, torch.mm, "matmul", "mm"}
_SWAPS = {(0, 1), (1, 0), (-1, -2), (-2, -1)}
_REVERSED = {(1, 0), (-1, -2)}
_TRANSPOSES: dict[Any, set[tuple[Any, ...]]] = {
    "t": {()},
    torch.t: {()},
    "transpose": _SWAPS,
    torch.transpose: _SWAPS,
    "permute": _REVERSED,
    torch.permute: _REVERSED,
    getattr: {("T",), ("mT",)},
}


@dataclass(frozen=True)
class Product:
    """A call that multiplies a value with a parameter.

    Attributes:
        node: the call.
        weight: the node that reads the parameter.
        layer: what does the same, but for the bias.
    """

    node: Node
    weight: Node
    layer: nn.Module


class ModularizeWeights(Pass):
    """Make layers of parameters that multiply channels.

    Args:
        weights: their qualified names.

    Raises:
        PlanError: a name is not that of such a parameter.
    """

    def __init__(self, weights: Iterable[str]) -> None:
        self.weights = tuple(weights)

    def run(self, graph_module: GraphModule) -> bool:
        """Replace the products one by one; what is a layer already is left alone."""
        modules = dict(graph_module.named_modules())
        todo = [name for name in self.weights if name not in modules]
        found = weights_of_products(graph_module) if todo else {}
        for name in todo:
            if name not in found:
                raise PlanError(
                    f"plan: {name!r} is not a parameter that multiplies one value only; make the "
                    "plan anew from this model"
                )
            _call(graph_module, found[name])
        return bool(todo)


def weights_of_products(graph_module: GraphModule) -> dict[str, Product]:
    """The parameters that can become layers, by name, in the order of the graph."""
    return {str(product.weight.target): product for product in _products(graph_module)}


def _products(graph_module: GraphModule) -> Iterator[Product]:
    parameters = dict(graph_module.named_parameters())
    names: dict[int, int] = {}
    for _, parameter in graph_module.named_parameters(remove_duplicate=False):
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    for node in graph_module.graph.nodes:
        source, operand, _ = operands(node)
        if not isinstance(source, Node) or not isinstance(operand, Node):
            continue
        weight, transposed = behind_transpose(operand)
        learned = parameters.get(str(weight.target)) if weight.op == "get_attr" else None
        if learned is None or names[id(learned)] > 1 or source.op == "get_attr":
            continue
        if readers(weight) != [node if weight is operand else operand] or len(operand.users) > 1:
            continue
        if has_own_kind(graph_module.get_submodule(str(weight.target).rpartition(".")[0])):
            continue
        if within_called(str(weight.target), graph_module.graph):
            continue
        layer = _layer(node, learned, transposed)
        if layer is not None:
            yield Product(node, weight, layer.train(graph_module.training))


def operands(node: Node) -> tuple[Any, Any, Any]:
    """The value, the weight and the bias of a product (rule 1), or three times None."""
    if node.op not in ("call_function", "call_method"):  # a module may be named matmul
        return None, None, None
    if node.target in LAYER_OF_CALL:
        names = enumerate(("input", "weight", "bias"))
        source, weight, bias = (argument(node, place, name) for place, name in names)
        return source, weight, bias
    if node.target in _PRODUCTS and len(node.args) == 2:
        return *node.args, None
    if node.target is torch.addmm and len(node.args) == 3 and not node.kwargs:
        bias, source, weight = node.args
        return source, weight, bias
    return None, None, None


def behind_transpose(operand: Node) -> tuple[Node, bool]:
    """The matrix that an operand transposes, and True; the operand itself, and False, if none."""
    swaps = _TRANSPOSES.get(operand.target)
    if swaps is None or operand.kwargs or not isinstance(operand.args[0], Node):
        return operand, False
    source, *axes = operand.args
    flat = axes[0] if len(axes) == 1 and isinstance(axes[0], tuple | list) else axes
    assert isinstance(source, Node)
    return (source, True) if tuple(flat) in swaps else (operand, False)


def _layer(node: Node, parameter: nn.Parameter, transposed: bool) -> nn.Module | None:
    """The layer that a parameter stands for in a call, without a bias; None if there is none."""
    kind: Any = LAYER_OF_CALL.get(node.target, nn.Linear)
    if kind is not nn.Linear:
        settings = {
            key: argument(node, 3 + place, key, usual)
            for place, (key, usual) in enumerate(SETTINGS)
        }
        flat = [each for value in settings.values() for each in pytree.tree_leaves(value)]
        if transposed or any(isinstance(each, Node) for each in flat):
            return None
        out_channels, in_channels, *kernel = parameter.shape
        in_channels *= settings["groups"]
        made = kind(in_channels, out_channels, kernel, bias=False, device="meta", **settings)
        made.weight = parameter
        return made  # type: ignore[no-any-return]
    if parameter.dim() != 2:
        return None
    weight = parameter
    if transposed == (node.target in LAYER_OF_CALL):  # F.linear transposes by itself
        weight = nn.Parameter(parameter.detach().mT.clone(), parameter.requires_grad)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    return linear


def _call(graph_module: GraphModule, product: Product) -> None:
    """Put the call of the layer in the place of the product, and the layer in the parameter's."""
    name, node = str(product.weight.target), product.node
    owner, _, leaf = name.rpartition(".")
    home = graph_module.get_submodule(owner)
    delattr(home, leaf)
    home.add_module(leaf, product.layer)
    reads = node.all_input_nodes
    source, _, bias = operands(node)
    with node.graph.inserting_before(node):
        # Its name must not depend on which other parameters become layers.
        call_name = f"{product.weight.name}_call"
        call = node.graph.create_node("call_module", name, (source,), name=call_name)
        if bias is not None:
            call = add_bias(call, bias, product.layer)
    replace_node(node, call, name)
    erase_unread(dict.fromkeys([*reads, product.weight]))
