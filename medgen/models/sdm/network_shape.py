"""What the network of a semantic diffusion model is made of, and what fits together. No torch here.

Built by the family's config.py, read by networks.py, which builds what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medgen.models.diffusion.network_settings import norm_groups

# per level, by the pixels per side of the images: Dhariwal & Nichol 2021 (arXiv:2105.05233, appendix I)
MULTIPLIERS: dict[int, tuple[float, ...]] = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}
ATTENTION_FROM = 32  # pixels per side of the largest feature maps that attend
EMBEDDING_RATIO = 4  # numbers of the time's embedding per channel


@dataclass(frozen=True)
class NetworkShape:
    """A U-Net of Wang et al. 2022 (arXiv:2207.00050). Raises ValueError, naming the field, where it does not fit together.

    image_channels: of the images; classes: channels of the label map, one-hot, all 0 where nothing is told.
    channels: of one level at multiplier 1; multipliers, attention: one per level, each half as large as the one before.
    res_blocks: per level of the encoder; the decoder has one more.
    head_order: how queries, keys and values of the heads lie in the weights: "legacy" head by head, "new" all queries first.
    learned_variance: the output has twice the image's channels, the second half says the variance of a step (see variance.py).
    kinds: how many kinds of image are told apart, such as T1 and T2 maps; 0: the kind is not told. sizes: spacing and field of view are told."""

    classes: int
    image_channels: int
    channels: int
    multipliers: tuple[float, ...]
    attention: tuple[bool, ...]
    res_blocks: int = 2
    head_channels: int = 64
    head_order: Literal["legacy", "new"] = "new"
    spade_channels: int = 128  # between the label map and each gamma and beta
    learned_variance: bool = True
    kinds: int = 0
    sizes: bool = False

    def __post_init__(self) -> None:
        for name in ("classes", "image_channels", "channels", "res_blocks", "head_channels", "spade_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} given; it must be 1 or more")
        if self.kinds == 1 or self.kinds < 0:
            raise ValueError(f"kinds: {self.kinds} given; write 2 or more, or 0 where there is nothing to tell apart")
        if not self.multipliers or len(self.attention) != len(self.multipliers):
            raise ValueError(f"attention has {len(self.attention)} levels, multipliers has {len(self.multipliers)}; give one per level, of at least one")
        if self.channels % 2:
            raise ValueError(f"channels: {self.channels} must be even, for the cosines and sines of the time")
        for multiplier, width in zip(self.multipliers, self.widths, strict=True):
            if width < 1 or width != self.channels * multiplier:
                raise ValueError(f"multipliers: {multiplier:g} times {self.channels} channels is no whole number of channels")
        self._check_heads()

    def _check_heads(self) -> None:
        for level, (width, attends) in enumerate(zip(self.widths, self.attention, strict=True)):
            is_last = level == len(self.widths) - 1  # the middle attends in its width
            if (attends or is_last) and width % self.head_channels:
                where = "the middle, which always attends" if is_last else f"level {level + 1}, which attends"
                raise ValueError(f"head_channels: {self.head_channels} does not divide the {width} channels of {where}")

    @classmethod
    def published(cls, size: int, channels: int, classes: int, image_channels: int, head_order: Literal["legacy", "new"]) -> NetworkShape:
        """The one of that paper for images of 64, 128, 256 or 512 pixels per side."""
        if size not in MULTIPLIERS:
            raise ValueError(f"size: {size} px is none of {', '.join(map(str, sorted(MULTIPLIERS)))}; give multipliers and attention per level instead")
        multipliers = MULTIPLIERS[size]
        return cls(classes, image_channels, channels, multipliers, attention_at(size, len(multipliers)), head_order=head_order)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels per level."""
        return tuple(int(self.channels * multiplier) for multiplier in self.multipliers)

    @property
    def groups(self) -> int:
        """Of every group norm: 32, or what divides all widths."""
        return norm_groups(self.widths)

    @property
    def embedding(self) -> int:
        """Numbers that tell a block the time and the conditions."""
        return EMBEDDING_RATIO * self.channels

    @property
    def output_channels(self) -> int:
        return self.image_channels * (2 if self.learned_variance else 1)

    @property
    def factor(self) -> int:
        """What rows and columns of an image must be divisible by."""
        return 2 ** (len(self.multipliers) - 1)

    def check_size(self, rows: int, columns: int) -> None:
        """Raise ValueError if images of this size cannot be halved at every level, or leave a norm nothing to compare."""
        if rows % self.factor or columns % self.factor:
            raise ValueError(f"a network of {len(self.multipliers)} levels needs rows and columns divisible by {self.factor}, got {rows} x {columns}; pad them")
        if rows == columns == self.factor and min(self.widths[-2:]) // self.groups == 1:
            raise ValueError(f"multipliers: at {rows} px the last of {len(self.multipliers)} levels is one pixel, and its norms would make everything 0; take a level less")


def attention_at(size: int, levels: int) -> tuple[bool, ...]:
    """Which levels attend of images with so many pixels per side."""
    return tuple(size >> level <= ATTENTION_FROM for level in range(levels))
