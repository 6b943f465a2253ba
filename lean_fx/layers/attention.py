"""A :class:`torch.nn.MultiheadAttention` as modules: its linear layers, and the heads between."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

# torch.fx's own tracer meets one call, not what is inside: it depends on the rank of the query.
torch.fx.wrap("attend")


class AttentionHeads(nn.Module):
    """A MultiheadAttention without its linear layers.

    It reads queries, keys and values that are already projected; the output projection follows it.
    Masks, flags, dropout and results are those of MultiheadAttention.

    Args:
        attention: the layer that gives the settings, and ``bias_k`` and ``bias_v`` if it has them.

    Shape:
        - query: ``[L, E]``, ``[L, N, E]`` or, if ``batch_first``, ``[N, L, E]``
        - key, value: the same, with ``S`` in place of ``L``
        - output: as the query; and the weights ``[N, L, S]`` or ``[N, heads, L, S]``, or None

    Example:
        >>> layer = nn.MultiheadAttention(8, 2, batch_first=True)
        >>> query, key = torch.rand(3, 5, 8), torch.rand(3, 7, 8)
        >>> output, weights = AttentionHeads(layer)(query, key, key)
        >>> output.shape, weights.shape
        (torch.Size([3, 5, 8]), torch.Size([3, 5, 7]))
    """

    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.dropout = attention.dropout
        self.batch_first = attention.batch_first
        self.add_zero_attn = attention.add_zero_attn
        for name in ("bias_k", "bias_v"):
            self.register_parameter(name, getattr(attention, name))
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; the arguments are those of :class:`torch.nn.MultiheadAttention`.

        Raises:
            RuntimeError: ``is_causal`` without ``attn_mask``, as there.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        return attend(
            query,
            key,
            value,
            key_padding_mask,
            attn_mask,
            self.bias_k,
            self.bias_v,
            num_heads=self.num_heads,
            dropout=self.dropout if self.training else 0.0,
            batch_first=self.batch_first,
            add_zero_attn=self.add_zero_attn,
            need_weights=need_weights,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )

    def extra_repr(self) -> str:
        """The settings that differ from the default."""
        options = {"dropout": (self.dropout, 0.0), "batch_first": (self.batch_first, False)}
        options["add_zero_attn"] = (self.add_zero_attn, False)
        changed = [f", {name}={now!r}" for name, (now, usual) in options.items() if now != usual]
        return f"num_heads={self.num_heads}{''.join(changed)}"


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    *,
    num_heads: int,
    dropout: float,
    batch_first: bool,
    add_zero_attn: bool,
    need_weights: bool,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """The forward of :class:`AttentionHeads`, whose arguments and attributes it takes."""
    batched = query.dim() == 3
    if not batched:
        query, key, value = (each.unsqueeze(0) for each in (query, key, value))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
    elif not batch_first:
        query, key, value = (each.transpose(0, 1) for each in (query, key, value))
    if bias_k is not None and bias_v is not None:
        key = torch.cat([key, bias_k.expand(key.shape[0], -1, -1)], 1)
        value = torch.cat([value, bias_v.expand(value.shape[0], -1, -1)], 1)

    # [N, L, E] as [N, heads, L, E / heads]
    parts = (torch.unflatten(each, 2, (num_heads, -1)) for each in (query, key, value))
    q, k, v = (each.transpose(1, 2) for each in parts)
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    hint = is_causal and key_padding_mask is None and not need_weights
    mask = None if hint else _mask(attn_mask, key_padding_mask, q, k)

    weights: Tensor | None = None
    if need_weights:
        scores = q * q.shape[-1] ** -0.5 @ k.mT
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, dropout, dropout > 0)
        out = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=hint)
    out = out.transpose(1, 2).flatten(2)
    if not batched:
        return out.squeeze(0), None if weights is None else weights.squeeze(0)
    return out if batch_first else out.transpose(0, 1), weights


def _mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor
) -> Tensor | None:
    """The sum of both masks, to be added to the scores ``[N, heads, L, S]``."""
    parts = []
    if attn_mask is not None:
        grouped = attn_mask.dim() == 3  # a mask for each head of each sequence
        each = (-1, q.shape[1], *attn_mask.shape[1:])
        parts.append(attn_mask.reshape(each) if grouped else attn_mask)
    if key_padding_mask is not None:
        parts.append(key_padding_mask[:, None, None])
    masks = []
    for part in parts:
        if part.dtype == torch.bool:
            part = torch.zeros_like(part, dtype=q.dtype).masked_fill_(part, -torch.inf)
        more = k.shape[2] - part.shape[-1]  # keys of bias_k, and of zeros
        masks.append(F.pad(part, (0, more)) if more else part)
    return sum(masks[1:], masks[0]) if masks else None


class SplitAttention(nn.Module):
    """A MultiheadAttention whose linear layers are modules.

    Its parts are ``in_proj``, or ``q_proj``, ``k_proj`` and ``v_proj``; then ``heads`` and
    ``out_proj``. The weights and the attributes are those of the layer.

    Args:
        attention: the layer.
        self_attention: whether there is one value as queries, keys and values: then it
            has ``in_proj``. A call with several values is right too, but projects each three times.

    Shape:
        As the layer's.

    Example:
        >>> layer = nn.MultiheadAttention(8, 2)
        >>> x = torch.rand(5, 3, 8)
        >>> split = SplitAttention(layer, self_attention=True)
        >>> torch.allclose(split(x, x, x)[0], layer(x, x, x)[0], atol=1e-6)
        True
    """

    in_proj: nn.Module
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    heads: nn.Module
    out_proj: nn.Module

    def __init__(self, attention: nn.MultiheadAttention, *, self_attention: bool) -> None:
        super().__init__()
        for name, value in vars(attention).items():  # such as embed_dim and batch_first
            if name not in vars(self):
                self.__dict__[name] = value
        for name in ("in_proj_weight", "in_proj_bias"):  # torch's encoder layers read them
            self.register_parameter(name, None)
        for name, part in attention_parts(attention, self_attention=self_attention):
            self.add_module(name, part)
        self.train(attention.training)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; the arguments are those of :class:`torch.nn.MultiheadAttention`."""
        out, weights = self.heads(*self._projected(query, key, value), *args, **kwargs)
        return self.out_proj(out), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if "q_proj" in self._modules:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if query is key is value:
            return self.in_proj(query).chunk(3, -1)  # type: ignore[no-any-return]
        given = (query, key, value)
        return tuple(self.in_proj(each).chunk(3, -1)[third] for third, each in enumerate(given))


