"""What families share that train one network to denoise images: the step, the learning rate, averages, the attack. Base of diffusion's and sdm's model.py."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from medgen import rng
from medgen.models.averages import averages_of, keep_counters_on_cpu
from medgen.models.base import BINS, Batch, DataShape, Model, Phase, StepContext, StepReport
from medgen.models.denoising_settings import DenoisingConfig
from medgen.models.guard import SpikeGuard

# Quantiles of the training times at which an image is denoised to ask whether it was trained on: much noise drowns what is
# known of one image, none leaves nothing to guess (Carlini et al., USENIX Security 2023, arXiv:2301.13188, section 5.2)
ATTACK_TIMES = (0.1, 0.2, 0.3, 0.4)
ATTACK_NOISES = 1
WARMUP_START = 0.1  # the learning rate begins at this share of its full value


class Process(Protocol):
    """How images are noised: at which times."""

    def times(self, uniform: Tensor) -> Tensor:
        """Training times from uniform numbers in [0, 1): [N] -> [N]."""
        ...

    def time_fraction(self, times: Tensor) -> Tensor:
        """Times as a share of the way from clean (0) to noise (1), for the loss per timestep bin."""
        ...


@dataclass(frozen=True)
class SampleLosses:
    """Of each sample [B], in float32. `fraction`: of the way to noise; `logged`: parts of the loss by their names in the log."""

    loss: Tensor  # what is minimised
    squared_error: Tensor
    constant: Tensor  # what the loss would be if the network predicted a constant
    fraction: Tensor
    logged: dict[str, Tensor] = field(default_factory=dict)

    def detached(self) -> SampleLosses:
        logged = {name: values.detach() for name, values in self.logged.items()}
        return SampleLosses(self.loss.detach(), self.squared_error.detach(), self.constant.detach(), self.fraction, logged)

    @classmethod
    def joined(cls, parts: list[SampleLosses]) -> SampleLosses:
        every = zip(*((part.loss, part.squared_error, part.constant, part.fraction) for part in parts), strict=True)
        loss, squared_error, constant, fraction = (torch.cat(values) for values in every)
        return cls(loss, squared_error, constant, fraction, {name: torch.cat([part.logged[name] for part in parts]) for name in parts[0].logged})


class DenoisingModel(Model):
    """One network with exponential moving averages of its weights. What is left to a family: its losses, and how it samples."""

    def __init__(self, config: DenoisingConfig, shape: DataShape, network: nn.Module, process: Process):
        self.config, self.shape = config, shape
        self.image_shape = (len(config.output_channels), shape.size, shape.size)
        self.network, self._process = network, process
        self.averages = averages_of(network, config.ema)
        self.guard = SpikeGuard(config.loop)

    @abstractmethod
    def losses(self, network: nn.Module, batch: Batch, times: Tensor, context: StepContext) -> SampleLosses:
        """Of training, at these times; `network`: the trained one, wrapped for data parallelism."""

    @abstractmethod
    def squared_errors(self, network: nn.Module, batch: Batch, times: Tensor, noise: Tensor | None = None) -> Tensor:
        """Mean squared error of what is predicted from each noised sample [B] in float32, with all conditions. `noise`: the samples' own if None."""

    def modules(self) -> dict[str, nn.Module]:
        return {"network": self.network, **self.averages, "guard": self.guard}

    def compiled_networks(self) -> list[nn.Module]:
        return [self.network]

    def weights(self, name: str) -> nn.Module:
        """The network with the weights of that name: raw, or those of an average."""
        return self.network if name == "raw" else self.averages[name].ema_model

    @property
    def _sampled_weights(self) -> str:
        return "ema" if self.averages else "raw"

    @cached_property
    def optimizer(self) -> torch.optim.AdamW:
        keep_counters_on_cpu(self.averages)
        # fused: one pass over the weights instead of a dozen, four times faster on the CPU
        return torch.optim.AdamW(self.network.parameters(), lr=self.config.lr, weight_decay=self.config.weight_decay, fused=True)

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
            losses = self.losses(network, part, self._process.times(part.uniform("time")), context)
            (losses.loss.mean() * share).backward()
            parts.append(losses.detached())
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_norm)
        allowed = self.guard.allows(norm, context)
        if allowed:
            self.optimizer.step()
            for average in self.averages.values():
                average.update()
        self.optimizer.zero_grad(set_to_none=True)
        return self._report(SampleLosses.joined(parts), norm, allowed, context)

    def _report(self, losses: SampleLosses, norm: Tensor, allowed: bool, context: StepContext) -> StepReport:
        scalars = {"loss": losses.loss.mean(), "lr": torch.tensor(self.optimizer.param_groups[0]["lr"]), "skipped": torch.tensor(float(not allowed))}
        if allowed or bool(norm.isfinite()):  # one that is not would hide all others of its logging window
            scalars["grad_norm"] = norm
        scalars |= {name: values.mean() for name, values in losses.logged.items()}
        if context.step >= self.config.warmup_epochs * context.steps_per_epoch:
            scalars["constant_loss"] = losses.constant.mean()
        return StepReport(scalars, _binned(losses.squared_error, losses.fraction))

    def validate(self, batch: Batch, context: StepContext) -> StepReport:
        """The mean squared error, every time counting alike: comparable between trainings that weigh them otherwise."""
        times = self._process.times(batch.uniform("time"))
        with context.autocast():
            error = self.squared_errors(self.weights(self._sampled_weights), batch, times)
        return StepReport({"loss": error.mean()}, _binned(error, self._process.time_fraction(times)))

    @torch.no_grad()
    def attack_scores(self, batch: Batch) -> Tensor:
        """Minus the error at a few noise levels, with the same noises for every image: what differs is the images."""
        network, errors = self.weights(self._sampled_weights).eval(), torch.zeros(len(batch), device=batch.device)
        for number in range(ATTACK_NOISES):
            noise = rng.normal_per_sample(self.image_shape, 0, "attack", [(number,)]).to(batch.device).expand(len(batch), -1, -1, -1)
            for level in ATTACK_TIMES:
                times = self._process.times(torch.full((len(batch),), level, device=batch.device))
                errors += self.squared_errors(network, batch, times, noise)
        return -errors / (ATTACK_NOISES * len(ATTACK_TIMES))


def learning_rate(config: DenoisingConfig, epoch: float) -> float:
    """Linear warm-up from 0.1 x lr, then a cosine to lr_min at the last epoch; `epoch` may be fractional."""
    if epoch < config.warmup_epochs:
        return config.lr * (WARMUP_START + (1 - WARMUP_START) * epoch / config.warmup_epochs)
    progress = min(1.0, (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs))
    return config.lr_min + (config.lr - config.lr_min) * (1 + math.cos(math.pi * progress)) / 2


def _binned(loss: Tensor, fraction: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    return {"loss_t": ((fraction * BINS).long().clamp(0, BINS - 1), loss)}
