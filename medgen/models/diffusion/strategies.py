"""Strategies: how images are noised, what the network predicts, and how it is sampled. Used by model.py.

A strategy of your own: subclass Strategy (or DDPM, RFlow) and name it as `strategy: mypackage.mine:Name`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from medgen.models import plugin
from medgen.models.base import SampleNoise
from medgen.models.diffusion import samplers
from medgen.models.diffusion.config import Config, SamplingSettings
from medgen.models.diffusion.discrete import NETWORK_TIME_SCALE, DiscreteTime, Predict
from medgen.models.straight_path import SOLVERS, StraightPath, solved


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


class DDPM(DiscreteTime, Strategy):
    """Denoising diffusion at discrete times, predicting the noise or the velocity: discrete.py has the mathematics."""

    samplers = ("ddpm", "ddim", "dpm_solver_2m")

    def __init__(self, config: Config):
        Strategy.__init__(self, config)
        DiscreteTime.__init__(self, config.timesteps or 1000, config.schedule or "cosine", config.prediction == "v", config.min_snr_gamma)

    def sample(self, predict: Predict, noise: SampleNoise, shape: tuple[int, ...], settings: SamplingSettings) -> Tensor:
        times = samplers.discrete_times(self.timesteps, settings.steps)
        denoise, levels = self.denoiser(predict, times), self.levels(times)
        if settings.sampler == "ddim":
            return samplers.ddim(denoise, levels, noise, shape, settings.eta)
        sampler = {"ddpm": samplers.ancestral, "dpm_solver_2m": samplers.dpm_solver_2m}[settings.sampler]
        return sampler(denoise, levels, noise, shape)


class RFlow(Strategy):
    """Rectified flow: straight paths from clean (t = 0) to noise (t = 1), predicting the velocity clean - noise, at continuous times."""

    samplers = tuple(SOLVERS)

    def __init__(self, config: Config):
        super().__init__(config)
        self.path = StraightPath(config.times or "logit_normal", config.time_shift)

    def times(self, uniform: Tensor) -> Tensor:
        return self.path.times(uniform)

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        return self.path.noised(clean, noise, times)

    def network_time(self, times: Tensor) -> Tensor:
        return times * NETWORK_TIME_SCALE

    def time_fraction(self, times: Tensor) -> Tensor:
        return self.path.time_fraction(times)

    def clean(self, noisy: Tensor, prediction: Tensor, times: Tensor) -> Tensor:
        return self.path.clean(noisy, prediction, times)

    def snr(self, times: Tensor) -> Tensor:
        return ((1 - times) / times).square()

    def sample(self, predict: Predict, noise: SampleNoise, shape: tuple[int, ...], settings: SamplingSettings) -> Tensor:
        def velocity(images: Tensor, time: float) -> Tensor:
            return predict(images, self.network_time(torch.full((len(images),), time, device=images.device))).float()

        return solved(velocity, settings.sampler, settings.steps, settings.time_shift, noise.normal(shape))


STRATEGIES: dict[str, type[Strategy]] = {"ddpm": DDPM, "rflow": RFlow}


def make_strategy(config: Config) -> Strategy:
    found: type[Strategy] = plugin.load(config.strategy, Strategy) if plugin.is_plugin(config.strategy) else STRATEGIES[config.strategy]
    return found(config)
