"""Multiply-adds (MACs) of one call, from the shapes of what it reads and writes.

An oracle for the tests of :mod:`lean_fx.measure.costs`, which counts the operators that run.
Positions are pixels, time steps or samples::

    convolution, linear       elements written x weights of one output channel
    transposed convolution    elements read x weights of one input channel
    bilinear                  elements written x weights of one output
    RNN, LSTM, GRU, cells     positions x the elements of all weight matrices: of the inputs, of
                              the states and of the projections, of all layers and directions
    attention                 queries x keys x (width of the keys + width of the values), a head,
                              and the linear projections of a layer; a mask saves nothing
    matrix product            elements written x the length that is summed over
    einsum of two operands    the product of the sizes of all axes, but those of one operand alone
                              that are summed away before; 0 if no axis is summed over
    reduction                 positions x macs_per_position
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from lean_fx.capture.capturing import capture
from lean_fx.graph.calls import is_altered
from lean_fx.layers.kinds import KINDS, groups_of, input_channels, kind_of
from lean_fx.measure.costs_table import Costs, NodeCost
from lean_fx.reduction.registry import is_reduction


def layer_macs(layer: nn.Module, read: int, written: int) -> int:
    """MACs of a layer of some kind that reads and writes so many elements."""
    kind = kind_of(layer)
    assert kind is not None
    return kind.macs(layer, read, written)


def nodes_that_differ(costs: Costs, model: nn.Module, inputs: Tensor) -> list[NodeCost]:
    """The nodes whose count is not what the formula says, where there is one."""
    run = _Run(capture(nn.Sequential(model), (inputs,), purpose="evaluation"))
    with torch.no_grad():
        run.run(inputs)
    nodes = [node for node in costs.nodes if node.kind != "check_absent"]  # inputs of the root only
    assert any(run.macs) == (costs.macs > 0)
    pairs = zip(nodes, run.macs, strict=True)
    return [node for node, macs in pairs if macs not in (None, node.macs)]


class _Run(Interpreter):
    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__(graph_module)
        self.macs: list[int | None] = []

    def run_node(self, n: Node) -> Any:
        output = super().run_node(n)
        if n.op.startswith("call_"):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            target = self.fetch_attr(str(n.target)) if n.op == "call_module" else n.target
            self.macs.append(call_macs(target, args, kwargs, output))
        return output


def call_macs(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> int | None:
    """MACs of one call by formula; None where there is none.

    Args:
        target: a module, a function, or the name of a method of tensors. A module of a subclass
            has no formula, since its forward may mean anything; a reduction has its own.
        args: what it was called with.
        kwargs: the same, by name.
        output: what it returned.

    Example:
        >>> x, y = torch.zeros(5, 2, 3), torch.zeros(3, 4)
        >>> call_macs(torch.matmul, (x, y), {}, x @ y)
        120
        >>> call_macs(torch.add, (x, 1), {}, x) is None
        True
    """
    if isinstance(target, nn.Module):
        if isinstance(getattr(target, "macs_per_position", None), int):
            return _reduction(target, *args, **kwargs)
        given = inspect.signature(target.forward).bind(*args, **kwargs).arguments
        reduction = target._modules.get("reduction")
        if is_reduction(reduction) and type(target) in KINDS:
            return _swapped(target, reduction, given, output)
        return _module_macs(target, given, output)
    formula = _FUNCTIONS.get(target)
    return formula(_Given(args, kwargs), output) if formula else None


def _swapped(layer: nn.Module, reduction: Any, given: dict[str, Any], output: Any) -> int:
    """A layer that reduces its own input (:class:`~lean_fx.passes.SwapLayers`)."""
    value = next(iter(given.values())).data
    positions = value.numel() // int(reduction.in_channels)  # of each group
    reduced = positions * (input_channels(layer) // groups_of(layer))
    return layer_macs(layer, reduced, _numel(output)) + _reduction(reduction, value)


def _module_macs(layer: nn.Module, given: dict[str, Any], output: Any) -> int | None:
    formula = _layer if type(layer) in KINDS else _MODULES.get(type(layer))
    return formula(layer, given, output) if formula and not is_altered(layer) else None


def _reduction(module: Any, x: Tensor) -> int:
    return int(module.macs_per_position) * (x.numel() // int(module.in_channels))


def _layer(layer: nn.Module, given: dict[str, Any], output: Any) -> int:
    value = next(iter(given.values())).data  # of packed sequences, too
    return layer_macs(layer, value.numel(), _numel(output))


def _numel(output: Any) -> int:
    return output.numel() if isinstance(output, Tensor) else 0


def _bilinear(layer: Any, given: dict[str, Any], output: Tensor) -> int:
    return int(output.numel() * layer.weight[0].numel())


def _attention(layer: Any, given: dict[str, Any], output: Any = None) -> int:
    query, key = given["query"], given["key"]
    length = key.shape[1 if layer.batch_first and key.dim() == 3 else 0]
    length += (layer.bias_k is not None) + layer.add_zero_attn
    queries, keys = query.numel() // layer.embed_dim, key.numel() // layer.kdim
    projected = queries * 2 * layer.embed_dim + keys * (layer.kdim + layer.vdim)
    return int((projected + 2 * queries * length) * layer.embed_dim)


def _encoder_layer(layer: Any, given: dict[str, Any], output: Any = None) -> int | None:
    x = given["src"]
    return _block(layer, x, [(layer.self_attn, x)])


def _decoder_layer(layer: Any, given: dict[str, Any], output: Any = None) -> int | None:
    x = given["tgt"]
    return _block(layer, x, [(layer.self_attn, x), (layer.multihead_attn, given["memory"])])


def _block(layer: Any, x: Tensor, attended: list[tuple[Any, Tensor]]) -> int | None:
    """Attention of ``x`` to each value, then two linear layers; None if either was replaced."""
    linear = (layer.linear1, layer.linear2)
    replaced = any(type(each) is not nn.Linear for each in linear)
    if replaced or any(type(each) is not nn.MultiheadAttention for each, _ in attended):
        return None
    tokens = x.numel() // int(layer.self_attn.embed_dim)
    products = sum(_attention(each, {"query": x, "key": value}) for each, value in attended)
    weights: int = sum(each.weight.numel() for each in linear)
    return products + tokens * weights


def _stack(model: Any, given: dict[str, Any], output: Any = None) -> int | None:
    """The layers of a TransformerEncoder or TransformerDecoder; each reads what the first does."""
    counts = [_module_macs(layer, given, None) for layer in model.layers]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _transformer(model: nn.Transformer, given: dict[str, Any], output: Any) -> int | None:
    encoder = _module_macs(model.encoder, {"src": given["src"]}, None)
    decoder = _module_macs(model.decoder, {"tgt": given["tgt"], "memory": given["src"]}, None)
    return None if encoder is None or decoder is None else encoder + decoder


_MODULES: dict[type[nn.Module], Callable[[Any, dict[str, Any], Any], int | None]] = {
    nn.Bilinear: _bilinear,
    nn.MultiheadAttention: _attention,
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.TransformerDecoderLayer: _decoder_layer,
    nn.TransformerEncoder: _stack,
    nn.TransformerDecoder: _stack,
    nn.Transformer: _transformer,
}


class _Given:
    """The arguments of a function without a signature."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs

    def __call__(self, position: int, *names: str) -> Any:
        if position < len(self.args):
            return self.args[position]
        return next(self.kwargs[name] for name in names if name in self.kwargs)


