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
from medgen.models.diffusion import samplers
from medgen.models.diffusion.config import Config, SamplingSettings

# predict(noisy images [N, C, H, W], network time [N]) -> what the network was trained to predict [N, C, H, W]
Predict = Callable[[Tensor, Tensor], Tensor]
NETWORK_TIME_SCALE = 1000.0  # the U-Net's sinusoidal embedding was designed for times up to about 1000
LINEAR_BETAS = (1e-4, 0.02)  # at 1000 timesteps
LARGEST_BETA = 0.999


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
        """What the network's time embedding receives, [N] float32: NETWORK_TIME_SCALE times `time_fraction`."""

    @abstractmethod
    def time_fraction(self, times: Tensor) -> Tensor:
        """Times as a share of the way from clean (0) to noise (1), for the loss per timestep bin."""

    def clean(self, noisy: Tensor, prediction: Tensor, times: Tensor) -> Tensor:
        """The clean images [N, C, H, W] that a prediction amounts to, not clamped. Losses on images need it, so give it if you want them."""
        raise NotImplementedError(f"{type(self).__name__} does not say what clean image a prediction amounts to")

    def snr(self, times: Tensor) -> Tensor:
        """Signal-to-noise ratio signal^2 / noise^2 of each time, [N]; infinite where there is no noise."""
        raise NotImplementedError(f"{type(self).__name__} does not say its signal-to-noise ratio")

    def loss_weight(self, times: Tensor) -> Tensor:
        """What each sample's squared error counts in training, [N]."""
        return torch.ones_like(times, dtype=torch.float32)

    @abstractmethod
    def sample(self, predict: Predict, noise: SampleNoise, shape: tuple[int, ...], settings: SamplingSettings) -> Tensor:
        """Images [N, *shape] in about [-1, 1]."""


class DDPM(Strategy):
    """Denoising diffusion at discrete times, predicting the noise (epsilon) or the velocity v = signal * noise - noise level * clean.

    Ho et al. 2020 (arXiv:2006.11239); v: Salimans & Ho 2022 (arXiv:2202.00512, appendix D)."""

    samplers = ("ddpm", "ddim", "dpm_solver_2m")

    def __init__(self, config: Config):
        super().__init__(config)
        self.timesteps = config.timesteps or 1000
        self.predicts_velocity = config.prediction == "v"
        make = linear_alpha_bar if config.schedule == "linear" else cosine_alpha_bar
        self.alpha_bar = make(self.timesteps)
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
        gamma = self.config.min_snr_gamma
        if gamma is None:
            return super().loss_weight(times)
        snr = self.snr(times)
        return snr.clamp(max=gamma) / (snr + 1 if self.predicts_velocity else snr)

    def sample(self, predict: Predict, noise: SampleNoise, shape: tuple[int, ...], settings: SamplingSettings) -> Tensor:
        times = samplers.discrete_times(self.timesteps, settings.steps)
        levels = [samplers.Level(float(self.alpha_bar[time].sqrt()), float((1 - self.alpha_bar[time]).sqrt())) for time in times]

        def denoise(images: Tensor, number: int) -> tuple[Tensor, Tensor]:
            time = torch.full((len(images),), times[number], device=images.device)
            prediction = predict(images, self.network_time(time)).float()
            return self._split(images, prediction, levels[number].signal, levels[number].noise)

        if settings.sampler == "ddim":
            return samplers.ddim(denoise, levels, noise, shape, settings.eta)
        sampler = {"ddpm": samplers.ancestral, "dpm_solver_2m": samplers.dpm_solver_2m}[settings.sampler]
        return sampler(denoise, levels, noise, shape)

    def _levels_at(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (like.dim() - 1))
        return self.signal.to(like)[times].view(shape), self.noise.to(like)[times].view(shape)

    def _split(self, noisy: Tensor, prediction: Tensor, signal: Tensor | float, noise: Tensor | float) -> tuple[Tensor, Tensor]:
        """(clean image, noise) that a prediction amounts to."""
        if self.predicts_velocity:
            return signal * noisy - noise * prediction, noise * noisy + signal * prediction
        return (noisy - noise * prediction) / signal, prediction


class RFlow(Strategy):
    """Rectified flow: straight paths from clean (t = 0) to noise (t = 1), predicting the velocity clean - noise, at continuous times.

    Liu et al. 2022 (arXiv:2209.03003); logit-normal times: Esser et al. 2024 (arXiv:2403.03206, section 3.1)."""

    samplers = ("euler", "midpoint", "ab2", "heun")

    def times(self, uniform: Tensor) -> Tensor:
        if self.config.times == "uniform":
            return samplers.shifted(uniform, self.config.time_shift)
        inside = uniform.clamp(1e-4, 1 - 1e-4)
        return samplers.shifted(torch.sigmoid(torch.special.ndtri(inside)), self.config.time_shift)

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        share = times.view(-1, *[1] * (clean.dim() - 1))
        return (1 - share) * clean + share * noise, clean - noise

    def network_time(self, times: Tensor) -> Tensor:
        return times * NETWORK_TIME_SCALE

    def time_fraction(self, times: Tensor) -> Tensor:
        return times

    def clean(self, noisy: Tensor, prediction: Tensor, times: Tensor) -> Tensor:
        return noisy + times.view(-1, *[1] * (noisy.dim() - 1)) * prediction

    def snr(self, times: Tensor) -> Tensor:
        return ((1 - times) / times).square()

    def sample(self, predict: Predict, noise: SampleNoise, shape: tuple[int, ...], settings: SamplingSettings) -> Tensor:
        def velocity(images: Tensor, time: float) -> Tensor:
            return predict(images, self.network_time(torch.full((len(images),), time, device=images.device))).float()

        solver = {"euler": samplers.euler, "midpoint": samplers.midpoint, "ab2": samplers.adams_bashforth_2, "heun": samplers.heun}[settings.sampler]
        return solver(velocity, samplers.flow_times(settings.steps, settings.time_shift), noise.normal(shape))


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


STRATEGIES: dict[str, type[Strategy]] = {"ddpm": DDPM, "rflow": RFlow}


def make_strategy(config: Config) -> Strategy:
    found: type[Strategy] = plugin.load(config.strategy, Strategy) if plugin.is_plugin(config.strategy) else STRATEGIES[config.strategy]
    return found(config)
