"""Strategies: how images are noised, what the network predicts, and how it is sampled. Used by model.py.

A strategy of your own: subclass Strategy (or DDPM, RFlow) and name it as `strategy: mypackage.mine:Name`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from medgen.models import plugin
from medgen.models.base import SampleNoise
from medgen.models.diffusion.config import Config, SamplingSettings

# predict(noisy images [N, C, H, W], network time [N]) -> what the network was trained to predict [N, C, H, W]
Predict = Callable[[Tensor, Tensor], Tensor]
NETWORK_TIME_SCALE = 1000.0  # the U-Net's sinusoidal embedding was designed for times up to about 1000


class Strategy(ABC):
    """Images are in [-1, 1]. `times` and `noised` define training, `sample` inverts it."""

    samplers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Config):
        self.config = config

    @abstractmethod
    def times(self, uniform: Tensor) -> Tensor:
        """Training times from uniform numbers in [0, 1): [N] -> [N]."""

    @abstractmethod
    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """(noisy images, prediction target), both like `clean`."""

    @abstractmethod
    def network_time(self, times: Tensor) -> Tensor:
        """What the U-Net's time embedding receives, [N] float32."""

    @abstractmethod
    def time_fraction(self, times: Tensor) -> Tensor:
        """Times as a share of the way from clean (0) to noise (1), for the loss per timestep bin."""

    @abstractmethod
    def sample(self, predict: Predict, noise: SampleNoise, shape: tuple[int, ...], settings: SamplingSettings) -> Tensor:
        """Images [N, *shape] in about [-1, 1]."""


class DDPM(Strategy):
    """Denoising diffusion with the cosine schedule and noise prediction.

    Ho et al. 2020 (arXiv:2006.11239); schedule: Nichol & Dhariwal 2021 (arXiv:2102.09672, eq. 17)."""

    samplers = ("ddpm", "ddim")

    def __init__(self, config: Config):
        super().__init__(config)
        self.timesteps = config.timesteps or 1000
        self.alpha_bar = cosine_alpha_bar(self.timesteps)

    def times(self, uniform: Tensor) -> Tensor:
        return (uniform * self.timesteps).long()

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.alpha_bar.to(clean)[times].view(-1, 1, 1, 1)
        return alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise, noise

    def network_time(self, times: Tensor) -> Tensor:
        return times.float() * (NETWORK_TIME_SCALE / self.timesteps)

    def time_fraction(self, times: Tensor) -> Tensor:
        return times.float() / self.timesteps

    def sample(self, predict: Predict, noise: SampleNoise, shape: tuple[int, ...], settings: SamplingSettings) -> Tensor:
        images = noise.normal(shape)
        times = sampling_times(self.timesteps, settings.steps)
        for now, following in zip(times, [*times[1:], -1], strict=True):
            alpha_bar = float(self.alpha_bar[now])
            alpha_bar_next = float(self.alpha_bar[following]) if following >= 0 else 1.0
            time = torch.full((len(images),), now, device=images.device)
            predicted_noise = predict(images, self.network_time(time)).float()
            clean = (images - math.sqrt(1 - alpha_bar) * predicted_noise) / math.sqrt(alpha_bar)
            clean = clean.clamp(-1, 1)  # images are in [-1, 1]; early steps divide by almost zero
            # the noise that matches the clamped image, so that both formulas stay consistent
            implied_noise = (images - math.sqrt(alpha_bar) * clean) / math.sqrt(1 - alpha_bar)
            eta = 1.0 if settings.sampler == "ddpm" else settings.eta
            std = eta * posterior_std(alpha_bar, alpha_bar_next)
            images = math.sqrt(alpha_bar_next) * clean + math.sqrt(max(0.0, 1 - alpha_bar_next - std**2)) * implied_noise
            if std > 0:
                images = images + std * noise.normal(shape)
        return images


class RFlow(Strategy):
    """Rectified flow: straight paths from clean (t = 0) to noise (t = 1), velocity prediction, Euler sampling.

    Liu et al. 2022 (arXiv:2209.03003); logit-normal times: Esser et al. 2024 (arXiv:2403.03206, section 3.1)."""

    samplers = ("euler",)

    def times(self, uniform: Tensor) -> Tensor:
        if self.config.times == "uniform":
            return uniform
        inside = uniform.clamp(1e-4, 1 - 1e-4)
        return torch.sigmoid(torch.special.ndtri(inside))

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        share = times.view(-1, 1, 1, 1)
        return (1 - share) * clean + share * noise, clean - noise

    def network_time(self, times: Tensor) -> Tensor:
        return times * NETWORK_TIME_SCALE

    def time_fraction(self, times: Tensor) -> Tensor:
        return times

    def sample(self, predict: Predict, noise: SampleNoise, shape: tuple[int, ...], settings: SamplingSettings) -> Tensor:
        images = noise.normal(shape)
        step = 1.0 / settings.steps
        for number in range(settings.steps):
            time = torch.full((len(images),), 1 - number * step, device=images.device)
            images = images + step * predict(images, self.network_time(time)).float()
        return images


def cosine_alpha_bar(timesteps: int) -> Tensor:
    """Cumulative products of alpha, float64 [timesteps], from almost 1 to almost 0."""
    edges = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    curve = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, dim=0)


def sampling_times(timesteps: int, steps: int) -> list[int]:
    """`steps` times from timesteps-1 down, evenly spaced; always starting at pure noise."""
    return [round(timesteps * (steps - number) / steps) - 1 for number in range(steps)]


def posterior_std(alpha_bar: float, alpha_bar_next: float) -> float:
    """Standard deviation of q(x_next | x_now, x_0) for a jump of any length (arXiv:2010.02502, eq. 16, eta = 1)."""
    return math.sqrt((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next))


STRATEGIES: dict[str, type[Strategy]] = {"ddpm": DDPM, "rflow": RFlow}


def make_strategy(config: Config) -> Strategy:
    found: type[Strategy] = plugin.load(config.strategy, Strategy) if plugin.is_plugin(config.strategy) else STRATEGIES[config.strategy]
    return found(config)
