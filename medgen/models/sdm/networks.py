"""The U-Net of semantic diffusion, Wang et al. 2022 (arXiv:2207.00050): its middle and decoder see a label map. Built by the family's model.py.

The order of its weights is that of the published code, so that weights can be carried over one by one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medgen.models.diffusion.dit import TimeEmbedding
from medgen.models.sdm.blocks import MAPS_PER_BLOCK, Attention, GroupNorm, Maps, Residual, SemanticResidual, zeroed
from medgen.models.sdm.conditions import ConditionEmbedding, Conditions
from medgen.models.sdm.network_shape import NetworkShape


@dataclass(frozen=True)
class Modulation:
    """Gamma and beta of every SPADE layer for some label maps: of the middle first, then of each block of the decoder.

    Made by SemanticUNet.modulate, for sampling: they are the same at every time, and half of what a pass computes. Those of one label
    map serve a batch of images of it."""

    blocks: tuple[Maps, ...]

    @property
    def bytes(self) -> int:
        return sum(part.numel() * part.element_size() for maps in self.blocks for part in maps)


class SemanticUNet(nn.Module):
    """(noisy images [N, C, H, W] in about [-1, 1], time [N] in 0..1000, label maps, conditions) -> [N, C or 2 C, H, W], 0 before training.

    `blocks` are called one after the other; each depends on its arguments and weights alone."""

    def __init__(self, shape: NetworkShape):
        super().__init__()
        self.shape = shape
        self.time = TimeEmbedding(shape.embedding, shape.channels)
        self.stem = nn.Conv2d(shape.image_channels, shape.widths[0], 3, padding=1)
        self.encoder = nn.ModuleList(_encoder(shape))
        self.middle = Middle(shape)
        self.decoder = nn.ModuleList(_decoder(shape))
        self.last_norm = GroupNorm(shape.groups, shape.widths[0])
        self.last = zeroed(nn.Conv2d(shape.widths[0], shape.output_channels, 3, padding=1))
        self.conditions = ConditionEmbedding(shape.embedding, shape.kinds, shape.sizes) if shape.kinds or shape.sizes else None

    @property
    def blocks(self) -> list[nn.Module]:
        """What can be computed again in the backward pass, in order."""
        return [*self.encoder, self.middle, *self.decoder]

    def modulate(self, labels: Tensor) -> Modulation:
        """What label maps [N, classes, H, W] say to every layer, to be given to `forward` instead of them.

        Of weights as they are now; N images, or any number of images if N is 1. Raises ValueError if they are of another kind."""
        self._check(labels)
        return Modulation((self.middle.modulate(labels), *(block.modulate(labels) for block in self.decoder)))  # type: ignore[operator]

    def forward(self, images: Tensor, time: Tensor, labels: Tensor | Modulation, conditions: Conditions | None = None) -> Tensor:
        """labels: maps [N, classes, H, W], from which every block works out its own modulation, or what `modulate` made of them.

        Training gives the maps, since a block that is computed twice then keeps none of its modulation; sampling gives the modulation.
        Both are the same computation. conditions: None if the network is told none, and only then."""
        embedding = self._embedded(time, conditions)
        x = self.stem(images)
        kept = [x]
        for block in self.encoder:
            x = block(x, embedding)
            kept.append(x)
        first, *others = self._given(labels)
        x = self.middle(x, embedding, first)
        for block, given in zip(self.decoder, others, strict=True):
            x = block(x, kept.pop(), embedding, given)
        out: Tensor = self.last(nn.functional.silu(self.last_norm(x)))
        return out

    def _given(self, labels: Tensor | Modulation) -> list[Tensor] | list[Maps]:
        """What the middle and each block of the decoder are given."""
        if isinstance(labels, Modulation):
            return list(labels.blocks)
        self._check(labels)
        return [labels] * (1 + len(self.decoder))

    def _embedded(self, time: Tensor, conditions: Conditions | None) -> Tensor:
        embedding: Tensor = self.time(time)
        if (conditions is None) != (self.conditions is None):
            told = f"{self.shape.kinds} kinds and {'' if self.shape.sizes else 'no '}sizes"
            raise ValueError(f"conditions: {'none' if conditions is None else 'some'} given, but the network was made for {told}")
        return embedding if conditions is None or self.conditions is None else embedding + self.conditions(conditions)

    def _check(self, labels: Tensor) -> None:
        if labels.dim() != 4 or labels.shape[1] != self.shape.classes:
            raise ValueError(f"label maps: [N, {self.shape.classes}, H, W] needed, one channel per class, got {list(labels.shape)}")
        self.shape.check_size(labels.shape[2], labels.shape[3])


class EncoderBlock(nn.Module):
    """A residual block and, on levels that attend, attention."""

    def __init__(self, residual: Residual, attention: Attention | None):
        super().__init__()
        self.residual, self.attention = residual, attention

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.residual(x, embedding)
        return x if self.attention is None else self.attention(x)


class Middle(nn.Module):
    """Two residual blocks around attention, at the width of the last level."""

    def __init__(self, shape: NetworkShape):
        super().__init__()
        width = shape.widths[-1]
        self.first = _semantic(shape, width, width, shape.factor)
        self.attention = _attention(shape, width)
        self.second = _semantic(shape, width, width, shape.factor)

    def modulate(self, labels: Tensor) -> Maps:
        return (*self.first.modulate(labels), *self.second.modulate(labels))

    def forward(self, x: Tensor, embedding: Tensor, given: Tensor | Maps) -> Tensor:
        maps = self.modulate(given) if isinstance(given, Tensor) else given
        x = self.attention(self.first(x, embedding, maps[:MAPS_PER_BLOCK]))
        out: Tensor = self.second(x, embedding, maps[MAPS_PER_BLOCK:])
        return out


class DecoderBlock(nn.Module):
    """A residual block of what comes up and of what the encoder kept, attention where the level attends, and the way to the next level."""

    def __init__(self, residual: SemanticResidual, attention: Attention | None, upwards: SemanticResidual | None):
        super().__init__()
        self.residual, self.attention, self.upwards = residual, attention, upwards

    def modulate(self, labels: Tensor) -> Maps:
        upwards = () if self.upwards is None else self.upwards.modulate(labels)
        return (*self.residual.modulate(labels), *upwards)

    def forward(self, x: Tensor, kept: Tensor, embedding: Tensor, given: Tensor | Maps) -> Tensor:
        maps = self.modulate(given) if isinstance(given, Tensor) else given
        x = self.residual(torch.cat([x, kept], dim=1), embedding, maps[:MAPS_PER_BLOCK])
        x = x if self.attention is None else self.attention(x)
        return x if self.upwards is None else self.upwards(x, embedding, maps[MAPS_PER_BLOCK:])


def _encoder(shape: NetworkShape) -> list[EncoderBlock]:
    """`res_blocks` per level, and between levels one that halves the images."""
    blocks, inputs = [], shape.widths[0]
    for level, (width, attends) in enumerate(zip(shape.widths, shape.attention, strict=True)):
        for _ in range(shape.res_blocks):
            blocks.append(EncoderBlock(Residual(inputs, width, shape.embedding, shape.groups), _attention(shape, width) if attends else None))
            inputs = width
        if level < len(shape.widths) - 1:
            blocks.append(EncoderBlock(Residual(width, width, shape.embedding, shape.groups, halves=True), None))
    return blocks


def _decoder(shape: NetworkShape) -> list[DecoderBlock]:
    """One block for everything that the encoder kept, from the last to the first; the last of each level goes up to the next."""
    kept, blocks, inputs = _kept_widths(shape), [], shape.widths[-1]
    for level in reversed(range(len(shape.widths))):
        width, factor = shape.widths[level], 2**level
        for number in range(shape.res_blocks + 1):
            goes_up = level > 0 and number == shape.res_blocks
            blocks.append(DecoderBlock(
                _semantic(shape, inputs + kept.pop(), width, factor),
                _attention(shape, width) if shape.attention[level] else None,
                _semantic(shape, width, width, factor, doubles=True) if goes_up else None,
            ))  # fmt: skip
            inputs = width
    return blocks


def _kept_widths(shape: NetworkShape) -> list[int]:
    """Channels of what the encoder keeps for the decoder: the stem's, then each block's."""
    per_level = ([width] * (shape.res_blocks + 1) for width in shape.widths)  # the last of a level halves the images,
    return [shape.widths[0], *itertools.chain.from_iterable(per_level)][:-1]  # which the last level does not


def _semantic(shape: NetworkShape, inputs: int, outputs: int, factor: int, doubles: bool = False) -> SemanticResidual:
    return SemanticResidual(inputs, outputs, shape.embedding, shape.groups, shape.classes, shape.spade_channels, factor, doubles)


def _attention(shape: NetworkShape, width: int) -> Attention:
    return Attention(width, width // shape.head_channels, shape.groups, shape.head_order)
