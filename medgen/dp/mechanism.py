"""What was done to private records, as an accountant needs to know it: plain facts. Used by every module of dp/ and by private families.

A training is a history: a tuple of mechanisms, one per stretch of steps that were alike."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Mechanism:
    """The Poisson-subsampled Gaussian mechanism, `steps` times: each record joins a step by itself with probability `sampling_rate`,
    what it adds to the sum is clipped to length C, and the sum gets normal noise of standard deviation noise_multiplier x C.

    Neighbours are data with one record more or less (add or remove). Abadi et al. 2016, arXiv:1607.00133; Mironov et al. 2019,
    arXiv:1908.10530. Raises ValueError for numbers that describe no such thing; noise_multiplier 0 is no privacy, and allowed."""

    sampling_rate: float  # in (0, 1]; expected batch / records
    noise_multiplier: float  # sigma, at least 0; noise / clip norm
    steps: int  # releases of the noisy sum, at least 0

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate: {self.sampling_rate:g} is no probability above 0; it is the expected batch divided by the number of records")
        if not (self.noise_multiplier >= 0 and math.isfinite(self.noise_multiplier)):
            raise ValueError(f"noise_multiplier: {self.noise_multiplier:g} is no standard deviation; write a number from 0 on")
        if self.steps < 0:
            raise ValueError(f"steps: {self.steps} is below 0")


History = tuple[Mechanism, ...]


def steps_of(history: History) -> int:
    return sum(stretch.steps for stretch in history)


def merged(history: History) -> History:
    """The same cost in as few stretches as possible: the order of steps does not matter to it, and none of no steps are left."""
    steps: dict[tuple[float, float], int] = {}
    for stretch in history:
        key = (stretch.sampling_rate, stretch.noise_multiplier)
        steps[key] = steps.get(key, 0) + stretch.steps
    return tuple(Mechanism(rate, noise, count) for (rate, noise), count in steps.items() if count > 0)
