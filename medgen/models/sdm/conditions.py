"""What a semantic diffusion model is told beside the label map: the kind of image, and how large pixels and image are. Used by networks.py.

Each can be left out for a sample, which guidance needs; what is told then is learned, and called null here."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

FREQUENCIES = 32  # of each length
SLOWEST, FASTEST = 1 / 8, 4.0  # turns per doubling of a length: one turn over all that occurs, down to steps of a fifth
USUAL_SPACING_MM, USUAL_FIELD_MM = 1.5, 360.0  # whose logarithm is 0
LENGTHS = 4  # spacing and field of view of rows and of columns


@dataclass(frozen=True)
class Conditions:
    """Of N images. kinds: int64 [N], the number of the kind; ignored by a network that is told none.

    spacing_mm, field_mm: float32 [N, 2], of rows and columns: from one row to the next, and of all rows together; above 0.
    without_kind, without_size: bool [N], the samples that are not told it."""

    kinds: Tensor
    spacing_mm: Tensor
    field_mm: Tensor
    without_kind: Tensor
    without_size: Tensor

    @classmethod
    def told(cls, kinds: Tensor, spacing_mm: Tensor, field_mm: Tensor) -> Conditions:
        """Every sample is told everything."""
        nobody = torch.zeros(len(kinds), dtype=torch.bool, device=kinds.device)
        return cls(kinds, spacing_mm, field_mm, nobody, nobody)

    def leaving_out(self, kind: bool, size: bool) -> Conditions:
        """The same without the kind, the size or both for every sample."""
        everybody = torch.ones_like(self.without_kind)
        return replace(self, without_kind=everybody if kind else self.without_kind, without_size=everybody if size else self.without_size)


class ConditionEmbedding(nn.Module):
    """Conditions of N images to [N, width], which is added to the embedding of the time. 0 before training, whatever is told."""

    def __init__(self, width: int, kinds: int, sizes: bool):
        super().__init__()
        self.kinds = KindEmbedding(width, kinds) if kinds else None
        self.size = SizeEmbedding(width) if sizes else None

    def forward(self, conditions: Conditions) -> Tensor:
        parts = [embedding(conditions) for embedding in (self.kinds, self.size) if embedding is not None]
        return sum(parts[1:], start=parts[0])


class KindEmbedding(nn.Module):
    """The kind of each image to [N, width]."""

    def __init__(self, width: int, kinds: int):
        super().__init__()
        self.table = nn.Embedding(kinds + 1, width)  # the last is null
        nn.init.zeros_(self.table.weight)

    def forward(self, conditions: Conditions) -> Tensor:
        null = self.table.num_embeddings - 1
        embedded: Tensor = self.table(torch.where(conditions.without_kind, null, conditions.kinds))
        return embedded


class SizeEmbedding(nn.Module):
    """Spacing and field of view of each image to [N, width].

    Lengths enter as cosines and sines of their logarithm, so that equal ratios are equally far apart."""

    turns: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = nn.Linear(2 * FREQUENCIES * LENGTHS, width), nn.Linear(width, width)
        self.null = nn.Parameter(torch.zeros(width))
        steps = torch.arange(FREQUENCIES) / (FREQUENCIES - 1)
        self.register_buffer("turns", SLOWEST * (FASTEST / SLOWEST) ** steps, persistent=False)  # fixed, so no part of a checkpoint
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, conditions: Conditions) -> Tensor:
        told = self.second(nn.functional.silu(self.first(self.features(conditions))))
        return torch.where(conditions.without_size[:, None], self.null.to(told.dtype), told)

    def features(self, conditions: Conditions) -> Tensor:
        """[N, 2 * FREQUENCIES * LENGTHS], the cosines first."""
        doublings = torch.cat([conditions.spacing_mm / USUAL_SPACING_MM, conditions.field_mm / USUAL_FIELD_MM], dim=1).log2()
        angles = (2 * math.pi * doublings[:, :, None] * self.turns).flatten(1)
        return torch.cat([angles.cos(), angles.sin()], dim=1)
