"""Recurrent layers as ONNX's own operators RNN, LSTM and GRU, one node a layer of a stack.

torch's exporter freezes the length of a sequence for many of them. ONNX stacks the weights of the
directions, ``W [D, G H, C]``, ``R [D, G H, H]`` and ``B [D, 2 G H]`` for G gates, in an order of
gates of its own::

            torch        ONNX
    LSTM    i f g o      i o f c
    GRU     r z n        z r h

An LSTM with projections has no such operator: its steps are written one by one, for the length of
the example inputs alone.
"""

from __future__ import annotations

import copy
import types
from typing import Any

import torch
from torch import Tensor, nn

from lean_fx.errors import ExportError

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
        copied = copy.deepcopy(model)
    except Exception:  # whatever a module's own __deepcopy__ raises
        return model
    layers: list[Any] = [layer for layer in copied.modules() if _is_ours(layer)]
    for layer in layers:
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
    if layer.proj_size:
        return _projected(layer, index, x, begin)
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
    y = y.permute(0, 2, 1, 3).flatten(2) if directions == 2 else y.squeeze(1)
    return [y, *states]


def _weights(layer: Any, index: int) -> dict[str, Tensor]:
    """W, R and, with biases, B of one layer of a stack."""
    suffixes = [f"_l{index}"] + [f"_l{index}_reverse"] * layer.bidirectional

    def ordered(name: str) -> list[Tensor]:
        order = _ORDERS[type(layer)]
        gates = [getattr(layer, name + suffix).detach().chunk(len(order)) for suffix in suffixes]
        return [torch.cat([each[place] for place in order]) for each in gates]

    found = {"W": torch.stack(ordered("weight_ih")), "R": torch.stack(ordered("weight_hh"))}
    if layer.bias:
        pairs = zip(ordered("bias_ih"), ordered("bias_hh"), strict=True)
        found["B"] = torch.stack([torch.cat(pair) for pair in pairs])
    return found


def _projected(layer: Any, index: int, x: Tensor, begin: tuple[Tensor, ...] | None) -> list[Tensor]:
    """One layer of an LSTM with projections, step by step."""
    # torch tries a dynamo trace too where this fails, and that would freeze the length.
    if torch.compiler.is_dynamo_compiling() or not isinstance(x.shape[0], int):
        raise ExportError(
            "an LSTM with projections has the length of the example inputs; leave that axis out of "
            "dynamic_shapes"
        )
    outputs, hidden, cells = [], [], []
    for direction, suffix in enumerate(["", "_reverse"][: 2 if layer.bidirectional else 1]):
        w, r, p = (getattr(layer, f"weight_{kind}_l{index}{suffix}") for kind in ("ih", "hh", "hr"))
        bias = 0
        if layer.bias:
            bias = sum(getattr(layer, f"bias_{kind}_l{index}{suffix}") for kind in ("ih", "hh"))
        if begin is None:
            h, c = x.new_zeros(x.shape[1], p.shape[0]), x.new_zeros(x.shape[1], p.shape[1])
        else:
            h, c = (state[direction] for state in begin)
        steps = range(x.shape[0])
        values = []
        for step in reversed(steps) if direction else steps:
            i, f, g, o = (x[step] @ w.T + h @ r.T + bias).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = (o.sigmoid() * c.tanh()) @ p.T
            values.append(h)
        outputs.append(torch.stack(values[::-1] if direction else values))
        hidden.append(h)
        cells.append(c)
    return [torch.cat(outputs, -1), torch.stack(hidden), torch.stack(cells)]


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
