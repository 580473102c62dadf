"""Straight paths from images to noise, the times at which they are learned, and the solvers that go back. Used by diffusion's rflow and by flow.

Liu et al. 2022 (arXiv:2209.03003); logit-normal times: Esser et al. 2024 (arXiv:2403.03206, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from medgen.models.diffusion import samplers

SOLVERS: dict[str, Callable[[samplers.Velocity, list[float], Tensor], Tensor]] = {
    "euler": samplers.euler, "midpoint": samplers.midpoint, "ab2": samplers.adams_bashforth_2, "heun": samplers.heun,
}  # fmt: skip


@dataclass(frozen=True)
class StraightPath:
    """From clean (t = 0) to noise (t = 1), learned as the velocity clean - noise, at continuous times.

    shift: above 1 moves times towards noise, in training alone; sampling has its own."""

    drawn: Literal["logit_normal", "uniform"]
    shift: float = 1.0

    def times(self, uniform: Tensor) -> Tensor:
        """Training times from uniform numbers in [0, 1): [N] -> [N]."""
        if self.drawn == "uniform":
            return samplers.shifted(uniform, self.shift)
        inside = uniform.clamp(1e-4, 1 - 1e-4)
        return samplers.shifted(torch.sigmoid(torch.special.ndtri(inside)), self.shift)

    def time_fraction(self, times: Tensor) -> Tensor:
        return times

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """(noisy images, the velocity there)."""
        share = times.view(-1, *[1] * (clean.dim() - 1))
        return (1 - share) * clean + share * noise, clean - noise

    def clean(self, noisy: Tensor, velocity: Tensor, times: Tensor) -> Tensor:
        """The end of the path on which a velocity lies."""
        return noisy + times.view(-1, *[1] * (noisy.dim() - 1)) * velocity


def solved(velocity: samplers.Velocity, sampler: str, steps: int, shift: float, noise: Tensor) -> Tensor:
    """From noise to images, along a velocity of (images, time); `sampler`: one of SOLVERS."""
    return SOLVERS[sampler](velocity, samplers.flow_times(steps, shift), noise)
