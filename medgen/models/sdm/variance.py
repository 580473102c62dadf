"""The steps of a discrete diffusion from noise to images: their means, and the variance that a network learns within bounds. Used by process.py.

Improved DDPM, Nichol & Dhariwal 2021 (arXiv:2102.09672); images are in [-1, 1]."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HALF_BIN = 1 / 255  # images of 256 grey levels lie 2/255 apart in [-1, 1]
OUTERMOST = 0.999  # beyond it a grey level is the first or the last, whose bin has no end
LEAST_PROBABILITY = 1e-12


@dataclass(frozen=True)
class Steps:
    """q(x_{t-1} | x_t, x_0) of every time t of a process, and bounds for the variance of p(x_{t-1} | x_t); float64 [timesteps].

    The mean is from_clean x_0 + from_noisy x_t (Ho et al. 2020, arXiv:2006.11239, eq. 7). The variance lies between that of q, where x_0
    is known, and beta, where nothing is. That of q is 0 at t = 0; its logarithm is that at t = 1 there."""

    beta: Tensor
    from_clean: Tensor
    from_noisy: Tensor
    lowest_log_variance: Tensor
    highest_log_variance: Tensor

    @classmethod
    def of(cls, alpha_bar: Tensor) -> Steps:
        """Of the times whose cumulative products of alpha are given, falling; they may be some of a longer process."""
        before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        beta = 1 - alpha_bar / before
        variance = beta * (1 - before) / (1 - alpha_bar)
        known = variance[1:] if len(variance) > 1 else beta  # of a single step only the mean is ever used
        return cls(
            beta=beta,
            from_clean=beta * before.sqrt() / (1 - alpha_bar),
            from_noisy=(1 - before) * (1 - beta).sqrt() / (1 - alpha_bar),
            lowest_log_variance=torch.cat([known[:1], variance[1:]]).log(),
            highest_log_variance=beta.log(),
        )

    def mean(self, noisy: Tensor, clean: Tensor, times: Tensor) -> Tensor:
        """Of images [N, C, H, W] at times int64 [N]."""
        return _at(self.from_clean, times, noisy) * clean + _at(self.from_noisy, times, noisy) * noisy

    def log_variance(self, share: Tensor, times: Tensor) -> Tensor:
        """share: [N, C, H, W], how far from the lowest (0) to the highest (1) logarithm (eq. 15)."""
        return share * _at(self.highest_log_variance, times, share) + (1 - share) * _at(self.lowest_log_variance, times, share)


def bits_of_a_step(clean: Tensor, noisy: Tensor, predicted_clean: Tensor, share: Tensor, times: Tensor, steps: Steps) -> Tensor:
    """What one step adds to the variational bound, in bits per number [N, C, H, W]: eq. 4 to 6.

    The divergence of the true step from the predicted one; at time 0 the code length of the image, of 256 grey levels.
    The prediction's mean is taken as it is and not taught: the gradient is that of `share` alone."""
    mean, log_variance = steps.mean(noisy, predicted_clean.detach(), times), steps.log_variance(share, times)
    true_mean, true_log_variance = steps.mean(noisy, clean, times), _at(steps.lowest_log_variance, times, clean)
    divergence = normal_divergence(true_mean, true_log_variance, mean, log_variance)
    length = grey_level_length(clean, mean, log_variance)
    return torch.where((times == 0).view(-1, 1, 1, 1), length, divergence) / math.log(2)


def normal_divergence(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(other mean, other variance)) of each number, in nats."""
    squared = (mean - other_mean).square() * (-other_log_variance).exp()
    return (other_log_variance - log_variance + (log_variance - other_log_variance).exp() + squared - 1) / 2


def grey_level_length(clean: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Minus the logarithm of the probability that a normal variable has the grey level of `clean`, in nats: Ho et al. 2020, eq. 13."""
    precision = (-log_variance / 2).exp()
    below_upper = normal_share_below((clean - mean + HALF_BIN) * precision)
    below_lower = normal_share_below((clean - mean - HALF_BIN) * precision)
    probability = torch.where(clean < -OUTERMOST, below_upper, torch.where(clean > OUTERMOST, 1 - below_lower, below_upper - below_lower))
    return -probability.clamp(min=LEAST_PROBABILITY).log()


def normal_share_below(x: Tensor) -> Tensor:
    """The standard normal distribution function within 0.0002, in the form that the published bits were computed with."""
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def _at(table: Tensor, times: Tensor, like: Tensor) -> Tensor:
    return table.to(like)[times].view(-1, *[1] * (like.dim() - 1))
