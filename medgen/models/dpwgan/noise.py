"""The optimizer of a private critic: opacus' own, with noise from a generator that nobody can search through. Used by model.py."""

from __future__ import annotations

from typing import Any

import torch
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.optimizers.optimizer import _generate_noise


class NoisyOptimizer(DPOptimizerFastGradientClipping):
    """Adds noise of noise_multiplier x max_grad_norm to the sum of clipped gradients in `.grad`, divides by the expected batch, and steps.

    The noise is drawn on the CPU, from `generator`, so that an update that is made again on another device has the same one: two noises for
    one gradient would be two releases. Each number is a sum of several draws: the bits of a single float would tell what it was added to
    (Holohan and Braghin 2021, arXiv:2107.10138)."""

    def __init__(self, optimizer: torch.optim.Optimizer, expected_batch_size: int):
        super().__init__(optimizer, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=expected_batch_size, secure_mode=True)

    def add_noise(self) -> None:
        for parameter in self.params:
            drawn: Any = _generate_noise(
                std=self.noise_multiplier * self.max_grad_norm, reference=torch.empty_like(parameter.summed_grad, device="cpu"),
                generator=self.generator, secure_mode=self.secure_mode,
            )  # fmt: skip
            parameter.grad = (parameter.summed_grad + drawn.to(parameter.device)).view_as(parameter)
