"""What velocity is predicted from captions and masks at every step of a sampling, with guidance. Used by the family's model.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from medgen.models.diffusion.samplers import Velocity

Ask = Callable[[Tensor, float, bool, bool], Tensor]  # (images, time, told the caption, told the mask) -> velocity


@dataclass(frozen=True)
class Guidance:
    """How much more than in training what is told shows: 1 as trained. interval: times at which it guides, from clean (0) to noise (1).

    longest: a guided velocity is at most so many times as long as that of what is told, image by image (arXiv:2503.21758); None: any."""

    caption: float = 1.0
    mask: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    longest: float | None = None

    def acts_at(self, time: float) -> bool:
        low, high = self.interval
        return (self.caption != 1 or self.mask != 1) and low <= time <= high


def guided(ask: Ask, guidance: Guidance, has_mask: bool) -> Velocity:
    """v(nothing) + mask (v(mask) - v(nothing)) + caption (v(mask, caption) - v(mask)): Brooks et al. 2023 (arXiv:2211.09800, eq. 3), the mask first.

    A term that a scale of 1, or a model without masks, leaves out of the sum is not asked for."""

    def velocity(images: Tensor, time: float) -> Tensor:
        told = ask(images, time, True, True)
        if not guidance.acts_at(time):
            return told
        found = told
        if guidance.caption != 1:
            without_caption = ask(images, time, False, True)
            found = without_caption + guidance.caption * (told - without_caption)
        if has_mask and guidance.mask != 1:
            with_mask = without_caption if guidance.caption != 1 else told
            without_mask = ask(images, time, guidance.caption == 1, False)
            found = found + (guidance.mask - 1) * (with_mask - without_mask)
        return found if guidance.longest is None else shortened(found, told, guidance.longest)

    return velocity


def shortened(velocity: Tensor, of_told: Tensor, longest: float) -> Tensor:
    """[N, C, H, W], each image's at most `longest` times as long as `of_told`."""
    lengths, allowed = (torch.linalg.vector_norm(part, dim=(1, 2, 3), keepdim=True) for part in (velocity, of_told))
    return velocity * (longest * allowed / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)).clamp(max=1)
