"""The diffusion model: a network trained by a strategy in a mode. Built by train.py and generate.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from medgen import rng
from medgen.models.averages import averages_of, horizons, keep_counters_on_cpu
from medgen.models.base import (
    BINS,
    Batch,
    DataShape,
    Given,
    Phase,
    SampleNoise,
    StepContext,
    StepReport,
    joined,
)
from medgen.models.base import Model as Family
from medgen.models.diffusion.config import Config, SamplingSettings
from medgen.models.diffusion.networks import build_network, describe_network
from medgen.models.diffusion.perceptual import PerceptualLoss
from medgen.models.diffusion.strategies import NETWORK_TIME_SCALE, make_strategy
from medgen.models.guard import SpikeGuard
from medgen.models.settings import Settings

# Quantiles of the training times at which an image is denoised to ask whether it was trained on: much noise drowns what is
# known of one image, none leaves nothing to guess (Carlini et al., USENIX Security 2023, arXiv:2301.13188, section 5.2)
ATTACK_TIMES = (0.1, 0.2, 0.3, 0.4)
ATTACK_NOISES = 1
WARMUP_START = 0.1  # the learning rate begins at this share of its full value


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


@dataclass(frozen=True)
class SampleLosses:
    """Of each sample [B], in float32. `distance`: the perceptual one, None without such a loss; `fraction`: of the way to noise."""

    loss: Tensor  # what is minimised
    squared_error: Tensor
    constant: Tensor  # what the loss would be if the network predicted a constant
    fraction: Tensor
    distance: Tensor | None

    def detached(self) -> SampleLosses:
        return SampleLosses(*(None if values is None else values.detach() for values in vars(self).values()))  # type: ignore[arg-type]

    @classmethod
    def of_all(cls, parts: list[SampleLosses]) -> SampleLosses:
        every = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(None if values[0] is None else torch.cat(values) for values in every))  # type: ignore[arg-type]


class Model(Family):
    """Strategy x mode over one network, with an exponential moving average of its weights."""

    def __init__(self, config: Config, shape: DataShape):
        self.config = config
        self.mode = config.mode_class
        self.strategy = make_strategy(config)
        self.image_shape = (len(self.mode.targets), shape.size, shape.size)
        self._says_if_conditioned = config.condition_dropout > 0  # one channel more: an empty mask is a condition too
        self.shape = shape
        channels_in = len(self.mode.targets) + len(self.mode.conditions) + self._says_if_conditioned
        self.network = build_network(config, channels_in, len(self.mode.targets), shape.size)
        self.averages = averages_of(self.network, config.ema)
        self.guard = SpikeGuard(config.loop)

    def modules(self) -> dict[str, nn.Module]:
        return {"network": self.network, **self.averages, "guard": self.guard}

    def blocks(self) -> list[nn.Module]:
        return list(self.network.blocks)

    def compiled_networks(self) -> list[nn.Module]:
        return [self.network]

    def weights(self, name: str) -> nn.Module:
        """The network with the weights of that name: raw, or those of an average."""
        return self.network if name == "raw" else self.averages[name].ema_model

    @cached_property
    def optimizer(self) -> torch.optim.AdamW:
        keep_counters_on_cpu(self.averages)
        # fused: one pass over the weights instead of a dozen, four times faster on the CPU
        return torch.optim.AdamW(self.network.parameters(), lr=self.config.lr, weight_decay=self.config.weight_decay, fused=True)

    @cached_property
    def perceptual(self) -> PerceptualLoss | None:
        """Made for the first step, not for sampling, and on the device where the network is by then."""
        if self.config.perceptual is None:
            return None
        return PerceptualLoss(self.config.perceptual, self.strategy, self.mode.targets, next(self.network.parameters()).device)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"network": self.optimizer}

    def phases(self) -> list[Phase]:
        return [Phase("main", self.config.epochs, self.config.batch_size, self.shape.size)]

    def step(self, batch: Batch, context: StepContext) -> StepReport:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, context.step / context.steps_per_epoch)
        network = context.parallel(self.network)
        parts = []
        for part, share in context.micro_batches(batch, network):
            losses = self._losses(network, part, context)
            (losses.loss.mean() * share).backward()
            parts.append(losses.detached())
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_norm)
        allowed = self.guard.allows(norm, context)
        if allowed:
            self.optimizer.step()
            for average in self.averages.values():
                average.update()
        self.optimizer.zero_grad(set_to_none=True)
        return self._report(SampleLosses.of_all(parts), norm, allowed, context)

    def _losses(self, network: nn.Module, batch: Batch, context: StepContext) -> SampleLosses:
        times = self.strategy.times(batch.uniform("time"))
        with context.autocast():
            tried = self._tried(network, batch, times, self._conditioned(batch))
        error, weight = tried.squared_errors(), self.strategy.loss_weight(times)
        loss, constant, distance = error * weight, tried.constant_errors() * weight, None
        if self.perceptual is not None:
            counted = torch.arange(len(batch), device=times.device) if context.rehearsing else self.perceptual.counted(times)
            distance = self.perceptual(tried.clean, tried.noisy, tried.prediction, times, counted)
            added = self.perceptual.weight * distance
            loss, constant = loss + added, constant + added
        return SampleLosses(loss, error, constant, self.strategy.time_fraction(times), distance)

    def _report(self, losses: SampleLosses, norm: Tensor, allowed: bool, context: StepContext) -> StepReport:
        scalars = {"loss": losses.loss.mean(), "lr": torch.tensor(self.optimizer.param_groups[0]["lr"]), "skipped": torch.tensor(float(not allowed))}
        if allowed or bool(norm.isfinite()):  # one that is not would hide all others of its logging window
            scalars["grad_norm"] = norm
        if losses.distance is not None:
            scalars |= {"mse": losses.squared_error.mean(), "perceptual": losses.distance.mean()}
        if context.step >= self.config.warmup_epochs * context.steps_per_epoch:
            scalars["constant_loss"] = losses.constant.mean()
        return StepReport(scalars, self._binned(losses.squared_error, losses.fraction))

    def validate(self, batch: Batch, context: StepContext) -> StepReport:
        """The mean squared error, every time counting alike: comparable between trainings that weigh them otherwise."""
        times = self.strategy.times(batch.uniform("time"))
        with context.autocast():
            error = self._errors(self.weights(self._sampled_weights), batch, times, None)
        return StepReport({"loss": error.mean()}, self._binned(error, self.strategy.time_fraction(times)))

    @property
    def _sampled_weights(self) -> str:
        return "ema" if self.averages else "raw"

    def _conditioned(self, batch: Batch) -> Tensor | None:
        """Which samples are trained with their condition, float32 [B] of 0 and 1; None for all."""
        if not self._says_if_conditioned:
            return None
        return (batch.uniform("condition") >= self.config.condition_dropout).float()

    def _errors(self, network: nn.Module, batch: Batch, times: Tensor, conditioned: Tensor | None, noise: Tensor | None = None) -> Tensor:
        """Mean squared error of what is predicted from each noised sample [B] in float32. `noise`: the samples' own if None."""
        return self._tried(network, batch, times, conditioned, noise).squared_errors()

    def _tried(self, network: nn.Module, batch: Batch, times: Tensor, conditioned: Tensor | None, noise: Tensor | None = None) -> Tried:
        clean = joined(batch.channels, self.mode.targets)
        noisy, target = self.strategy.noised(clean, batch.normal("noise", self.image_shape) if noise is None else noise, times)
        prediction = network(self._network_input(noisy, batch.channels, conditioned), self.strategy.network_time(times))
        return Tried(clean, noisy, target, prediction)

    def _binned(self, loss: Tensor, fraction: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return {"loss_t": ((fraction * BINS).long().clamp(0, BINS - 1), loss)}

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

    @torch.no_grad()
    def attack_scores(self, batch: Batch) -> Tensor:
        """Minus the error at a few noise levels, with the same noises for every image: what differs is the images."""
        network, errors = self.weights(self._sampled_weights).eval(), torch.zeros(len(batch), device=batch.device)
        for number in range(ATTACK_NOISES):
            noise = rng.normal_per_sample(self.image_shape, 0, "attack", [(number,)]).to(batch.device).expand(len(batch), -1, -1, -1)
            for level in ATTACK_TIMES:
                times = self.strategy.times(torch.full((len(batch),), level, device=batch.device))
                errors += self._errors(network, batch, times, None, noise)
        return -errors / (ATTACK_NOISES * len(ATTACK_TIMES))

    def describe(self, total_steps: int) -> list[str]:
        config = self.config
        return [
            f"{config.strategy} x {config.mode}: {', '.join(self.mode.conditions) or 'noise'} -> {', '.join(self.mode.targets)}, "
            f"{describe_network(config, self.network, self.shape.size)}",
            *([config.perceptual.words] if config.perceptual is not None else []),
            *horizons(config.ema, total_steps),
        ]


def learning_rate(config: Config, epoch: float) -> float:
    """Linear warm-up from 0.1 x lr, then a cosine to lr_min at the last epoch; `epoch` may be fractional."""
    if epoch < config.warmup_epochs:
        return config.lr * (WARMUP_START + (1 - WARMUP_START) * epoch / config.warmup_epochs)
    progress = min(1.0, (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs))
    return config.lr_min + (config.lr - config.lr_min) * (1 + math.cos(math.pi * progress)) / 2
