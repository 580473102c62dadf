"""Samplers: from noise to images in a given number of steps, written without networks. Used by strategies.py and sdm/process.py.

Two kinds of process: what strategies with discrete times need knows signal and noise levels, what rectified flow needs knows a velocity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from medgen.models.base import SampleNoise

MOST_VARIANCE = 1.0  # of a pixel in [-1, 1], whatever its distribution


@dataclass(frozen=True)
class Level:
    """How much image and how much noise there is: noisy = signal * clean + noise * standard normal, signal^2 + noise^2 = 1."""

    signal: float
    noise: float

    @property
    def log_snr_half(self) -> float:
        """lambda = log(signal / noise) of the DPM-Solver papers; infinite without noise."""
        return math.log(self.signal / self.noise) if self.noise > 0 else math.inf


CLEAN = Level(1.0, 0.0)

# denoise(noisy [N, C, H, W], number of the step) -> (predicted clean image, predicted noise), not clamped
Denoise = Callable[[Tensor, int], tuple[Tensor, Tensor]]
# the same, and instead of the noise the standard deviation of the step from there [N, C, H, W]
DenoiseWithStd = Callable[[Tensor, int], tuple[Tensor, Tensor]]
# velocity(images [N, C, H, W], time) -> how they change per unit of time on the way to the clean image
Velocity = Callable[[Tensor, float], Tensor]


def ancestral(denoise: Denoise, levels: Sequence[Level], noise: SampleNoise, shape: tuple[int, ...]) -> Tensor:
    """Ancestral sampling of Ho et al. 2020 (arXiv:2006.11239) for any number of steps.

    The variance of a step is that of q(x_next | x_now, x_0) plus what is not known of x_0: without the second part images
    lose contrast when steps are long (a standard deviation of 0.25 comes out as 0.22 at 50 steps). What is not known is
    estimated from each image's predicted noise, whose mean square is one minus the noise's own unexplained share
    (Analytic-DPM, Bao et al. 2022, arXiv:2201.06503, theorem 1)."""
    images = noise.normal(shape)
    for number, (now, following) in enumerate(_steps(levels)):
        raw_clean, raw_noise = denoise(images, number)
        std = posterior_std(now, following)
        images_mean = _moved(images, raw_clean.clamp(-1, 1), now, following, std)
        if following.noise == 0.0:
            return images_mean
        sensitivity = following.signal - _kept_noise(following, std) * now.signal / now.noise  # of the mean to the clean image
        variance = std**2 + sensitivity**2 * unknown_variance(raw_noise, now)
        images = images_mean + variance.sqrt().view(-1, *[1] * len(shape)) * noise.normal(shape)
    raise AssertionError("levels end without noise")


def ancestral_learned(denoise: DenoiseWithStd, levels: Sequence[Level], noise: SampleNoise, shape: tuple[int, ...]) -> Tensor:
    """Ancestral sampling in steps whose standard deviation the network says (Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.1).

    It was learned for single steps, and says for longer ones what lies between their own bounds (section 4)."""
    images = noise.normal(shape)
    for number, (now, following) in enumerate(_steps(levels)):
        clean, std = denoise(images, number)
        images = _moved(images, clean.clamp(-1, 1), now, following, posterior_std(now, following))
        if following.noise > 0:
            images = images + std * noise.normal(shape)
    return images


def ddim(denoise: Denoise, levels: Sequence[Level], noise: SampleNoise, shape: tuple[int, ...], eta: float) -> Tensor:
    """Song et al. 2021 (arXiv:2010.02502, eq. 12). eta: 0 deterministic; 1 has the variance of eq. 16."""
    images = noise.normal(shape)
    for number, (now, following) in enumerate(_steps(levels)):
        std = eta * posterior_std(now, following)
        images = _moved(images, denoise(images, number)[0].clamp(-1, 1), now, following, std)
        if std > 0:
            images = images + std * noise.normal(shape)
    return images


def dpm_solver_2m(denoise: Denoise, levels: Sequence[Level], noise: SampleNoise, shape: tuple[int, ...]) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv:2211.01095, algorithm 2): second order from two predictions in a row.

    The first step has one prediction only, and the last one ends where the logarithm of the noise does: both are of first order."""
    images = noise.normal(shape)
    before: Tensor | None = None
    width_before = 0.0
    for number, (now, following) in enumerate(_steps(levels)):
        clean = denoise(images, number)[0].clamp(-1, 1)
        width = following.log_snr_half - now.log_snr_half
        direction = clean
        if before is not None and math.isfinite(width):
            direction = clean + (clean - before) * (width / (2 * width_before))
        images = following.noise / now.noise * images - following.signal * math.expm1(-width) * direction
        before, width_before = clean, width
    return images


