"""What lies between the linear layers of :class:`torch.nn.MultiheadAttention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AttentionHeads(nn.Module):
    """Attention of projected queries to projected keys and values, in several heads.

    A MultiheadAttention without its linear layers: those of the queries, keys and values come
    before it, the output projection behind it. Masks, flags, dropout and what is returned are as
    there.

    Args:
        attention: the layer whose settings, and ``bias_k`` and ``bias_v`` if any, it takes over.

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
        batched = query.dim() == 3
        if not batched:
            query, key, value = (each.unsqueeze(0) for each in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (each.transpose(0, 1) for each in (query, key, value))
        if self.bias_k is not None and self.bias_v is not None:
            key = torch.cat([key, self.bias_k.expand(key.shape[0], -1, -1)], 1)
            value = torch.cat([value, self.bias_v.expand(value.shape[0], -1, -1)], 1)

        q, k, v = (self._heads(each) for each in (query, key, value))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        hint = is_causal and key_padding_mask is None and not need_weights
        mask = None if hint else self._mask(attn_mask, key_padding_mask, q, k)

        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q * q.shape[-1] ** -0.5 @ k.mT
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout, self.training)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=hint)
        out = out.transpose(1, 2).flatten(2)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _heads(self, x: Tensor) -> Tensor:
        """``[N, L, E]`` as ``[N, heads, L, E / heads]``."""
        return x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor
    ) -> Tensor | None:
        """What is added to the scores ``[N, heads, L, S]``: both masks in one."""
        parts = []
        if attn_mask is not None:
            grouped = attn_mask.dim() == 3  # a mask for each head of each sequence
            each = (-1, self.num_heads, *attn_mask.shape[1:])
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

    def extra_repr(self) -> str:
        """The settings, those alone that are not the default."""
        options = {"dropout": (self.dropout, 0.0), "batch_first": (self.batch_first, False)}
        options["add_zero_attn"] = (self.add_zero_attn, False)
        changed = [f", {name}={now!r}" for name, (now, usual) in options.items() if now != usual]
        return f"num_heads={self.num_heads}{''.join(changed)}"
