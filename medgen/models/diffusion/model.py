"""The diffusion model: a network trained by a strategy in a mode. Built by train.py and generate.py."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from medgen.models.averages import horizons
from medgen.models.base import Batch, DataShape, Given, SampleNoise, StepContext, joined
from medgen.models.denoising import DenoisingModel, SampleLosses
from medgen.models.diffusion.config import Config, SamplingSettings
from medgen.models.diffusion.networks import build_network, describe_network
from medgen.models.diffusion.perceptual import PerceptualLoss
from medgen.models.diffusion.strategies import NETWORK_TIME_SCALE, make_strategy
from medgen.models.settings import Settings


@dataclass(frozen=True)
class Tried:
    """What the network made of a batch: all [B, C, H, W]; the prediction in the precision of the forward pass."""

    clean: Tensor
    noisy: Tensor
    target: Tensor
    prediction: Tensor

    def squared_errors(self) -> Tensor:
        """Mean of each sample [B] in float32."""
        return (self.prediction.float() - self.target).square().mean(dim=(1, 2, 3))

    def constant_errors(self) -> Tensor:
        """The same if the best number per channel were predicted instead."""
        return (self.target.mean(dim=(0, 2, 3), keepdim=True) - self.target).square().mean(dim=(1, 2, 3))


class Model(DenoisingModel):
    """Strategy x mode over one network, with an exponential moving average of its weights."""

    config: Config

    def __init__(self, config: Config, shape: DataShape):
        self.mode = config.mode_class
        self.strategy = make_strategy(config)
        self._says_if_conditioned = config.condition_dropout > 0  # one channel more: an empty mask is a condition too
        channels_in = len(self.mode.targets) + len(self.mode.conditions) + self._says_if_conditioned
        super().__init__(config, shape, build_network(config, channels_in, len(self.mode.targets), shape.size), self.strategy)

    def blocks(self) -> list[nn.Module]:
        return list(self.network.blocks)  # type: ignore[arg-type]

    @cached_property
    def perceptual(self) -> PerceptualLoss | None:
        """Made for the first step, not for sampling, and on the device where the network is by then."""
        if self.config.perceptual is None:
            return None
        return PerceptualLoss(self.config.perceptual, self.strategy, self.mode.targets, next(self.network.parameters()).device)

    def losses(self, network: nn.Module, batch: Batch, times: Tensor, context: StepContext) -> SampleLosses:
        with context.autocast():
            tried = self._tried(network, batch, times, self._conditioned(batch))
        error, weight = tried.squared_errors(), self.strategy.loss_weight(times)
        loss, constant = error * weight, tried.constant_errors() * weight
        fraction = self.strategy.time_fraction(times)
        if self.perceptual is None:
            return SampleLosses(loss, error, constant, fraction)
        counted = torch.arange(len(batch), device=times.device) if context.rehearsing else self.perceptual.counted(times)
        distance = self.perceptual(tried.clean, tried.noisy, tried.prediction, times, counted)
        added = self.perceptual.weight * distance
        return SampleLosses(loss + added, error, constant + added, fraction, {"mse": error, "perceptual": distance})

    def squared_errors(self, network: nn.Module, batch: Batch, times: Tensor, noise: Tensor | None = None) -> Tensor:
        return self._tried(network, batch, times, None, noise).squared_errors()

    def _conditioned(self, batch: Batch) -> Tensor | None:
        """Which samples are trained with their condition, float32 [B] of 0 and 1; None for all."""
        if not self._says_if_conditioned:
            return None
        return (batch.uniform("condition") >= self.config.condition_dropout).float()

    def _tried(self, network: nn.Module, batch: Batch, times: Tensor, conditioned: Tensor | None, noise: Tensor | None = None) -> Tried:
        clean = joined(batch.channels, self.mode.targets)
        noisy, target = self.strategy.noised(clean, batch.normal("noise", self.image_shape) if noise is None else noise, times)
        prediction = network(self._network_input(noisy, batch.channels, conditioned), self.strategy.network_time(times))
        return Tried(clean, noisy, target, prediction)

    def _network_input(self, noisy: Tensor, channels: dict[str, Tensor], conditioned: Tensor | None) -> Tensor:
        """[noisy targets, conditions, 1 where there are conditions (if some samples are trained without)] as channels."""
        if not self.mode.conditions:
            return noisy
        conditions = joined(channels, self.mode.conditions)
        if not self._says_if_conditioned:
            return torch.cat([noisy, conditions], dim=1)
        present = torch.ones(len(noisy), device=noisy.device) if conditioned is None else conditioned
        present = present.view(-1, 1, 1, 1)
        return torch.cat([noisy, conditions * present, present.expand(-1, 1, *noisy.shape[2:])], dim=1)

    @torch.no_grad()
    def sample(self, noise: SampleNoise, given: Given, settings: Settings) -> dict[str, Tensor]:
        assert isinstance(settings, SamplingSettings)
        network = self.weights(settings.weights).eval()

        def predict(images: Tensor, time: Tensor) -> Tensor:
            low, high = settings.guidance_interval
            guided = settings.guidance != 1 and low <= float(time[0]) / NETWORK_TIME_SCALE <= high
            return self._guided(network, images, time, given, settings.guidance) if guided else self._predicted(network, images, time, given)

        images = self.strategy.sample(predict, noise, self.image_shape, settings)
        images = ((images + 1) / 2).clamp(0, 1)
        by_name = {name: images[:, place : place + 1] for place, name in enumerate(self.mode.targets)}
        if "seg" in by_name:
            by_name["seg"] = (by_name["seg"] > 0.5).float()
        return by_name

    def _predicted(self, network: nn.Module, images: Tensor, time: Tensor, given: Given) -> Tensor:
        prediction: Tensor = network(self._network_input(images, given.channels, None), time)
        return prediction

    def _guided(self, network: nn.Module, images: Tensor, time: Tensor, given: Given, scale: float) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, eq. 6, where scale is 1 + w); both in one pass."""
        with_condition = self._network_input(images, given.channels, None)
        without = self._network_input(images, given.channels, torch.zeros(len(images), device=images.device))
        conditional, unconditional = network(torch.cat([with_condition, without]), torch.cat([time, time])).float().chunk(2)
        return unconditional + scale * (conditional - unconditional)

    def describe(self, total_steps: int) -> list[str]:
        config = self.config
        return [
            f"{config.strategy} x {config.mode}: {', '.join(self.mode.conditions) or 'noise'} -> {', '.join(self.mode.targets)}, "
            f"{describe_network(config, self.network, self.shape.size)}",
            *([config.perceptual.words] if config.perceptual is not None else []),
            *horizons(config.ema, total_steps),
        ]
