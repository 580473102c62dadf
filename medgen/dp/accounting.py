"""The epsilon of a history of mechanisms, by two accountants of opacus: Renyi (rdp) and numerical (prv). Used by budget.py, card.py and price.py.

Both are upper bounds. opacus brings torch, so it is imported when something is counted, never when this module is."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

from medgen.dp.mechanism import History, Mechanism, merged, steps_of

Accountant = Literal["prv", "rdp"]

Orders = tuple[float, ...]

# orders of the Renyi divergence: those of opacus, closer to 1 for large epsilons and higher for small ones. Beyond 1024 the binomials
# of the subsampled mechanism leave the range of floating point
ORDERS: Orders = (
    *(1 + hundredth / 100 for hundredth in range(1, 10)), *(1 + tenth / 10 for tenth in range(1, 100)), *(float(order) for order in range(12, 64)),
    *(float(round(64 * 2 ** (quarter / 4))) for quarter in range(17)),
)  # fmt: skip
# where the best one is looked for first; below 2 they are slow to compute, and best only at epsilons of tens
COARSE_ORDERS: Orders = tuple(float(order) for order in (*range(2, 16), 18, 22, 27, 32, 40, 50, 64, 91, 128, 256, 512, 1024))
LOW_ORDERS: Orders = (1.01, 1.02, 1.05, 1.1, 1.2, 1.35, 1.5, 1.75)
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


def accountants() -> dict[str, str]:
    """Who counts, by the names of `epsilon`."""
    version = importlib.metadata.version("opacus")
    return {"prv": f"PRV accountant, opacus {version}", "rdp": f"RDP accountant, opacus {version}"}


def quick_bound(history: History, delta: float) -> float:
    """Like `epsilon` by rdp, at few orders: at once, and some per cent higher. To look for something with, not to be cited."""
    stretches = merged(history)
    return _best(stretches, delta, _coarse(stretches, delta))[0]


# rdp


def _by_renyi(history: History, delta: float) -> float:
    """Of all ORDERS, those around the best coarse one: over the orders the bound falls and then rises, as log-moments are convex."""
    coarse = _coarse(history, delta)
    place = coarse.index(_best(history, delta, coarse)[1])
    low, high = coarse[max(0, place - 1)], coarse[min(len(coarse) - 1, place + 1)]
    return _best(history, delta, tuple(order for order in ORDERS if low <= order <= high))[0]


def _coarse(history: History, delta: float) -> Orders:
    """With the low orders only where they matter."""
    return COARSE_ORDERS if _best(history, delta, COARSE_ORDERS)[1] > COARSE_ORDERS[0] else LOW_ORDERS + COARSE_ORDERS


def _best(history: History, delta: float, orders: Orders) -> tuple[float, float]:
    """(epsilon, the order that gives it)."""
    from opacus.accountants.analysis import rdp

    totals = [sum(_divergence(stretch.sampling_rate, stretch.noise_multiplier, order) * stretch.steps for stretch in history) for order in orders]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the best order is the first or last one: the bound holds
        value, order = rdp.get_privacy_spent(orders=orders, rdp=totals, delta=delta)
    return max(0.0, float(value)), float(order)


@functools.lru_cache(maxsize=65536)
def _divergence(sampling_rate: float, noise_multiplier: float, order: float) -> float:
    """Of one step; infinite where floating point does not reach."""
    from opacus.accountants.analysis import rdp

    try:
        value = float(rdp.compute_rdp(q=sampling_rate, noise_multiplier=noise_multiplier, steps=1, orders=order))
    except (ValueError, OverflowError):  # a series that cancels to less than nothing: this order tells nothing
        return math.inf
    return max(0.0, value) if math.isfinite(value) else math.inf


# prv


def _by_losses(history: History, delta: float) -> float:
    import numpy as np

    delta_error = delta * DELTA_ERROR_SHARE
    largest = _largest_loss(history, delta_error)
    if largest > LARGEST_LOSS:
        return _by_renyi(history, delta)
    rough = quick_bound(history, delta)
    error = max(min(USUAL_ERROR, ERROR_SHARE_BELOW * rough), ERROR_SHARE_ABOVE * rough, LEAST_ERROR)
    points = 2 * largest / _mesh(steps_of(history), error, delta_error)
    accountant = _accountant(largest)
    accountant.history = [(stretch.noise_multiplier, stretch.sampling_rate, stretch.steps) for stretch in history]
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = float(accountant.get_epsilon(delta, eps_error=error * max(1.0, points / MOST_POINTS), delta_error=delta_error))
    except (RuntimeError, ValueError, OverflowError, ZeroDivisionError):
        value = math.nan
    return max(0.0, value) if math.isfinite(value) else _by_renyi(history, delta)


def _largest_loss(history: History, delta_error: float) -> float:
    """How far the grid must reach so that what lies beyond does not matter: Gopi et al., remark 5.6, with opacus' 3 on top."""
    steps = steps_of(history)
    single = (quick_bound((Mechanism(stretch.sampling_rate, stretch.noise_multiplier, 1),), delta_error / (8 * steps)) for stretch in history)
    return max(quick_bound(history, delta_error / 4), *single) + 3


def _mesh(steps: int, error: float, delta_error: float) -> float:
    """The width of the grid's cells with which epsilon is off by at most `error`: Gopi et al., theorem 5.5."""
    return error / math.sqrt(steps * math.log(12 / delta_error) / 2)


def _accountant(largest_loss: float) -> Any:
    """opacus' own on a grid that reaches as far as `_largest_loss`, or a little farther: to a length that Fourier transforms are fast for.

    The grid is a method of opacus' own, for which setup.cfg pins its version."""
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.prv import Domain
    from scipy.fft import next_fast_len

    class OnFastGrid(PRVAccountant):
        def _get_domain(self, *, prvs: Any, num_self_compositions: list[int], eps_error: float, delta_error: float) -> Any:
            cell = _mesh(sum(num_self_compositions), eps_error, delta_error)
            cells = next_fast_len(math.ceil(largest_loss / cell) + 1, real=True)
            return Domain((1 - cells) * cell, cells * cell, 2 * cells)  # zero where opacus' convolution looks for it

    return OnFastGrid()
