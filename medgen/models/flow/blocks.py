"""The blocks of the flow transformer: attention to the image and to the caption, a gated feed-forward layer, norms around both. Used by network.py.

What a block makes depends on its arguments and weights alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from medgen.models.flow.network_shape import NetworkShape
from medgen.models.flow.positions import rotated

NORM_EPSILON = 1e-5
LAST_NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class Surroundings:
    """What every block is told beside its tokens [N, T, width] and the condition.

    turns: float32, [T, head_width / 2, 2], or [N, 1, T, ..] where images are of several sizes; tokens: bool [N, 1, 1, T], those that are
    not padding, None if none is. captions: features [N, C, caption_width]; words: bool [N, 1, 1, C], which of them count, at least one;
    has_words: [N, 1, 1, 1], 0 where really none does. scale: of products of queries and keys of the image, None as trained."""

    turns: Tensor
    tokens: Tensor | None
    captions: Tensor
    words: Tensor
    has_words: Tensor
    scale: float | None


class RMSNorm(nn.Module):
    """Root mean square normalisation in float32 whatever comes in, with a learned scale per number."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), self.weight.shape, self.weight, NORM_EPSILON).to(x.dtype)


class Attention(nn.Module):
    """Each token attends to all of the image and, by the same query, to the caption, of which each head takes as much as its gate says.

    Queries and keys are normed over all heads together, before they turn; keys of the caption do not turn."""

    def __init__(self, shape: NetworkShape):
        super().__init__()
        self.heads, self.key_value_heads = shape.heads, shape.key_value_heads
        self.queries = nn.Linear(shape.width, shape.width, bias=False)
        self.keys, self.values = (nn.Linear(shape.width, shape.key_value_width, bias=False) for _ in range(2))
        self.caption_keys, self.caption_values = (nn.Linear(shape.caption_width, shape.key_value_width, bias=False) for _ in range(2))
        widths = (shape.width, shape.key_value_width, shape.key_value_width)
        self.query_norm, self.key_norm, self.caption_key_norm = (nn.LayerNorm(width, NORM_EPSILON) if shape.qk_norm else nn.Identity() for width in widths)
        self.gate = nn.Parameter(torch.zeros(shape.heads))
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, tokens: Tensor, captions: Tensor, around: Surroundings) -> Tensor:
        values = _heads(self.values(tokens), self.key_value_heads)
        queries = rotated(_heads(self.query_norm(self.queries(tokens)), self.heads), around.turns).to(values)
        keys = rotated(_heads(self.key_norm(self.keys(tokens)), self.key_value_heads), around.turns).to(values)
        attended = attend(queries, keys, values, around.tokens, around.scale)
        caption_values = _heads(self.caption_values(captions), self.key_value_heads)
        caption_keys = _heads(self.caption_key_norm(self.caption_keys(captions)), self.key_value_heads).to(caption_values)
        gates = self.gate.tanh()[:, None, None] * around.has_words
        attended = attended + gates.to(values) * attend(queries, caption_keys, caption_values, around.words)
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """SwiGLU: a layer whose numbers are gated by another one's (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate, self.inner = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.out(functional.silu(self.gate(tokens)) * self.inner(tokens))
        return out


class Block(nn.Module):
    """Attention and a feed-forward layer, each between two norms, scaled before and gated after by what time and caption say of it."""

    def __init__(self, shape: NetworkShape):
        super().__init__()
        self.attention = Attention(shape)
        self.feed_forward = FeedForward(shape.width, shape.feed_forward_width)
        self.before_attention, self.after_attention, self.before_feed_forward, self.after_feed_forward = (RMSNorm(shape.width) for _ in range(4))
        self.caption_norm = RMSNorm(shape.caption_width)
        self.modulation = nn.Linear(shape.modulation_width, 4 * shape.width)

    def forward(self, tokens: Tensor, condition: Tensor, around: Surroundings) -> Tensor:
        parts = self.modulation(functional.silu(condition)).unsqueeze(1).chunk(4, dim=-1)
        attention_scale, attention_gate, inner_scale, inner_gate = parts
        attended = self.attention(self.before_attention(tokens) * (1 + attention_scale), self.caption_norm(around.captions), around)
        tokens = tokens + attention_gate.tanh() * self.after_attention(attended)
        inner = self.feed_forward(self.before_feed_forward(tokens) * (1 + inner_scale))
        return tokens + inner_gate.tanh() * self.after_feed_forward(inner)


class LastLayer(nn.Module):
    """Tokens [N, T, width] to the numbers of their patches [N, T, numbers], scaled by what time and caption say."""

    def __init__(self, shape: NetworkShape):
        super().__init__()
        self.norm = nn.LayerNorm(shape.width, LAST_NORM_EPSILON, elementwise_affine=False)
        self.modulation = nn.Linear(shape.modulation_width, shape.width)
        self.linear = nn.Linear(shape.width, shape.patch**2 * shape.last_channels)  # 2D

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        numbers: Tensor = self.linear(self.norm(tokens) * (1 + self.modulation(functional.silu(condition)).unsqueeze(1)))
        return numbers


def attend(queries: Tensor, keys: Tensor, values: Tensor, which: Tensor | None, scale: float | None = None) -> Tensor:
    """[N, heads, T, width] from keys and values of fewer heads, head i of those of i // (heads / fewer). which: bool, the keys that count."""
    if queries.device.type == "cpu":  # a tenth faster; kernels of GPUs without the matrix of all pairs do not all share heads
        return functional.scaled_dot_product_attention(queries, keys, values, which, scale=scale, enable_gqa=True)
    keys, values = (shared_heads(part, queries.shape[1]) for part in (keys, values))
    return functional.scaled_dot_product_attention(queries, keys, values, which, scale=scale)


def shared_heads(parts: Tensor, heads: int) -> Tensor:
    """[N, fewer, T, width] to [N, heads, T, width], each head repeated for those that share it."""
    return parts.repeat_interleave(heads // parts.shape[1], dim=1)


def _heads(tokens: Tensor, heads: int) -> Tensor:
    """[N, T, heads * width] to [N, heads, T, width]."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)
