"""Recurrent layers as ONNX's own operators RNN, LSTM and GRU, one node a layer of a stack.

torch's exporter freezes the length of a sequence for many of them. ONNX stacks the weights of the
directions, ``W [D, G H, C]``, ``R [D, G H, H]`` and ``B [D, 2 G H]`` for G gates, in an order of
gates of its own::

            torch        ONNX
    LSTM    i f g o      i o f c
    GRU     r z n        z r h

ONNX's LSTM has no projection ``h = P z``, but with ``z`` as its hidden state and ``R P`` in the
place of ``R`` it is the same recurrence, and ``P`` is applied to what it gives. A state ``h0`` that
is given becomes ``z0 = P+ h0`` with the pseudoinverse of ``P``, whose rows must be independent.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from lean_fx.cloning import COMPUTING, clone
from lean_fx.errors import CaptureError

_ORDERS = {nn.RNN: (0,), nn.LSTM: (0, 3, 1, 2), nn.GRU: (1, 0, 2)}


def with_onnx_operators(model: nn.Module) -> nn.Module:
    """A model whose recurrent layers export as ONNX's operators, and compute nothing elsewhere.

    Args:
        model: it stays as it is.

    Returns:
        A copy whose recurrent layers have another forward, and all that they had besides; the
        model itself if it has none, or cannot be copied.
    """
    if not any(map(_is_ours, model.modules())):
        return model
    try:
        copied = clone(model)
    except CaptureError:
        return model
    layers: list[Any] = [layer for layer in copied.modules() if _is_ours(layer)]
    for layer in layers:
        with torch.no_grad():
            for hook in layer._forward_pre_hooks.values():
                if isinstance(hook, COMPUTING):  # what it computed last may be of other weights
                    hook(layer, ())
        weights = [_weights(layer, index) for index in range(layer.num_layers)]
        for index, named in enumerate(weights):
            for name, value in named.items():
                layer.register_buffer(f"{name}_{index}", value)
        layer.forward = types.MethodType(_forward, layer)
    return copied


def _is_ours(layer: Any) -> bool:
    return type(layer) in _ORDERS and "forward" not in vars(layer)


def _forward(layer: Any, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
    """What a recurrent layer of torch gives in eval mode."""
    unbatched = input.dim() == 2
    pair = None if hx is None else (tuple(hx) if layer.mode == "LSTM" else (hx,))
    x = input.unsqueeze(1) if unbatched else input
    if pair is not None and unbatched:
        pair = tuple(state.unsqueeze(1) for state in pair)
    if layer.batch_first and not unbatched:
        x = x.transpose(0, 1)
    directions = 2 if layer.bidirectional else 1
    ends = []
    for index in range(layer.num_layers):
        rows = slice(index * directions, (index + 1) * directions)
        begin = None if pair is None else tuple(state[rows] for state in pair)
        x, *end = _one(layer, x, index, begin)
        ends.append(end)
    states = tuple(torch.cat(parts) for parts in zip(*ends, strict=True))
    if layer.batch_first and not unbatched:
        x = x.transpose(0, 1)
    if unbatched:
        x, states = x.squeeze(1), tuple(state.squeeze(1) for state in states)
    return x, states if layer.mode == "LSTM" else states[0]


def _one(layer: Any, x: Tensor, index: int, begin: tuple[Tensor, ...] | None) -> list[Tensor]:
    """The values and last states of one layer of a stack."""
    project, unproject = (getattr(layer, f"{name}_{index}", None) for name in ("P", "Q"))
    if unproject is not None and begin is not None:
        begin = (begin[0] @ unproject.mT, begin[1])
    directions, hidden = (2 if layer.bidirectional else 1), layer.hidden_size
    length, batch, _ = x.shape
    attributes: dict[str, Any] = {"hidden_size": hidden}
    if layer.bidirectional:
        attributes["direction"] = "bidirectional"
    if layer.mode == "GRU":
        attributes["linear_before_reset"] = 1
    if layer.mode == "RNN_RELU":
        attributes["activations"] = ["Relu"] * directions
    weights = [getattr(layer, f"{name}_{index}", None) for name in ("W", "R", "B")]
    count = 2 if layer.mode == "LSTM" else 1
    y, *states = torch.onnx.ops.symbolic_multi_out(
        type(layer).__name__,
        (x, *weights, None, *(begin or ())),
        attributes,
        dtypes=[x.dtype] * (1 + count),
        shapes=[(length, directions, batch, hidden)] + [(directions, batch, hidden)] * count,
        version=14,
    )
    if project is not None:
        y, states[0] = y @ project.mT, states[0] @ project.mT
    y = y.permute(0, 2, 1, 3).flatten(2) if directions == 2 else y.squeeze(1)
    return [y, *states]


def _weights(layer: Any, index: int) -> dict[str, Tensor]:
    """W, R and, with biases, B of one layer of a stack; with projections, P and its inverse Q."""
    suffixes = [f"_l{index}"] + [f"_l{index}_reverse"] * layer.bidirectional

    def each(name: str) -> list[Tensor]:
        return [getattr(layer, name + suffix).detach() for suffix in suffixes]

    def ordered(values: list[Tensor]) -> list[Tensor]:
        order = _ORDERS[type(layer)]
        gates = [value.chunk(len(order)) for value in values]
        return [torch.cat([gate[place] for place in order]) for gate in gates]

    found = {"W": torch.stack(ordered(each("weight_ih")))}
    recurrent = each("weight_hh")
    if layer.proj_size:
        found["P"] = torch.stack(each("weight_hr"))
        found["Q"] = torch.linalg.pinv(found["P"])
        recurrent = [r @ p for r, p in zip(recurrent, found["P"], strict=True)]
    found["R"] = torch.stack(ordered(recurrent))
    if layer.bias:
        pairs = zip(ordered(each("bias_ih")), ordered(each("bias_hh")), strict=True)
        found["B"] = torch.stack([torch.cat(pair) for pair in pairs])
    return found


def recurrence(operator: str, inputs: list[Tensor | None], options: dict[str, Any]) -> list[Tensor]:
    """What ONNX's RNN, LSTM or GRU gives, by the operator's own equations, one step at a time.

    Args:
        operator: ``"RNN"``, ``"LSTM"`` or ``"GRU"``.
        inputs: X, W, R, B, sequence_lens (None) and the initial states, None where missing.
        options: its attributes, as the layers' export sets them.

    Returns:
        Y, Y_h and, of an LSTM, Y_c.

    References:
        ONNX operators, versions 14 of RNN, LSTM and GRU.
    """
    x, w, r = (value for value in inputs[:3] if value is not None)
    _, _, _, b, _, *begin = [*inputs, None, None][:7]
    size = int(options["hidden_size"])
    squash = torch.relu if "Relu" in options.get("activations", ()) else torch.tanh
    ends = []
    for direction in range(w.shape[0]):
        wb, rb = b[direction].chunk(2) if b is not None else (x.new_zeros(w.shape[1]),) * 2
        h, c = (
            x.new_zeros(x.shape[1], size) if state is None else state[direction] for state in begin
        )
        values = []
        for row in x.flip(0) if direction else x:
            given, back = row @ w[direction].T + wb, h @ r[direction].T + rb
            if operator == "RNN":
                h = squash(given + back)
            elif operator == "GRU":
                z, reset = (given + back)[:, : 2 * size].sigmoid().chunk(2, 1)
                candidate = torch.tanh(given[:, 2 * size :] + reset * back[:, 2 * size :])
                h = (1 - z) * candidate + z * h
            else:
                i, o, f, g = (given + back).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            values.append(h)
        ends.append((torch.stack(values[::-1] if direction else values), h, c))
    y, y_h, y_c = zip(*ends, strict=True)
    states = [torch.stack(y_h), torch.stack(y_c)]
    return [torch.stack(y, 1), *states[: 2 if operator == "LSTM" else 1]]
