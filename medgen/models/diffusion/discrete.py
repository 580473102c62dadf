"""Noising at discrete times: the schedules, and what is known of an image at each time. Used by strategies.py and by sdm/process.py.

Nothing here knows a configuration or a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from medgen.models.diffusion import samplers

# predict(noisy images [N, C, H, W], network time [N]) -> what the network was trained to predict, in the form that its strategy says
Predict = Callable[[Tensor, Tensor], Tensor]
NETWORK_TIME_SCALE = 1000.0  # the U-Net's sinusoidal embedding was designed for times up to about 1000
LINEAR_BETAS = (1e-4, 0.02)  # at 1000 timesteps
LARGEST_BETA = 0.999


class DiscreteTime:
    """Images in [-1, 1], noised to signal * clean + noise level * normal noise at the times 0 (all but clean) to timesteps - 1 (pure noise).

    The network predicts the noise (epsilon) or the velocity v = signal * noise - noise level * clean.
    Ho et al. 2020 (arXiv:2006.11239); v: Salimans & Ho 2022 (arXiv:2202.00512, appendix D)."""

    def __init__(self, timesteps: int, schedule: Literal["cosine", "linear"], predicts_velocity: bool = False, min_snr_gamma: float | None = None):
        self.timesteps, self.predicts_velocity, self.min_snr_gamma = timesteps, predicts_velocity, min_snr_gamma
        self.alpha_bar = {"linear": linear_alpha_bar, "cosine": cosine_alpha_bar}[schedule](timesteps)
        self.signal, self.noise = self.alpha_bar.sqrt().float(), (1 - self.alpha_bar).sqrt().float()

    def times(self, uniform: Tensor) -> Tensor:
        return (uniform * self.timesteps).long()

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        signal_level, noise_level = self._levels_at(times, clean)
        target = signal_level * noise - noise_level * clean if self.predicts_velocity else noise
        return signal_level * clean + noise_level * noise, target

    def network_time(self, times: Tensor) -> Tensor:
        return times.float() * (NETWORK_TIME_SCALE / self.timesteps)

    def time_fraction(self, times: Tensor) -> Tensor:
        return times.float() / self.timesteps

    def clean(self, noisy: Tensor, prediction: Tensor, times: Tensor) -> Tensor:
        return self._split(noisy, prediction, *self._levels_at(times, noisy))[0]

    def snr(self, times: Tensor) -> Tensor:
        signal, noise = self.signal.to(times.device)[times], self.noise.to(times.device)[times]
        return (signal / noise).square()

    def loss_weight(self, times: Tensor) -> Tensor:
        """Min-SNR-gamma, Hang et al. 2023 (arXiv:2303.09556, section 3.4): min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v."""
        if self.min_snr_gamma is None:
            return torch.ones_like(times, dtype=torch.float32)
        snr = self.snr(times)
        return snr.clamp(max=self.min_snr_gamma) / (snr + 1 if self.predicts_velocity else snr)

    def levels(self, times: Sequence[int]) -> list[samplers.Level]:
        """Of chosen times, in float64."""
        return [samplers.Level(float(self.alpha_bar[time].sqrt()), float((1 - self.alpha_bar[time]).sqrt())) for time in times]

    def predicted_at(self, predict: Predict, images: Tensor, time: int) -> Tensor:
        """What is predicted for images that are all at one time, in float32."""
        times = torch.full((len(images),), time, device=images.device)
        return predict(images, self.network_time(times)).float()

    def denoiser(self, predict: Predict, times: Sequence[int]) -> samplers.Denoise:
        """For the samplers: step number n is at times[n]."""
        levels = self.levels(times)

        def denoise(images: Tensor, number: int) -> tuple[Tensor, Tensor]:
            prediction = self.predicted_at(predict, images, times[number])
            return self._split(images, prediction, levels[number].signal, levels[number].noise)

        return denoise

    def _levels_at(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (like.dim() - 1))
        return self.signal.to(like)[times].view(shape), self.noise.to(like)[times].view(shape)

    def _split(self, noisy: Tensor, prediction: Tensor, signal: Tensor | float, noise: Tensor | float) -> tuple[Tensor, Tensor]:
        """(clean image, noise) that a prediction amounts to."""
        if self.predicts_velocity:
            return signal * noisy - noise * prediction, noise * noisy + signal * prediction
        return (noisy - noise * prediction) / signal, prediction


def cosine_alpha_bar(timesteps: int) -> Tensor:
    """Cumulative products of alpha, float64 [timesteps], from almost 1 to almost 0: Nichol & Dhariwal 2021 (arXiv:2102.09672, eq. 17)."""
    edges = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    curve = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - curve[1:] / curve[:-1]).clamp(max=LARGEST_BETA)
    return torch.cumprod(1 - betas, dim=0)


def linear_alpha_bar(timesteps: int) -> Tensor:
    """The same for betas that grow linearly from 1e-4 to 0.02 at 1000 timesteps, and in inverse proportion to their number: Ho et al. 2020, section 4."""
    first, last = (beta * 1000 / timesteps for beta in LINEAR_BETAS)
    betas = torch.linspace(first, last, timesteps, dtype=torch.float64).clamp(max=LARGEST_BETA)
    return torch.cumprod(1 - betas, dim=0)
