"""What may be written about the network of a diffusion model, and what fits together. No torch here.

Used by config.py, which holds the keys, and by networks.py, which builds what they ask for."""

from __future__ import annotations

import math
import re
from typing import Any

from pydantic import Field, model_validator

from medgen.models.settings import Settings

UNET_DEFAULTS: dict[str, Any] = {
    "channels": (128, 256, 256),
    "attention": (False, True, True),  # full resolution attends too slowly to pay
    "res_blocks": 1,
    "head_channels": 256,  # one head at the default widths
}
MAX_LEVELS = 8
NORM_GROUPS = 32  # of a U-Net's group norms, where the widths allow it
MAX_TOKENS = 16_384  # 256 px in patches of 2; the time of attention grows with the square of the number
# depth, width, heads: Peebles & Xie 2023 (arXiv:2212.09748, table 1)
DIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
DIT_PATCHES = (2, 4, 8)


class DiTSettings(Settings):
    """A diffusion transformer: `S/2` and its like are those of the paper, or every number of your own."""

    depth: int = Field(ge=1, le=200)  # blocks
    width: int = Field(ge=4, le=16_384)  # numbers per token
    heads: int = Field(ge=1)
    patch: int = Field(ge=1)  # pixels per side of what becomes one token
    qk_norm: bool = False  # RMS norm of queries and keys: keeps attention from saturating at large learning rates

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        named = re.fullmatch(r"(\w+)/(\d+)", value)
        if named is None or named[1] not in DIT_SIZES or int(named[2]) not in DIT_PATCHES:
            raise ValueError(
                f"{value!r} is no size/patch of the paper: sizes {', '.join(DIT_SIZES)}, patches {', '.join(map(str, DIT_PATCHES))}, such as S/2; "
                "or give your own as {depth: 12, width: 384, heads: 6, patch: 2}"
            )
        depth, width, heads = DIT_SIZES[named[1]]
        return {"depth": depth, "width": width, "heads": heads, "patch": int(named[2])}

    @model_validator(mode="after")
    def _divisible(self) -> DiTSettings:
        if self.width % self.heads:
            raise ValueError(f"heads: {self.heads} do not divide the width of {self.width}")
        if self.width % 4:  # 2D: sine and cosine of the row, sine and cosine of the column
            raise ValueError(f"width: {self.width} must be divisible by 4, for the sines and cosines of rows and columns")
        return self

    def tokens(self, size: int) -> int:
        """How many an image of size x size pixels becomes."""
        return (size // self.patch) ** 2  # 2D

    def check_size(self, size: int) -> None:
        """Raise ValueError if images of this size cannot be cut into patches, or into too many."""
        if size % self.patch:
            raise ValueError(f"dit.patch: {self.patch} does not divide data.size: {size}")
        if self.tokens(size) > MAX_TOKENS:
            enough = next(patch for patch in range(self.patch, size + 1) if size % patch == 0 and (size // patch) ** 2 <= MAX_TOKENS)
            raise ValueError(
                f"dit.patch: {self.patch} cuts {size} px into {self.tokens(size):,} tokens, more than {MAX_TOKENS:,}, which attend to each other "
                f"too slowly; use patch {enough} or a smaller data.size"
            )


def with_unet_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """A config's keys with those of the U-Net complete: one number stands for all levels.

    Of `head_channels`, for the levels that attend; the middle of a U-Net attends in the width of its last level."""
    filled = {key: default if given.get(key) is None else given[key] for key, default in UNET_DEFAULTS.items()}
    for key in ("res_blocks", "head_channels"):
        if type(filled[key]) not in (int, list, tuple):
            raise ValueError(f"{key}: write one number, or one per level; got {filled[key]!r}")
    if isinstance(filled["channels"], list | tuple) and type(filled["res_blocks"]) is int:
        filled["res_blocks"] = [filled["res_blocks"]] * len(filled["channels"])
    if isinstance(filled["attention"], list | tuple) and type(filled["head_channels"]) is int:
        last = len(filled["attention"]) - 1
        filled["head_channels"] = [filled["head_channels"] if attends or level == last else None for level, attends in enumerate(filled["attention"])]
    return {**given, **filled}


def refuse_unet_keys(given: dict[str, Any]) -> None:
    """Raise ValueError if a key of the U-Net is given where the network is another one."""
    for name in UNET_DEFAULTS:
        if given.get(name) is not None:
            raise ValueError(f"{name} is of the U-Net and has no effect with network: {given['network']}; remove it")


def check_unet(channels: tuple[int, ...], attention: tuple[bool, ...], res_blocks: tuple[int, ...], head_channels: tuple[int | None, ...]) -> None:
    """Raise ValueError, naming the key, where the levels of a U-Net do not fit together."""
    for name, levels in (("attention", attention), ("res_blocks", res_blocks), ("head_channels", head_channels)):
        if len(levels) != len(channels):
            raise ValueError(f"{name} has {len(levels)} levels, channels has {len(channels)}; give one per level")
    if channels[0] < 2:
        raise ValueError("channels: the first level needs 2 or more, since the time is embedded in as many numbers")
    for level, (width, attends, head) in enumerate(zip(channels, attention, head_channels, strict=True)):
        is_last = level == len(channels) - 1
        if not (attends or is_last):
            if head is not None:
                raise ValueError(f"head_channels: {head} has no effect at level {level + 1}, which has no attention; write null there")
            continue
        where = "an attention level" if attends else "the middle, which always attends"
        if head is None:
            raise ValueError(f"head_channels: null at level {level + 1}, but it is {where}; give a number that divides {width}")
        if width % head:
            raise ValueError(f"head_channels: {head} does not divide the {width} channels of {where}")


def norm_groups(channels: tuple[int, ...]) -> int:
    """The most groups up to 32 that divide every width."""
    return math.gcd(NORM_GROUPS, *channels)


def check_unet_size(channels: tuple[int, ...], size: int) -> None:
    """Raise ValueError if images of this size cannot be halved at every level, or leave a group norm a single number."""
    factor = 2 ** (len(channels) - 1)
    if size % factor:
        raise ValueError(f"a U-Net of {len(channels)} levels needs data.size divisible by {factor}, got {size}")
    smallest = min(width // norm_groups(channels) for width in channels[-2:])
    if size == factor and smallest == 1:  # 2D: one pixel
        raise ValueError(
            f"channels: at {size} px the last of {len(channels)} levels is a single pixel, and its norms, of {norm_groups(channels)} groups "
            "with one channel each, would make everything 0; take a level less, or widths with a larger quotient"
        )
