"""torch's Transformer modules without fused calls, so that a graph shows the layers inside.

In evaluation, torch may run a whole encoder layer as one fused call, depending on the inputs;
torch.fx treats these modules as leaves. The classes here always take the path of training, which
calls each layer. Rules:

1. They use no nested tensors. At positions padded by ``src_key_padding_mask`` the outputs are those
   of training, where torch in evaluation may return zeros. No other position reads them.
2. They do not search the numbers of a mask to see whether it is causal. ``is_causal`` is only a
   hint to use a faster kernel; without it the mask itself is applied.
3. They check no sizes: the layer that reads a wrong batch size or width raises.
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
        """Self-attention, then two linear layers."""
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
    """A :class:`torch.nn.TransformerDecoderLayer`, which torch.fx does not treat as a leaf."""


class PlainDecoder(nn.TransformerDecoder):
    """A :class:`torch.nn.TransformerDecoder` that does not search masks for causality."""

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
    """A :class:`torch.nn.Transformer` that does not check the sizes of its inputs."""

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
        """The encoder, then the decoder, which reads its output."""
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


#: For each of torch's classes, the one without fused calls.
UNFUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.TransformerEncoderLayer: PlainEncoderLayer,
    nn.TransformerEncoder: PlainEncoder,
    nn.TransformerDecoderLayer: PlainDecoderLayer,
    nn.TransformerDecoder: PlainDecoder,
    nn.Transformer: PlainTransformer,
}
