"""The flow transformer Next-DiT of Lumina-Next (arXiv:2406.18583): image tokens that attend to each other and to a caption, on any grid.

Not yet part of a model. Its weights are one to one those of the published text-to-image networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from medgen.models.diffusion.dit import TimeEmbedding
from medgen.models.flow.blocks import NORM_EPSILON, Block, LastLayer, Surroundings
from medgen.models.flow.network_shape import NetworkShape
from medgen.models.flow.positions import AS_TRAINED, Scaling, attention_scale, rotation

FIRST_STD = 0.02  # of the layers that embed the time, before training


class NextDiT(nn.Module):
    """(images [N, channels_in, H, W], time [N], captions [N, C, caption_width], words bool [N, C]) -> velocity [N, channels_out, H, W], 0 before training.

    Images are pixels or latents, mixed with noise, and after their channels those of a mask, without noise, if the network was made for one.
    Time is the one of the paper, 0 at noise and 1 at the image: samplers.py counts the other way, so that it is 1 - theirs. The velocity is
    image minus noise, as there. words: which of a caption's tokens count; a caption of none is allowed and says nothing.
    `blocks` are called one after the other; each depends on its arguments and weights alone."""

    def __init__(self, shape: NetworkShape):
        super().__init__()
        self.shape = shape
        self.embed = nn.Linear(shape.patch**2 * shape.channels_in, shape.width)  # 2D
        self.time = TimeEmbedding(shape.modulation_width)
        self.caption_norm = nn.LayerNorm(shape.caption_width, NORM_EPSILON)
        self.caption = nn.Linear(shape.caption_width, shape.modulation_width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.last = LastLayer(shape)
        # no output depends on padding, so it is only held, and DDP need not wait for its gradient
        self.padding = nn.Parameter(torch.empty(shape.width), requires_grad=False) if shape.as_published else None
        self._initialise()

    def forward(self, images: Tensor | Sequence[Tensor], time: Tensor, captions: Tensor, words: Tensor,
                scaling: Scaling = AS_TRAINED, trained_tokens: int | None = None) -> Tensor | list[Tensor]:  # fmt: skip
        """Images of several sizes are given, and come back, as a list of [channels, H, W]; each comes out as if it were alone.

        For larger images than trained: scaling of positions, see `scaling_at`; trained_tokens, tokens of a trained image, for
        proportional attention. Raises ValueError if sizes or channels do not fit."""
        grids = self._grids(images)
        if isinstance(images, Tensor):
            patches, tokens = to_patches(images, self.shape.patch), None
            turns = rotation(*grids[0], self.shape.head_width, scaling, images.device)
        else:
            patches, tokens, turns = self._padded(images, grids, scaling)
        condition = self.time(time * self.shape.time_scale) + self.caption(self.caption_norm(masked_mean(captions, words)))
        around = self._surroundings(turns, tokens, captions, words, self._scale(grids, trained_tokens))
        hidden = self.embed(patches).float()  # what is added up over the blocks stays float32
        for block in self.blocks:
            hidden = block(hidden, condition, around)
        numbers = self.last(hidden, condition)
        if isinstance(images, Tensor):
            return self._as_images(numbers, grids[0])
        return [self._as_images(part[None, : rows * columns], (rows, columns))[0] for part, (rows, columns) in zip(numbers, grids, strict=True)]

    def _padded(self, images: Sequence[Tensor], grids: list[tuple[int, int]], scaling: Scaling) -> tuple[Tensor, Tensor, Tensor]:
        """Patches [N, T, numbers], which of them are of an image [N, 1, 1, T], and how they turn [N, 1, T, ..], for the longest of the images."""
        patches = pad_sequence([to_patches(image[None], self.shape.patch)[0] for image in images], batch_first=True)
        counts = torch.tensor([rows * columns for rows, columns in grids], device=patches.device)
        tokens = torch.arange(patches.shape[1], device=patches.device) < counts[:, None]
        turns = pad_sequence([rotation(*grid, self.shape.head_width, scaling, patches.device) for grid in grids], batch_first=True)
        return patches, tokens[:, None, None], turns[:, None]

    def _surroundings(self, turns: Tensor, tokens: Tensor | None, captions: Tensor, words: Tensor, scale: float | None) -> Surroundings:
        has_words = words.any(dim=1, keepdim=True)
        some = words | ~has_words  # where nothing may be attended to, a kernel may give 0 / 0
        return Surroundings(turns, tokens, captions, some[:, None, None], has_words[:, None, None].float(), scale)

    def _as_images(self, numbers: Tensor, grid: tuple[int, int]) -> Tensor:
        return from_patches(numbers, grid, self.shape.patch)[:, : self.shape.channels_out]

    def _grids(self, images: Tensor | Sequence[Tensor]) -> list[tuple[int, int]]:
        """Rows and columns of tokens, of all images or of each."""
        sizes = [images.shape[1:]] if isinstance(images, Tensor) else [image.shape for image in images]
        for size in sizes:
            if len(size) != 3 or size[0] != self.shape.channels_in:
                raise ValueError(f"images: {self.shape.channels_in} channels needed, {self.shape.channels_out} of the image and {self.shape.mask_channels} of the mask, got [channels, H, W] = {list(size)}")
        return [self.shape.grid(size[1], size[2]) for size in sizes]

    def _scale(self, grids: list[tuple[int, int]], trained_tokens: int | None) -> float | None:
        if trained_tokens is None:
            return None
        counts = {rows * columns for rows, columns in grids}
        if len(counts) > 1:
            raise ValueError(f"trained_tokens: images of {min(counts)} to {max(counts)} tokens given, which would each need their own scale; give images of one size")
        return attention_scale(counts.pop(), trained_tokens, self.shape.head_width)

    def _initialise(self) -> None:
        """As published: what modulates, gates and leaves is 0, and so is the output. Columns of the mask are 0 too, see `embed`."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in (self.time.first, self.time.second):
            nn.init.normal_(layer.weight, std=FIRST_STD)
        if self.padding is not None:
            nn.init.normal_(self.padding, std=FIRST_STD)
        for zeroed in (self.caption, self.last.linear, *(module.modulation for module in self.modules() if isinstance(module, Block | LastLayer))):
            nn.init.zeros_(zeroed.weight)
        with torch.no_grad():  # patches are channel by channel, so the mask's columns are the last
            own = self.shape.patch**2 * self.shape.channels_out
            nn.init.xavier_uniform_(self.embed.weight[:, :own])
            self.embed.weight[:, own:] = 0


def masked_mean(features: Tensor, valid: Tensor) -> Tensor:
    """Mean in float32 over the tokens [N, C, width] that count (bool [N, C]), [N, width]; 0 where none does."""
    weights = valid[:, :, None].float()
    return (features.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def to_patches(images: Tensor, patch: int) -> Tensor:
    """[N, channels, H, W] to [N, T, channels * patch * patch]: of a patch, channels follow each other, in each rows, in each columns. 2D."""
    return functional.pixel_unshuffle(images, patch).flatten(2).transpose(1, 2)


def from_patches(numbers: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """[N, T, patch * patch * channels] to [N, channels, H, W]. 2D.

    Not the order of `to_patches`: of a patch, rows follow each other, in each columns, in each channels, as published."""
    rows, columns = grid
    parts: Any = numbers.unflatten(2, (patch, patch, -1)).unflatten(1, (rows, columns))
    images: Tensor = parts.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return images
