"""The diffusion process of semantic diffusion: noise or velocity and the variance of every step are learned together. Used by the family's model.py.

Improved DDPM, Nichol & Dhariwal 2021 (arXiv:2102.09672); the network's output is [N, 2 C, H, W]: what is predicted, then the variance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from medgen.models.base import SampleNoise
from medgen.models.diffusion import samplers
from medgen.models.diffusion.config import SAMPLERS
from medgen.models.diffusion.discrete import DiscreteTime, Predict
from medgen.models.sdm.config import BOUND_WEIGHT
from medgen.models.sdm.variance import Steps, bits_of_a_step


@dataclass(frozen=True)
class HybridLosses:
    """Of each sample [N] in float32. squared_error: of what is predicted; bits: of one step, per number; loss: what is trained on."""

    squared_error: Tensor
    bits: Tensor
    loss: Tensor


class LearnedVariance(DiscreteTime):
    """Discrete times with a learned variance. Training: times, noised, losses; sampling: sample."""

    def __init__(
        self,
        timesteps: int = 1000,
        schedule: Literal["cosine", "linear"] = "linear",
        predicts_velocity: bool = False,
        min_snr_gamma: float | None = None,
        bound_weight: float = BOUND_WEIGHT,
    ):
        super().__init__(timesteps, schedule, predicts_velocity, min_snr_gamma)
        self.bound_weight = bound_weight
        self.steps = Steps.of(self.alpha_bar)

    def losses(self, clean: Tensor, noisy: Tensor, target: Tensor, output: Tensor, times: Tensor, counted: Tensor | None = None) -> HybridLosses:
        """Of what `noised` made of clean images at times int64 [N]; output: the network's, [N, 2 C, H, W].

        counted: [N, 1, H, W], 1 where a pixel counts and 0 in padding; None: all count. A sample needs one pixel that counts.
        The predicted clean image is clamped to [-1, 1] for the bits, as it is in sampling: with the cosine schedule an error of 1 in the
        noise is one of 20,000 in the image at the last time, and one such sample would outweigh thousands of others."""
        prediction, share = parts(output)
        predicted_clean = self.clean(noisy, prediction, times).clamp(-1, 1)
        squared_error = mean_of_sample((prediction - target).square(), counted)
        bits = mean_of_sample(bits_of_a_step(clean, noisy, predicted_clean, share, times, self.steps), counted)
        loss = self.loss_weight(times) * squared_error + self.bound_weight * self.timesteps * bits
        return HybridLosses(squared_error, bits, loss)

    def sample(self, predict: Predict, noise: SampleNoise, shape: tuple[int, ...], sampler: str, times: Sequence[int], eta: float = 0.0) -> Tensor:
        """Images [N, *shape] in about [-1, 1]. times: those of training at which the network is asked, falling, ending near 0.

        sampler: one of SAMPLERS["ddpm"] of diffusion/config.py: "ddpm" with the learned variance, "ddim" with eta, "dpm_solver_2m"; the last two do without the variance. `eta` is of
        ddim alone. Raises ValueError for another sampler."""
        levels = self.levels(times)
        if sampler == "ddpm":
            return samplers.ancestral_learned(self._denoiser_with_std(predict, times), levels, noise, shape)
        denoise = self.denoiser(lambda images, time: parts(predict(images, time))[0], times)
        if sampler == "ddim":
            return samplers.ddim(denoise, levels, noise, shape, eta)
        if sampler == "dpm_solver_2m":
            return samplers.dpm_solver_2m(denoise, levels, noise, shape)
        raise ValueError(f"sampler: {sampler!r} does not fit a learned variance; use one of: {', '.join(SAMPLERS['ddpm'])}")

    def _denoiser_with_std(self, predict: Predict, times: Sequence[int]) -> samplers.DenoiseWithStd:
        """Bounds of the variance are those of the steps between the chosen times (section 4)."""
        levels, steps = self.levels(times), Steps.of(self.alpha_bar[torch.tensor(times[::-1])])

        def denoise(images: Tensor, number: int) -> tuple[Tensor, Tensor]:
            prediction, share = parts(self.predicted_at(predict, images, times[number]))
            clean, _ = self._split(images, prediction, levels[number].signal, levels[number].noise)
            place = torch.full((len(images),), len(times) - 1 - number, device=images.device)
            return clean, (steps.log_variance(share, place) / 2).exp()

        return denoise


def parts(output: Tensor) -> tuple[Tensor, Tensor]:
    """(prediction, share of the way from the lowest to the highest log variance), both [N, C, H, W] float32, of a network's output.

    The output's second half says the share as a number in about [-1, 1], which nothing keeps there (section 3.1)."""
    prediction, said = output.float().chunk(2, dim=1)
    return prediction, (said + 1) / 2


def mean_of_sample(values: Tensor, counted: Tensor | None) -> Tensor:
    """[N, C, H, W] to [N], over the pixels that count."""
    if counted is None:
        return values.mean(dim=(1, 2, 3))
    return (values * counted).sum(dim=(1, 2, 3)) / (counted.sum(dim=(1, 2, 3)) * values.shape[1])
