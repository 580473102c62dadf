"""The encoder of captions that is trained together with the flow transformer: a small transformer in which all tokens see each other.

Not yet part of a model. Its features are what network.py is given as captions and words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from medgen.models.flow.network_shape import TextShape
from medgen.models.flow.tokenizer import PADDING, Tokenizer

FIRST_STD = 0.02  # of tokens, positions and null before training
FEED_FORWARD_RATIO = 4


class TextEncoder(nn.Module):
    """(ids int64 [N, T], valid bool [N, T], dropped bool [N]) -> (features [N, T, width], which of them count bool [N, T]).

    What a sample is told whose caption is dropped, for guidance, is learned: it is one token, called null. A caption without a valid
    token counts as dropped, so that there is always one to attend to.
    `blocks` are called one after the other; each depends on its arguments and weights alone."""

    def __init__(self, shape: TextShape):
        super().__init__()
        self.shape = shape
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Parameter(torch.empty(shape.max_tokens, shape.width))
        self.blocks = nn.ModuleList(TextBlock(shape.width, shape.heads) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width)
        self.null = nn.Parameter(torch.empty(shape.width))
        self._initialise()

    def forward(self, ids: Tensor, valid: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        if ids.shape[1] > self.shape.max_tokens:
            raise ValueError(f"max_tokens: captions of {ids.shape[1]} tokens given, the encoder was made for {self.shape.max_tokens}")
        dropped = dropped | ~valid.any(dim=1)
        seen = (valid | dropped[:, None])[:, None, None]  # where nothing may be attended to, a kernel may give 0 / 0
        features = self.tokens(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            features = block(features, seen)
        features = self.norm(features)
        features = torch.where(dropped[:, None, None], self.null.to(features.dtype), features)
        first_only = torch.arange(ids.shape[1], device=ids.device) == 0
        return features, torch.where(dropped[:, None], first_only, valid)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for parameter in (self.tokens.weight, self.positions, self.null):
            nn.init.normal_(parameter, std=FIRST_STD)


class TextBlock(nn.Module):
    """Attention and an MLP, each after a norm and added to what comes in. seen: bool [N, 1, 1, T], the tokens that are attended to."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, FEED_FORWARD_RATIO * width), nn.GELU(), nn.Linear(FEED_FORWARD_RATIO * width, width))

    def forward(self, features: Tensor, seen: Tensor) -> Tensor:
        features = features + self._attended(self.attention_norm(features), seen)
        out: Tensor = features + self.mlp(self.mlp_norm(features))
        return out

    def _attended(self, features: Tensor, seen: Tensor) -> Tensor:
        split = self.queries_keys_values(features).unflatten(-1, (3, self.heads, -1))  # [N, T, 3, heads, head_width]
        queries, keys, values = split.permute(2, 0, 3, 1, 4)
        attended: Tensor = self.out(functional.scaled_dot_product_attention(queries, keys, values, seen).transpose(1, 2).flatten(2))
        return attended


def as_batch(tokenizer: Tokenizer, captions: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """(ids int64 [N, T], valid bool [N, T]), as long as the longest of them, on the CPU. Raises ValueError on one of more than `max_tokens`."""
    encoded = [torch.tensor(tokenizer.encode(caption, max_tokens)) for caption in captions]
    ids = nn.utils.rnn.pad_sequence(encoded, batch_first=True, padding_value=PADDING)
    return ids, ids != PADDING
