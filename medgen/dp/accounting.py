"""The epsilon of a history of mechanisms, by two accountants of opacus: Renyi (rdp) and numerical (prv). Used by budget.py, card.py and price.py.

Both are upper bounds. opacus brings torch, so it is imported when something is counted, never when this module is."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from medgen.dp.mechanism import History, merged

if TYPE_CHECKING:
    import numpy as np

Accountant = Literal["prv", "rdp"]

# orders of the Renyi divergence: those of opacus, closer to 1 for large epsilons and higher for small ones. Beyond 1024 the binomials
# of the subsampled mechanism leave the range of floating point
ORDERS = (
    *(1 + hundredth / 100 for hundredth in range(1, 10)), *(1 + tenth / 10 for tenth in range(1, 100)), *(float(order) for order in range(12, 64)),
    *(float(round(64 * 2 ** (quarter / 4))) for quarter in range(17)),
)  # fmt: skip
# what the numerical accountant adds to its estimate so that it is a bound: opacus' own, less where epsilon itself is small, more where it is large
USUAL_ERROR, ERROR_SHARE_BELOW, ERROR_SHARE_ABOVE, LEAST_ERROR = 0.01, 5e-3, 5e-4, 2e-4
DELTA_ERROR_SHARE = 1e-3  # of delta, also opacus' own
MOST_POINTS = 2**23  # of the grid on which losses are added up; a coarser grid is a larger error, never a smaller epsilon
LARGEST_LOSS = 600.0  # nats; the exponential of more is not far from the largest floating-point number


@dataclass(frozen=True)
class Spent:
    """What a history costs at one delta. Both hold; the numerical one is the closer, and the one to cite."""

    epsilon_prv: float
    epsilon_rdp: float
    delta: float


def spent(history: History, delta: float) -> Spent:
    return Spent(epsilon(history, delta, "prv"), epsilon(history, delta, "rdp"), delta)


def epsilon(history: History, delta: float, accountant: Accountant = "prv") -> float:
    """An upper bound on the epsilon that (epsilon, delta)-differential privacy holds with: at least 0, infinite without noise.

    prv: Gopi et al. 2021, arXiv:2106.02848; its estimate and 0.01 on top, or 0.5 % below an epsilon of 2. Where its numbers would leave the
    range of floating point, at epsilons of hundreds, the bound of rdp is returned: it holds too.
    rdp: Mironov et al. 2019, arXiv:1908.10530, turned into (epsilon, delta) by Balle et al. 2020, arXiv:1905.09982, theorem 21.
    Raises ValueError if delta is not in (0, 1)."""
    if not 0 < delta < 1:
        raise ValueError(f"delta: {delta:g} is not above 0 and below 1")
    return _epsilon(merged(history), delta, accountant)


@functools.lru_cache(maxsize=4096)
def _epsilon(history: History, delta: float, accountant: Accountant) -> float:
    if not history:
        return 0.0
    if any(stretch.noise_multiplier == 0 for stretch in history):
        return math.inf
    return _by_renyi(history, delta) if accountant == "rdp" else _by_losses(history, delta)


# rdp


def _by_renyi(history: History, delta: float) -> float:
    from opacus.accountants.analysis import rdp

    total = sum(_divergences(stretch.sampling_rate, stretch.noise_multiplier) * stretch.steps for stretch in history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the best order is the first or last one: the bound holds
        value, _ = rdp.get_privacy_spent(orders=ORDERS, rdp=total, delta=delta)
    return max(0.0, float(value))


@functools.lru_cache(maxsize=512)
def _divergences(sampling_rate: float, noise_multiplier: float) -> np.ndarray:
    """Of one step, at each of ORDERS, float64; infinite where floating point does not reach."""
    import numpy as np
    from opacus.accountants.analysis import rdp

    values = np.array([_divergence(rdp, sampling_rate, noise_multiplier, order) for order in ORDERS], dtype=np.float64)
    return np.where(np.isfinite(values), np.maximum(values, 0.0), np.inf)


def _divergence(rdp: Any, sampling_rate: float, noise_multiplier: float, order: float) -> float:
    try:
        return float(rdp.compute_rdp(q=sampling_rate, noise_multiplier=noise_multiplier, steps=1, orders=order))
    except (ValueError, OverflowError):  # a series that cancels to less than nothing: this order tells nothing
        return math.inf


# prv


def _by_losses(history: History, delta: float) -> float:
    import numpy as np

    largest = _by_renyi(history, delta * DELTA_ERROR_SHARE / 4)  # what the grid must reach
    bound = _by_renyi(history, delta)
    if largest > LARGEST_LOSS:
        return bound
    error = max(min(USUAL_ERROR, ERROR_SHARE_BELOW * bound), ERROR_SHARE_ABOVE * bound, LEAST_ERROR)
    steps = sum(stretch.steps for stretch in history)
    points = 2 * (largest + 3) / error * math.sqrt(steps * math.log(12 / (delta * DELTA_ERROR_SHARE)) / 2)
    accountant = _accountant()
    accountant.history = [(stretch.noise_multiplier, stretch.sampling_rate, stretch.steps) for stretch in history]
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = float(accountant.get_epsilon(delta, eps_error=error * max(1.0, points / MOST_POINTS), delta_error=delta * DELTA_ERROR_SHARE))
    except (RuntimeError, ValueError, OverflowError, ZeroDivisionError):
        return bound
    return max(0.0, value) if math.isfinite(value) else bound


def _accountant() -> Any:
    """opacus' own, on a grid a little wider, so that its length is one that Fourier transforms are fast for."""
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.prv import Domain
    from scipy.fft import next_fast_len

    class OnFastGrid(PRVAccountant):  # type: ignore[misc]
        def _get_domain(self, **given: Any) -> Any:
            domain = super()._get_domain(**given)
            size = 2 * next_fast_len(domain.size // 2, real=True)
            wider = (size - domain.size) / 2 * domain.dt
            return Domain(domain.t_min - wider, domain.t_max + wider, size)

    return OnFastGrid()
