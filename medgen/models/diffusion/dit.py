"""The diffusion transformer with adaLN-Zero, Peebles & Xie 2023 (arXiv:2212.09748), as SiT trains it too (arXiv:2401.08740).

Built by networks.py. Without class labels: a block is told the time alone, and conditions come as input channels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medgen.models.diffusion.network_settings import DiTSettings

FREQUENCIES = 256  # numbers that a time becomes before the MLP
MAX_PERIOD = 10_000.0  # of those and of the positions; times go up to 1000
MLP_RATIO = 4
NORM_EPSILON = 1e-6


class DiT(nn.Module):
    """(images [N, C, size, size], time [N] in 0..1000) -> [N, channels_out, size, size]; exactly 0 before training.

    `blocks` are called one after the other as block(tokens [N, T, width], time [N, width])."""

    positions: Tensor

    def __init__(self, settings: DiTSettings, channels_in: int, channels_out: int, size: int):
        super().__init__()
        self.patch, self.channels_out = settings.patch, channels_out
        width = settings.width
        self.embed = nn.Conv2d(channels_in, width, settings.patch, stride=settings.patch)  # 2D
        # fixed by the settings, so no part of a checkpoint
        self.register_buffer("positions", grid_positions(size // settings.patch, width), persistent=False)
        self.time = TimeEmbedding(width)
        self.blocks = nn.ModuleList(Block(width, settings.heads, settings.qk_norm) for _ in range(settings.depth))
        self.last = LastLayer(width, settings.patch**2 * channels_out)  # 2D
        self._initialise()

    def forward(self, images: Tensor, time: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.positions
        condition = self.time(time)
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self._as_images(self.last(tokens, condition), images.shape[-2], images.shape[-1])

    def _as_images(self, patches: Tensor, height: int, width: int) -> Tensor:
        """[N, T, patch * patch * channels] back to [N, channels, height, width]. 2D."""
        rows, columns = height // self.patch, width // self.patch
        grid = patches.reshape(-1, rows, columns, self.patch, self.patch, self.channels_out)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.channels_out, height, width)

    def _initialise(self) -> None:
        """As published: what modulates and what leaves is 0, so that every block begins as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # the convolution is a linear layer of patches
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for layer in (self.time.first, self.time.second):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.last.linear.weight)
        for module in self.modules():
            if isinstance(module, Block | LastLayer):
                nn.init.zeros_(module.modulation.weight)


class Block(nn.Module):
    """Attention and an MLP, each scaled, shifted and gated by what the time says of it (adaLN-Zero)."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.attention_norm, self.mlp_norm = _plain_norm(width), _plain_norm(width)
        self.attention = Attention(width, heads, qk_norm)
        self.mlp = nn.Sequential(nn.Linear(width, MLP_RATIO * width), nn.GELU(approximate="tanh"), nn.Linear(MLP_RATIO * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        parts = self.modulation(F.silu(condition)).unsqueeze(1).chunk(6, dim=-1)
        attention_shift, attention_scale, attention_gate, mlp_shift, mlp_scale, mlp_gate = parts
        tokens = tokens + attention_gate * self.attention(self.attention_norm(tokens) * (1 + attention_scale) + attention_shift)
        return tokens + mlp_gate * self.mlp(self.mlp_norm(tokens) * (1 + mlp_scale) + mlp_shift)


class Attention(nn.Module):
    """Self-attention of tokens [N, T, width]; with qk_norm, queries and keys of each head are RMS-normed (arXiv:2302.05442)."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.query_norm, self.key_norm = (nn.RMSNorm(width // heads, NORM_EPSILON) if qk_norm else None for _ in range(2))
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        count, length, width = tokens.shape
        split = self.queries_keys_values(tokens).reshape(count, length, 3, self.heads, width // self.heads)
        queries, keys, values = split.permute(2, 0, 3, 1, 4)
        if self.query_norm is not None and self.key_norm is not None:  # in float32, also under autocast
            queries, keys = self.query_norm(queries.float()).to(values), self.key_norm(keys.float()).to(values)
        attended = F.scaled_dot_product_attention(queries, keys, values)
        attended = attended.transpose(1, 2).reshape(count, length, width)
        out: Tensor = self.out(attended)
        return out


class LastLayer(nn.Module):
    """Tokens [N, T, width] to the numbers of their patches [N, T, numbers], modulated by the time."""

    def __init__(self, width: int, numbers: int):
        super().__init__()
        self.norm = _plain_norm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, numbers)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(F.silu(condition)).unsqueeze(1).chunk(2, dim=-1)
        numbers: Tensor = self.linear(self.norm(tokens) * (1 + scale) + shift)
        return numbers


class TimeEmbedding(nn.Module):
    """Times [N] as cosines and sines, `numbers` together, through an MLP: [N, width]."""

    def __init__(self, width: int, numbers: int = FREQUENCIES):
        super().__init__()
        self.first, self.second = nn.Linear(numbers, width), nn.Linear(width, width)

    def forward(self, time: Tensor) -> Tensor:
        angles = time.float()[:, None] * _frequencies(self.first.in_features // 2, time.device)
        embedded: Tensor = self.second(F.silu(self.first(torch.cat([angles.cos(), angles.sin()], dim=1))))
        return embedded


def grid_positions(side: int, width: int) -> Tensor:
    """Fixed embeddings of a side x side grid, [1, side * side, width]: sines and cosines of the column, then of the row. 2D.

    The order is that of the published code; rows of the grid follow each other."""
    angles = torch.arange(side)[:, None] * _frequencies(width // 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1)[None]


def _frequencies(count: int, device: torch.device | None = None) -> Tensor:
    """From 1 down towards 1 / MAX_PERIOD, evenly in the logarithm, [count]."""
    return torch.exp(-math.log(MAX_PERIOD) / count * torch.arange(count, device=device))


def _plain_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, NORM_EPSILON, elementwise_affine=False)
