"""The semantic diffusion model: images from label maps, of a kind and a size. Built by train.py and generate.py.

Padding is neither learnt from nor drawn: the network sees 0 there at every time, it counts in no loss, and images are 0 there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from medgen.errors import InputError
from medgen.models.averages import horizons
from medgen.models.base import Batch, DataShape, Given, SampleNoise, Sizes, StepContext, count_parameters, joined
from medgen.models.denoising import DenoisingModel, SampleLosses
from medgen.models.diffusion import samplers
from medgen.models.sdm.conditions import Conditions
from medgen.models.sdm.config import LEAST_KINDS, Config, SamplingSettings
from medgen.models.sdm.networks import SemanticUNet
from medgen.models.sdm.process import LearnedVariance, mean_of_sample, parts
from medgen.models.sdm.sampling import Guidance, predictor
from medgen.models.settings import Settings


@dataclass(frozen=True)
class Tried:
    """What the network made of a batch: all [B, C, H, W], the output with twice the channels; counted: [B, 1, H, W], 0 in padding."""

    clean: Tensor
    noisy: Tensor
    target: Tensor
    output: Tensor
    counted: Tensor

    def constant_errors(self) -> Tensor:
        """Squared errors [B] if the best number per channel were predicted."""
        best = (self.target * self.counted).sum(dim=(0, 2, 3), keepdim=True) / self.counted.sum()
        return mean_of_sample((best - self.target).square(), self.counted)


class Model(DenoisingModel):
    """A semantic U-Net and a learned variance. The classes of its label map: no region, the regions in their order, padding."""

    config: Config
    network: SemanticUNet

    def __init__(self, config: Config, shape: DataShape):
        if config.uses_labels and len(shape.classes) < LEAST_KINDS:
            raise InputError(config.too_few_kinds(shape.classes))
        network = SemanticUNet(config.network_shape(shape.size, len(shape.regions), len(shape.classes)))
        self.process = LearnedVariance(config.timesteps, config.schedule, config.prediction == "v", config.min_snr_gamma, config.bound_weight)
        super().__init__(config, shape, network, self.process)

    def blocks(self) -> list[nn.Module]:
        return self.network.blocks

    def losses(self, network: nn.Module, batch: Batch, times: Tensor, context: StepContext) -> SampleLosses:
        labels = self._label_map(batch.channels) * ~self._dropped(batch, "mask", self.config.mask_dropout)[:, None, None, None]
        with context.autocast():
            tried = self._tried(network, batch, times, labels, self._with_dropout(batch))
        found = self.process.losses(tried.clean, tried.noisy, tried.target, tried.output, times, tried.counted)
        # the bits are as they are: only what is predicted would be constant
        constant = found.loss.detach() + self.process.loss_weight(times) * (tried.constant_errors() - found.squared_error.detach())
        return SampleLosses(found.loss, found.squared_error, constant, self.process.time_fraction(times), {"mse": found.squared_error, "bits": found.bits})

    def squared_errors(self, network: nn.Module, batch: Batch, times: Tensor, noise: Tensor | None = None) -> Tensor:
        tried = self._tried(network, batch, times, self._label_map(batch.channels), self._conditions(batch.labels, batch.sizes), noise)
        return mean_of_sample((parts(tried.output)[0] - tried.target).square(), tried.counted)

    def _tried(self, network: nn.Module, batch: Batch, times: Tensor, labels: Tensor, conditions: Conditions | None, noise: Tensor | None = None) -> Tried:
        clean, valid = joined(batch.channels, self.config.images), batch.channels["valid"]
        noisy, target = self.process.noised(clean, batch.normal("noise", self.image_shape) if noise is None else noise, times)
        output = network(noisy * valid, self.process.network_time(times), labels, conditions)
        return Tried(clean, noisy, target, output, valid)

    def _label_map(self, channels: dict[str, Tensor]) -> Tensor:
        """One-hot, float32 [N, classes, H, W], of masks that number the regions from 1; padding is of its own class alone."""
        valid = channels["valid"]
        numbers = torch.arange(1 + len(self.shape.regions), device=valid.device).view(1, -1, 1, 1)
        return torch.cat([(channels["seg"] == numbers).float() * valid, 1 - valid], dim=1)

    def _dropped(self, batch: Batch, name: str, share: float) -> Tensor:
        """Which samples are trained without it, bool [B], by their positions alone."""
        return batch.uniform(f"without_{name}") < share

    def _with_dropout(self, batch: Batch) -> Conditions | None:
        conditions = self._conditions(batch.labels, batch.sizes)
        if conditions is None:
            return None
        return replace(
            conditions,
            without_kind=self._dropped(batch, "kind", self.config.kind_dropout or 0.0),
            without_size=self._dropped(batch, "size", self.config.size_dropout or 0.0),
        )

    def _conditions(self, labels: Tensor | None, sizes: Sizes | None) -> Conditions | None:
        """All that the network is told; what it is not told stands there as numbers that it does not look at."""
        if labels is None and sizes is None:
            return None
        if labels is None:
            assert sizes is not None
            labels = torch.zeros(len(sizes.spacing_mm), dtype=torch.long, device=sizes.spacing_mm.device)
        if sizes is None:
            ones = torch.ones(len(labels), 2, device=labels.device)
            sizes = Sizes(ones, ones)
        return Conditions.told(labels, sizes.spacing_mm, sizes.field_mm)

    @torch.no_grad()
    def sample(self, noise: SampleNoise, given: Given, settings: Settings) -> dict[str, Tensor]:
        assert isinstance(settings, SamplingSettings)
        network, valid = self.weights(settings.weights).eval(), given.channels["valid"]
        assert isinstance(network, SemanticUNet)
        guidance = Guidance(settings.guidance, settings.kind_guidance, settings.size_guidance, settings.guidance_interval)
        predict = predictor(network, self._label_map(given.channels), self._conditions(given.labels, given.sizes), guidance)
        chosen = samplers.even_times if settings.sampler == "ddpm" else samplers.discrete_times
        times = chosen(self.config.timesteps, settings.steps)
        images = self.process.sample(lambda noisy, time: predict(noisy * valid, time), noise, self.image_shape, settings.sampler, times, settings.eta)
        images = ((images + 1) / 2).clamp(0, 1) * valid
        return {name: images[:, place : place + 1] for place, name in enumerate(self.config.images)}

    def describe(self, total_steps: int) -> list[str]:
        config, network = self.config, self.network.shape
        told = {"kind": f"the kind ({', '.join(self.shape.classes)})", "size": "spacing and field of view"}
        widths, attending = "-".join(map(str, network.widths)), [str(level + 1) for level, attends in enumerate(network.attention) if attends]
        return [
            f"label maps of {', '.join(self.shape.regions)} -> {', '.join(config.images)}, told {' and '.join(told[name] for name in config.told) or 'nothing else'}",
            f"semantic U-Net {widths}, {network.res_blocks} residual blocks per level, attention at {', '.join(attending) or 'no level'} and in the middle, {count_parameters(self.network):,} parameters",
            f"{config.timesteps} times of the {config.schedule} schedule, predicting {'the velocity' if config.prediction == 'v' else 'the noise'} and the variance of each step",
            *horizons(config.ema, total_steps),
        ]
