"""The blocks of the semantic diffusion U-Net: residual blocks, SPADE, attention. Used by networks.py.

What a block makes depends on its arguments and weights alone. Images and label maps are 2D."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

NORM_EPSILON = 1e-5
MAPS_PER_BLOCK = 4  # gamma and beta of the two norms of a residual block

# gamma and beta of SPADE layers in their order, each [N or 1, C, H, W] with the rows and columns of the features they modulate
Maps = tuple[Tensor, ...]
Normed = Callable[[Tensor], Tensor]


class GroupNorm(nn.Module):
    """Group normalisation in float32 whatever comes in, with a learned scale and shift per channel."""

    def __init__(self, groups: int, channels: int):
        super().__init__()
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return functional.group_norm(x.float(), self.groups, self.weight, self.bias, NORM_EPSILON).to(x.dtype)


class Spade(nn.Module):
    """Spatially adaptive normalisation: a group norm whose scale and shift at each place are said by the label map.

    Park et al. 2019 (arXiv:1903.07291), over groups as in Wang et al. 2022 (arXiv:2207.00050, eq. 6). The label map alone decides on
    gamma and beta, so they serve every time of a sampling. factor: rows of the label map per row of the features."""

    def __init__(self, channels: int, classes: int, hidden: int, groups: int, factor: int):
        super().__init__()
        self.groups, self.factor = groups, factor
        self.shared = nn.Conv2d(classes, hidden, 3, padding=1)
        self.gamma, self.beta = nn.Conv2d(hidden, channels, 3, padding=1), nn.Conv2d(hidden, channels, 3, padding=1)

    def modulate(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(gamma, beta) [N, channels, H / factor, W / factor] of a label map [N, classes, H, W]: nearest, the first of each `factor` pixels."""
        hidden = self.shared(labels[:, :, :: self.factor, :: self.factor]).relu()
        return self.gamma(hidden), self.beta(hidden)

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return functional.group_norm(x.float(), self.groups, eps=NORM_EPSILON).to(x.dtype) * (1 + gamma) + beta


class _Residual(nn.Module):
    """Norm, SiLU, convolution; then a norm that the time scales and shifts (FiLM), SiLU and a convolution that begins as 0.

    Dhariwal & Nichol 2021 (arXiv:2105.05233, section 3). Where the block resamples, it does so after the first SiLU and on the way past it."""

    def __init__(self, inputs: int, outputs: int, embedding: int, make_norm: Callable[[int, bool], nn.Module], resample: Normed | None):
        """make_norm(channels, is the second): registered where the published order of weights has them."""
        super().__init__()
        self.resample = resample
        self.in_norm = make_norm(inputs, False)
        self.in_conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.embed = nn.Linear(embedding, 2 * outputs)
        self.out_norm = make_norm(outputs, True)
        self.out_conv = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.past = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def _computed(self, x: Tensor, embedding: Tensor, in_normed: Normed, out_normed: Normed) -> Tensor:
        hidden = functional.silu(in_normed(x))
        if self.resample is not None:
            hidden, x = self.resample(hidden), self.resample(x)
        hidden = self.in_conv(hidden)
        scale, shift = self.embed(functional.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        hidden = self.out_conv(functional.silu(out_normed(hidden) * (1 + scale) + shift))
        computed: Tensor = self.past(x) + hidden
        return computed


class Residual(_Residual):
    """Of the encoder, which does not see the label map."""

    def __init__(self, inputs: int, outputs: int, embedding: int, groups: int, halves: bool = False):
        super().__init__(inputs, outputs, embedding, lambda channels, _: GroupNorm(groups, channels), halved if halves else None)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self._computed(x, embedding, self.in_norm, self.out_norm)


class SemanticResidual(_Residual):
    """Of the middle and the decoder: both norms are modulated by the label map. factor: rows of the map per row of what comes in."""

    def __init__(self, inputs: int, outputs: int, embedding: int, groups: int, classes: int, hidden: int, factor: int, doubles: bool = False):
        def make_norm(channels: int, second: bool) -> Spade:
            return Spade(channels, classes, hidden, groups, factor // 2 if second and doubles else factor)

        super().__init__(inputs, outputs, embedding, make_norm, doubled if doubles else None)

    def modulate(self, labels: Tensor) -> Maps:
        return (*self.in_norm.modulate(labels), *self.out_norm.modulate(labels))  # type: ignore[operator]

    def forward(self, x: Tensor, embedding: Tensor, maps: Maps) -> Tensor:
        in_gamma, in_beta, out_gamma, out_beta = maps
        return self._computed(x, embedding, lambda h: self.in_norm(h, in_gamma, in_beta), lambda h: self.out_norm(h, out_gamma, out_beta))


class Attention(nn.Module):
    """Self-attention of all places of an image, added to it; what it adds begins as 0.

    The published code has two orders of the channels that become queries, keys and values: "legacy" (head 1: q k v, head 2: q k v, ...)
    and "new" (q of all heads, k of all heads, v of all heads). Weights of one make nonsense in the other."""

    def __init__(self, channels: int, heads: int, groups: int, head_order: Literal["legacy", "new"]):
        super().__init__()
        self.heads, self.head_order = heads, head_order
        self.norm = GroupNorm(groups, channels)
        self.queries_keys_values = nn.Conv1d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        count, channels, *places = x.shape
        mixed = self.queries_keys_values(self.norm(x).flatten(2))
        order = (self.heads, 3) if self.head_order == "legacy" else (3, self.heads)
        parts = mixed.reshape(count, *order, channels // self.heads, -1).transpose(-1, -2)  # [N, order, places, channels of a head]
        queries, keys, values = parts.unbind(2 if self.head_order == "legacy" else 1)
        attended = functional.scaled_dot_product_attention(queries, keys, values)
        out: Tensor = self.out(attended.transpose(-1, -2).reshape(count, channels, -1))
        return x + out.reshape(count, channels, *places)


def doubled(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2, mode="nearest")


def halved(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 2)


def zeroed(layer: nn.Conv1d | nn.Conv2d) -> nn.Conv1d | nn.Conv2d:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer
