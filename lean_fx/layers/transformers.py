"""torch's Transformer modules in plain steps, which a graph can show.

In evaluation torch may run a whole encoder layer as one fused call, and asks the inputs whether it
may; torch.fx takes each such module for a leaf. The classes here compute the same by torch's other
way, that of training, so that the layers inside are called one by one. Rules:

1. No nested tensors: at positions that ``src_key_padding_mask`` pads, outputs are what they are in
   training, where torch in evaluation may give zeros. No other position reads them.
2. Whether a mask is causal is not looked up in its numbers: ``is_causal`` is a hint to a faster
   kernel, and without it the mask itself is used.
3. A batch size or a width that does not fit is refused by the layer that reads it.
"""

from __future__ import annotations

from torch import Tensor, nn


class PlainEncoderLayer(nn.TransformerEncoderLayer):
    """A :class:`torch.nn.TransformerEncoderLayer` without the fused call."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attention to itself, then two linear layers."""
        given = src_mask, src_key_padding_mask, is_causal
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), *given)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, *given))
        normed: Tensor = self.norm2(x + self._ff_block(x))
        return normed


class PlainEncoder(nn.TransformerEncoder):
    """A :class:`torch.nn.TransformerEncoder` without nested tensors."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """The layers in turn, and the norm if there is one."""
        for layer in self.layers:
            src = layer(
                src,
                src_mask=mask,
                is_causal=is_causal is True,
                src_key_padding_mask=src_key_padding_mask,
            )
        return src if self.norm is None else self.norm(src)


class PlainDecoderLayer(nn.TransformerDecoderLayer):
    """A :class:`torch.nn.TransformerDecoderLayer`, plain as it is, that torch.fx looks into."""


class PlainDecoder(nn.TransformerDecoder):
    """A :class:`torch.nn.TransformerDecoder` that asks no mask whether it is causal."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The layers in turn, and the norm if there is one."""
        for layer in self.layers:
            tgt = layer(
                tgt,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=tgt_is_causal is True,
                memory_is_causal=memory_is_causal,
            )
        return tgt if self.norm is None else self.norm(tgt)


class PlainTransformer(nn.Transformer):
    """A :class:`torch.nn.Transformer` that asks no input for its size."""

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """The encoder, and the decoder, which reads what it gives."""
        memory = self.encoder(
            src,
            mask=src_mask,
            src_key_padding_mask=src_key_padding_mask,
            is_causal=src_is_causal,
        )
        decoded: Tensor = self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )
        return decoded


#: The plain class for each of torch's.
UNFUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.TransformerEncoderLayer: PlainEncoderLayer,
    nn.TransformerEncoder: PlainEncoder,
    nn.TransformerDecoderLayer: PlainDecoderLayer,
    nn.TransformerDecoder: PlainDecoder,
    nn.Transformer: PlainTransformer,
}
