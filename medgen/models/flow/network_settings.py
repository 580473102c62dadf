"""What may be written about the networks of the flow transformer. No torch here. Used by config.py; network_shape.py says what fits together."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, model_validator

from medgen.models.flow.network_shape import NetworkShape, TextShape
from medgen.models.flow.tokenizer import FIRST_MERGE
from medgen.models.settings import Settings

# depth, width, heads, heads of keys and values. 2B: Lumina-Next (arXiv:2406.18583); the smaller ones are for 1,000 to 100,000 images
SIZES = {"tiny": (12, 384, 6, 2), "small": (12, 768, 12, 4), "base": (24, 1024, 16, 4), "2B": (24, 2304, 32, 8)}
MAX_TOKENS = 16_384  # of an image; the time of attention grows with the square of the number


class TransformerSettings(Settings):
    """The network that draws: `tiny/16` is a size and the pixels per side of a patch, or every number of your own."""

    depth: int = Field(ge=1, le=200)  # blocks
    width: int = Field(ge=4, le=16_384)  # numbers per token
    heads: int = Field(ge=1)
    key_value_heads: int = Field(ge=1)  # keys and values are shared by heads / key_value_heads heads each
    patch: int = Field(ge=1)  # pixels per side of what becomes one token

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        named = re.fullmatch(r"(\w+)/(\d+)", value)
        if named is None or named[1] not in SIZES:
            raise ValueError(
                f"{value!r} is no size/patch: sizes are {', '.join(SIZES)}, patches pixels per side, such as tiny/16; "
                "or give your own as {depth: 12, width: 384, heads: 6, key_value_heads: 2, patch: 16}"
            )
        depth, width, heads, shared = SIZES[named[1]]
        return {"depth": depth, "width": width, "heads": heads, "key_value_heads": shared, "patch": int(named[2])}

    def shape(self, image_channels: int, mask_channels: int, caption_width: int) -> NetworkShape:
        """Raises ValueError, naming the field, where it does not fit together."""
        return NetworkShape(
            channels_in=image_channels + mask_channels, channels_out=image_channels, caption_width=caption_width, width=self.width, depth=self.depth,
            heads=self.heads, key_value_heads=self.key_value_heads, patch=self.patch,
        )  # fmt: skip

    def tokens(self, size: int) -> int:
        """How many an image of size x size pixels becomes."""
        return (size // self.patch) ** 2  # 2D

    def check_size(self, size: int) -> None:
        """Raise ValueError if images of this size cannot be cut into patches, or into too many."""
        if size % self.patch:
            raise ValueError(f"network.patch: {self.patch} does not divide data.size: {size}")
        if self.tokens(size) > MAX_TOKENS:
            enough = next(patch for patch in range(self.patch, size + 1) if size % patch == 0 and self.tokens(size) * self.patch**2 // patch**2 <= MAX_TOKENS)
            raise ValueError(f"network.patch: {self.patch} cuts {size} px into {self.tokens(size):,} tokens, more than {MAX_TOKENS:,}, which attend to each other "
                             f"too slowly; use patch {enough} or a smaller data.size")  # fmt: skip


class TextSettings(Settings):
    """The encoder of captions, trained together with the network; its words are those of the training captions."""

    vocabulary: int = Field(4096, ge=FIRST_MERGE, le=100_000)  # tokens at most; few captions make fewer
    width: int = Field(384, ge=4)
    depth: int = Field(4, ge=1)
    heads: int = Field(6, ge=1)
    max_tokens: int = Field(128, ge=2)  # of a caption; a longer one is refused

    @model_validator(mode="after")
    def _fits_together(self) -> TextSettings:
        self.shape(self.vocabulary)
        return self

    def shape(self, vocabulary: int) -> TextShape:
        """`vocabulary`: the tokens there are."""
        return TextShape(vocabulary=vocabulary, width=self.width, depth=self.depth, heads=self.heads, max_tokens=self.max_tokens)