def attention_parts(layer: Any, *, self_attention: bool) -> Iterable[tuple[str, nn.Module]]:
    """The parts of a MultiheadAttention, with its weights, by name and in order.

    Args:
        layer: the MultiheadAttention.
        self_attention: whether there is one value for queries, keys and values.
    """
    for name, weight, bias in _projections(layer, self_attention):
        yield name, _linear(weight, bias, layer.training)
    yield "heads", AttentionHeads(layer)
    yield "out_proj", _linear(layer.out_proj.weight, layer.out_proj.bias, layer.training)


def _projections(
    layer: Any, self_attention: bool
) -> Iterable[tuple[str, nn.Parameter, nn.Parameter]]:
    """The names, weights and biases of the projections before the heads."""
    bias = layer.in_proj_bias
    if self_attention:
        yield "in_proj", layer.in_proj_weight, bias
        return
    biases = (None,) * 3 if bias is None else _thirds(bias)
    names = ("q_proj", "k_proj", "v_proj")
    if layer.in_proj_weight is not None:
        weights = _thirds(layer.in_proj_weight)
    else:
        weights = tuple(layer.get_parameter(f"{name}_weight") for name in names)
    yield from zip(names, weights, biases, strict=True)


def _thirds(parameter: nn.Parameter) -> tuple[nn.Parameter, ...]:
    learns = parameter.requires_grad
    return tuple(nn.Parameter(x.clone(), learns) for x in parameter.detach().chunk(3))


def _linear(weight: nn.Parameter, bias: nn.Parameter | None, training: bool) -> nn.Linear:
    """A linear layer that holds the given parameters."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight, made.bias = weight, bias  # type: ignore[assignment]
    return made.train(training)
