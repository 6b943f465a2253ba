"""Nets beyond vision, small, written as their users write them, with torch alone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalAttention(nn.Module):
    """Attention written by hand: one layer for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


class DecoderBlock(nn.Module):
    """Norm first: attention, then an MLP, each beside the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """A GPT: tokens ``[N, L]`` to logits of the next ones ``[N, L, tokens]``; the head is tied."""

    def __init__(
        self, tokens: int, width: int = 32, heads: int = 4, depth: int = 2, length: int = 32
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(tokens, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.token.weight
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class EncoderBlock(nn.Module):
    """Norm last, as in BERT; padding is masked."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, dropout=0.1, batch_first=True)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)
        x = self.norm1(x + self.dropout(y))
        return self.norm2(x + self.dropout(self.linear2(F.gelu(self.linear1(x)))))


class Encoder(nn.Module):
    """A BERT: tokens ``[N, L]``, 0 for padding, and segments alike, to logits ``[N, classes]``."""

    def __init__(
        self,
        tokens: int,
        classes: int,
        width: int = 32,
        heads: int = 4,
        depth: int = 2,
        length: int = 32,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(tokens, width, padding_idx=0)
        self.segment = nn.Embedding(2, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, length, width))
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(depth))
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, tokens: Tensor, segments: Tensor) -> Tensor:
        padding = tokens == 0
        x = self.token(tokens) + self.segment(segments) + self.position[:, : tokens.size(1)]
        x = self.norm(x)
        for block in self.blocks:
            x = block(x, padding)
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


def conv_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two convolutions, each with a norm and ReLU."""
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers += [
            nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Pictures ``[N, C, H, W]``, sides multiples of 4, to a logit a pixel and class."""

    def __init__(self, in_channels: int = 1, classes: int = 1, width: int = 16) -> None:
        super().__init__()
        self.down1 = conv_block(in_channels, width)
        self.down2 = conv_block(width, 2 * width)
        self.pool = nn.MaxPool2d(2)
        self.bottom = conv_block(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.merge2 = conv_block(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge1 = conv_block(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip1 = self.down1(x)
        skip2 = self.down2(self.pool(skip1))
        x = self.bottom(self.pool(skip2))
        x = self.merge2(torch.cat([skip2, self.up2(x)], dim=1))
        x = self.merge1(torch.cat([skip1, self.up1(x)], dim=1))
        return self.head(x)


def mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class MixerBlock(nn.Module):
    """Mixes the patches, then the channels."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.patches = mlp(patches, 2 * patches)
        self.norm2 = nn.LayerNorm(width)
        self.channels = mlp(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.patches(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """An MLP-Mixer: pictures ``[N, C, side, side]`` to logits ``[N, classes]``."""

    def __init__(
        self,
        side: int = 8,
        patch: int = 2,
        in_channels: int = 1,
        classes: int = 10,
        width: int = 32,
        depth: int = 2,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, patch, stride=patch)
        blocks = [MixerBlock((side // patch) ** 2, width) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


class TabularMLP(nn.Module):
    """Numbers ``[N, columns]`` and categories ``[N, len(sizes)]`` to one value a row ``[N]``."""

    def __init__(self, columns: int, sizes: tuple[int, ...], width: int = 64) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, 8) for size in sizes)
        self.norm = nn.BatchNorm1d(columns)
        self.layers = nn.Sequential(
            nn.Linear(columns + 8 * len(sizes), width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(width, 1),
        )

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        parts = [embed(categories[:, i]) for i, embed in enumerate(self.embeddings)]
        x = torch.cat([self.norm(numbers), *parts], dim=1)
        return self.layers(x).squeeze(1)


class AudioNet(nn.Module):
    """Samples ``[N, 1, L]`` to logits ``[N, classes]``, by 1-D convolutions as in M5."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for out_channels, kernel, stride in ((width, 32, 4), (2 * width, 3, 1), (4 * width, 3, 1)):
            layers += [
                nn.Conv1d(channels, out_channels, kernel, stride=stride),
                nn.BatchNorm1d(out_channels),
                nn.ReLU(),
                nn.MaxPool1d(2),
            ]
            channels = out_channels
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)

    def forward(self, samples: Tensor) -> Tensor:
        x = self.features(samples)
        x = F.adaptive_avg_pool1d(x, 1).squeeze(-1)
        return self.head(x)


class VolumeNet(nn.Module):
    """Volumes or clips ``[N, C, D, H, W]`` to logits ``[N, classes]``."""

    def __init__(self, in_channels: int = 1, classes: int = 3, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, width, 3, padding=1)
        self.norm1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, 2 * width, 3, padding=1)
        self.norm2 = nn.BatchNorm3d(2 * width)
        self.pool = nn.MaxPool3d(2)
        self.fc = nn.Linear(2 * width * 2 * 2 * 2, 64)
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.norm1(self.conv1(x))))
        x = self.pool(F.relu(self.norm2(self.conv2(x))))
        x = torch.flatten(x, 1)
        return self.head(F.relu(self.fc(x)))
