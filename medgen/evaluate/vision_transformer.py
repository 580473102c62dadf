"""The vision transformer of DINOv2 for evaluation, in the layout of its published weights. Used by extractors.py.

Oquab et al. 2023, arXiv:2304.07193; with registers Darcet et al. 2023, arXiv:2309.16588. Written here because the published code needs a
package of its own and the weights' names follow it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

PATCH_PIXELS = 14
PUBLISHED_GRID = 37  # patches a side of the 518 px that the position embeddings are for
NORM_EPSILON = 1e-6
GRID_OFFSET = 0.1  # the published code scales the grid by (patches + 0.1) / 37, which shifts every position a little
MLP_FACTOR = 4


@dataclass(frozen=True)
class Shape:
    width: int
    depth: int
    heads: int
    registers: int = 0


SHAPES = {
    "vits14": Shape(384, 12, 6), "vitb14": Shape(768, 12, 12), "vitl14": Shape(1024, 24, 16),
    "vits14_reg": Shape(384, 12, 6, 4), "vitb14_reg": Shape(768, 12, 12, 4), "vitl14_reg": Shape(1024, 24, 16, 4),
}  # fmt: skip


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        count, length, width = tokens.shape
        query, key, value = self.qkv(tokens).view(count, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(seen.transpose(1, 2).reshape(count, length, width))


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_FACTOR * width)
        self.fc2 = nn.Linear(MLP_FACTOR * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(tokens)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, NORM_EPSILON)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, NORM_EPSILON)
        self.mlp = Mlp(width)
        self.ls2 = LayerScale(width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))


class PatchEmbedding(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH_PIXELS, PATCH_PIXELS)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """[n, 3, h, w], sides multiples of 14, to the normalised class token [n, width]."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + PUBLISHED_GRID**2, shape.width))
        self.register_tokens = nn.Parameter(torch.zeros(1, shape.registers, shape.width)) if shape.registers else None
        self.patch_embed = PatchEmbedding(shape.width)
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width, NORM_EPSILON)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images)
        rows, columns = images.shape[2] // PATCH_PIXELS, images.shape[3] // PATCH_PIXELS
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.positions(rows, columns)
        if self.register_tokens is not None:  # after the positions: registers have none
            tokens = torch.cat([tokens[:, :1], self.register_tokens.expand(len(images), -1, -1), tokens[:, 1:]], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, 0])

    def positions(self, rows: int, columns: int) -> Tensor:
        """[1, 1 + rows * columns, width]: the published 37 x 37 grid brought to this one as the published code does.

        The plain networks scale by an offset and without antialiasing; those with registers were made without offset and with it."""
        if rows == columns == PUBLISHED_GRID:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, PUBLISHED_GRID, PUBLISHED_GRID, -1).permute(0, 3, 1, 2)
        if self.register_tokens is None:
            factors = [(side + GRID_OFFSET) / PUBLISHED_GRID for side in (rows, columns)]
            moved = functional.interpolate(grid, scale_factor=factors, mode="bicubic", antialias=False)
        else:
            moved = functional.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=True)
        return torch.cat([self.pos_embed[:, :1], moved.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