def euler(velocity: Velocity, times: Sequence[float], images: Tensor) -> Tensor:
    """First order, one evaluation a step. `times` fall from 1 (noise) to 0 (clean)."""
    for now, following in pairwise(times):
        images = images + (now - following) * velocity(images, now)
    return images


def midpoint(velocity: Velocity, times: Sequence[float], images: Tensor) -> Tensor:
    """Second order, two evaluations a step, the second one in its middle."""
    for now, following in pairwise(times):
        half = (now - following) / 2
        middle = images + half * velocity(images, now)
        images = images + 2 * half * velocity(middle, now - half)
    return images


def heun(velocity: Velocity, times: Sequence[float], images: Tensor) -> Tensor:
    """Second order, two evaluations a step, the second one at its end (Karras et al. 2022, arXiv:2206.00364, algorithm 1).

    The last step is Euler's, as there: hardly any training time lies at 0."""
    for now, following in pairwise(times):
        width = now - following
        first = velocity(images, now)
        moved = images + width * first
        images = moved if following == 0.0 else images + width / 2 * (first + velocity(moved, following))
    return images


def adams_bashforth_2(velocity: Velocity, times: Sequence[float], images: Tensor) -> Tensor:
    """Second order, one evaluation a step: the change of the velocity is that since the step before. The first step is Euler's."""
    before: Tensor | None = None
    width_before = 0.0
    for now, following in pairwise(times):
        width = now - following
        here = velocity(images, now)
        slope = here if before is None else here + (here - before) * (width / (2 * width_before))
        images = images + width * slope
        before, width_before = here, width
    return images


def posterior_std(now: Level, following: Level) -> float:
    """Standard deviation of q(x_following | x_now, x_0) for a step of any length (arXiv:2010.02502, eq. 16, eta = 1)."""
    return math.sqrt(max(0.0, (following.noise / now.noise) ** 2 * (1 - (now.signal / following.signal) ** 2)))


def unknown_variance(predicted_noise: Tensor, level: Level) -> Tensor:
    """Mean variance per pixel of the clean image given the noisy one, [N], from each image's own predicted noise [N, C, H, W].

    (noise / signal)^2 (1 - mean square of the predicted noise), within what a pixel in [-1, 1] can have."""
    ratio = (level.noise / level.signal) ** 2
    unexplained = 1 - predicted_noise.square().flatten(1).mean(dim=1)
    return (ratio * unexplained).clamp(0.0, min(ratio, MOST_VARIANCE))


def shifted(times: Tensor, shift: float) -> Tensor:
    """Times in [0, 1] moved towards noise by a shift above 1 (Esser et al. 2024, arXiv:2403.03206, eq. 23); 1 leaves them."""
    return shift * times / (1 + (shift - 1) * times)


def flow_times(steps: int, shift: float) -> list[float]:
    """`steps` + 1 times from 1 down to 0, evenly spaced before the shift."""
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return [float(time) for time in shifted(even, shift)]


def discrete_times(timesteps: int, steps: int) -> list[int]:
    """`steps` of the training's times, from the last, which is pure noise, to the first, which is all but clean.

    They lie closer towards the clean end, with the square of their number (arXiv:2010.02502, appendix D.3, quadratic), and as close as
    whole numbers can: evenly spaced ones leave the solvers too long a way where images get their contrast."""
    rising: list[int] = []
    for number in range(steps):
        wanted = round((timesteps - 1) * (number / (steps - 1)) ** 2) if steps > 1 else timesteps - 1
        rising.append(max(wanted, rising[-1] + 1 if rising else 0))
    return rising[::-1]


def even_times(timesteps: int, steps: int) -> list[int]:
    """`steps` of the training's times, evenly from the last to the first, both among them: what learned variances are published with."""
    if steps == 1:
        return [timesteps - 1]
    return [round((timesteps - 1) * number / (steps - 1)) for number in reversed(range(steps))]


def _steps(levels: Sequence[Level]) -> list[tuple[Level, Level]]:
    return list(zip(levels, [*levels[1:], CLEAN], strict=True))


def _moved(images: Tensor, clean: Tensor, now: Level, following: Level, std: float) -> Tensor:
    """The mean of the next images, where noise of that standard deviation is to be added: arXiv:2010.02502, eq. 12."""
    return following.signal * clean + _kept_noise(following, std) * _noise_in(images, clean, now)


def _kept_noise(following: Level, std: float) -> float:
    """How much of the noise now is left in the next images."""
    return math.sqrt(max(0.0, following.noise**2 - std**2))


def _noise_in(images: Tensor, clean: Tensor, level: Level) -> Tensor:
    """The noise that a clean image implies: after clamping it is not the predicted one."""
    return (images - level.signal * clean) / level.noise
