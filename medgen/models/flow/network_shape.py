"""What the networks of the flow transformer are made of, and what fits together. No torch here.

Read by network.py and text_encoder.py, which build what it says."""

from __future__ import annotations

import math
from dataclasses import dataclass

MODULATION_LIMIT = 1024  # numbers that tell a block the time and the caption, at most: beyond it they would be most of a wide network
COORDINATES = 2  # of a token: row and column. 2D
ROTATED_TOGETHER = 2 * COORDINATES  # numbers of a head that one frequency turns: a pair for each coordinate


@dataclass(frozen=True)
class NetworkShape:
    """A Next-DiT of Lumina-Next (arXiv:2406.18583). Raises ValueError, naming the field, where it does not fit together.

    channels_in: of the image or latent and, after those, of the mask; channels_out: of the image or latent alone.
    caption_width: numbers per token of the text's features. width: numbers per token of the image.
    key_value_heads: how many of keys and values there are, each used by heads / key_value_heads heads next to each other.
    patch: pixels per side of what becomes one token. qk_norm: queries and keys are normed, over all heads together.
    multiple_of: the width of the feed-forward layers is rounded up to it.
    time_scale: times of 0..1 are multiplied by it before they become cosines and sines; published weights have 1, where those hardly move.
    as_published: also the parameters on which no output depends, the second half of the last layer and a token for padding: published weights have them."""

    channels_in: int
    channels_out: int
    caption_width: int
    width: int
    depth: int
    heads: int
    key_value_heads: int
    patch: int = 2
    qk_norm: bool = True
    multiple_of: int = 256
    time_scale: float = 1000.0
    as_published: bool = False

    def __post_init__(self) -> None:
        _check_counts(self, ("channels_in", "channels_out", "caption_width", "width", "depth", "heads", "key_value_heads", "patch", "multiple_of"))
        if self.channels_in < self.channels_out:
            raise ValueError(f"channels_in: {self.channels_in} given, fewer than channels_out: {self.channels_out}; the image's own channels are among them, those of a mask come on top")
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} do not divide the width of {self.width}")
        if self.head_width % ROTATED_TOGETHER:
            raise ValueError(f"heads: {self.heads} of width {self.width} have {self.head_width} numbers each, which must be divisible by {ROTATED_TOGETHER}, for the pairs that rows and columns turn")
        if self.heads % self.key_value_heads:
            raise ValueError(f"key_value_heads: {self.key_value_heads} do not divide the {self.heads} heads")
        if not 0 < self.time_scale < math.inf:
            raise ValueError(f"time_scale: {self.time_scale:g} given; it must be above 0 and finite")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def key_value_width(self) -> int:
        return self.key_value_heads * self.head_width

    @property
    def modulation_width(self) -> int:
        """Numbers that tell a block the time and the caption."""
        return min(self.width, MODULATION_LIMIT)

    @property
    def feed_forward_width(self) -> int:
        """Two thirds of four times the width, since a gated layer has three matrices instead of two (Shazeer 2020, arXiv:2002.05202)."""
        return math.ceil(int(2 * 4 * self.width / 3) / self.multiple_of) * self.multiple_of

    @property
    def mask_channels(self) -> int:
        """How many channels of the input come after those of the image."""
        return self.channels_in - self.channels_out

    @property
    def last_channels(self) -> int:
        """What the last layer computes per pixel; more than is used in a published network."""
        return self.channels_out * (2 if self.as_published else 1)

    def grid(self, rows_px: int, columns_px: int) -> tuple[int, int]:
        """Rows and columns of tokens of such an image. Raises ValueError if patches do not cover it."""
        if rows_px % self.patch or columns_px % self.patch:
            raise ValueError(f"patch: {self.patch} does not divide an image of {rows_px} x {columns_px}; pad it, or take another patch")
        return rows_px // self.patch, columns_px // self.patch


@dataclass(frozen=True)
class TextShape:
    """The encoder of captions that is trained with the network. Raises ValueError, naming the field, where it does not fit together.

    vocabulary: entries of its tokenizer. width: numbers per token, of the features too. max_tokens: of a caption, the begin token counts."""

    vocabulary: int = 4096
    width: int = 384
    depth: int = 4
    heads: int = 6
    max_tokens: int = 256

    def __post_init__(self) -> None:
        _check_counts(self, ("vocabulary", "width", "depth", "heads", "max_tokens"))
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} do not divide the width of {self.width}")


def _check_counts(shape: NetworkShape | TextShape, names: tuple[str, ...]) -> None:
    for name in names:
        if vars(shape)[name] < 1:
            raise ValueError(f"{name}: {vars(shape)[name]} given; it must be 1 or more")