def _weights(given: _Given, output: Tensor) -> int:
    return int(output.numel() * given(1, "weight")[0].numel())


def _transposed(given: _Given, output: Tensor) -> int:
    return int(given(0, "input").numel() * given(1, "weight")[0].numel())


def _bilinear_function(given: _Given, output: Tensor) -> int:
    return int(output.numel() * given(2, "weight")[0].numel())


def _product(given: _Given, output: Tensor) -> int:
    return int(output.numel() * given(0, "input", "self").shape[-1])


def _added_product(given: _Given, output: Tensor) -> int:
    return int(output.numel() * given(1, "mat1", "batch1", "mat").shape[-1])


def _summed_products(given: _Given, output: Tensor) -> int:
    batches, length = given(1, "batch1").shape[::2]
    return int(output.numel() * batches * length)


def _vector_products(given: _Given, output: Tensor) -> int:
    x, y = given(0, "x"), given(1, "y")
    axis = given.kwargs.get("dim", -1)
    return int(output.numel() * torch.broadcast_shapes(x.shape, y.shape)[axis])  # type: ignore[no-untyped-call]


def _sparse_product(given: _Given, output: Tensor) -> int | None:
    """Each element that is stored by a row of the other matrix."""
    x, y = given.args[:2]
    sparse = x.layout is torch.sparse_coo and y.layout is torch.strided
    return int(x._nnz() * y.shape[-1]) if sparse else None


def _attended(given: _Given, output: Tensor) -> int:
    query, key = given(0, "query"), given(1, "key")
    queries = output.numel() // output.shape[-1]
    return int(queries * key.shape[-2] * (query.shape[-1] + output.shape[-1]))


def _einsum(given: _Given, output: Tensor) -> int | None:
    equation, *operands = given.args
    if not isinstance(equation, str):
        return None
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    terms, arrow, written = equation.replace(" ", "").partition("->")
    read = terms.split(",")
    repeated = any(len(set(term)) < len(term) for term in read)
    if not arrow or "." in equation or repeated or len(read) > 2:
        return None
    sizes: dict[str, int] = {}
    for term, x in zip(read, operands, strict=True):
        for axis, size in zip(term, x.shape, strict=True):
            if sizes.get(axis, 1) == 1:  # which is broadcast
                sizes[axis] = size
    shared = set(read[0]).intersection(*read[1:])
    if len(read) == 1 or shared <= set(written):
        return 0
    return math.prod(sizes[axis] for axis in shared | set(written))


_FUNCTIONS: dict[Any, Callable[[_Given, Any], int | None]] = {
    **dict.fromkeys((F.linear, F.conv1d, F.conv2d, F.conv3d), _weights),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _transposed),
    F.bilinear: _bilinear_function,
    **dict.fromkeys((operator.matmul, torch.matmul, torch.linalg.matmul, "matmul"), _product),
    **dict.fromkeys((torch.mm, "mm", torch.bmm, "bmm", torch.mv, "mv"), _product),
    **dict.fromkeys((torch.dot, "dot", torch.inner, "inner"), _product),
    **dict.fromkeys((torch.vdot, "vdot"), _product),
    torch.linalg.vecdot: _vector_products,
    torch.sparse.mm: _sparse_product,
    **dict.fromkeys((torch.addmm, "addmm", torch.baddbmm, "baddbmm"), _added_product),
    **dict.fromkeys((torch.addmv, "addmv"), _added_product),
    **dict.fromkeys((torch.addbmm, "addbmm"), _summed_products),
    F.scaled_dot_product_attention: _attended,
    torch.einsum: _einsum,
}
