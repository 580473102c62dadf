"""From an epsilon to what a training must add or may do: the noise, the updates, a delta that means something. Used by private families and price.py.

Everything is rounded to the private side: what is returned costs no more than was asked for, by the accountant that is reported (prv)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from medgen.dp.accounting import epsilon as epsilon_of
from medgen.dp.accounting import quick_bound
from medgen.dp.mechanism import History
from medgen.dp.profile import Profile

LEAST_NOISE, MOST_NOISE = 0.2, 100.0  # noise multipliers that are sensible: below there is hardly any privacy, above hardly any signal
DIGITS = 4  # of a noise multiplier that was solved for
CLOSE = 0.995  # of the budget that must be used; what is left over would be noise for nothing
MOST_TRIES = 30
MOST_UPDATES = 10_000_000
ADVISED_SHARE = 10  # delta is advised to be 1 / (this x records)


class TooSmall(ValueError):
    """An epsilon that needs more than MOST_NOISE. `least`: the epsilon that so much noise costs."""

    def __init__(self, message: str, least: float):
        super().__init__(message)
        self.least = least


class TooLarge(ValueError):
    """An epsilon that needs less than LEAST_NOISE, or allows more than MOST_UPDATES."""


def advised_delta(records: int) -> float:
    """1 / (10 x records), rounded down to one digit: easy to cite."""
    value = 1 / (ADVISED_SHARE * records)
    unit = 10.0 ** math.floor(math.log10(value) + 1e-9)
    return float(f"{math.floor(value / unit + 1e-9) * unit:.1g}")


def check_delta(delta: float, records: int) -> None:
    """Raise ValueError unless delta is above 0 and below 1 / records (Dwork and Roth 2014, section 2.3)."""
    if not 0 < delta < 1:
        raise ValueError(f"dp.delta: {delta:g} is not above 0 and below 1; for {records:,} records write {advised_delta(records):g}")
    if delta >= 1 / records:
        raise ValueError(
            f"dp.delta: {delta:g} is not below 1 / {records:,} records = {1 / records:.2g}: it would allow to publish a record as it is, drawn by chance; "
            f"write {advised_delta(records):g}"
        )


@functools.lru_cache(maxsize=256)
def noise_multiplier_for(epsilon: float, delta: float, sampling_rate: float, noise: Profile) -> float:
    """The least first noise multiplier, to four digits, with which updates of this noise profile cost at most `epsilon` at `delta` by prv.

    The cost is at most epsilon and at least 99 % of it. Raises TooSmall or TooLarge where no multiplier from 0.2 to 100 does that, and
    ValueError for numbers that are no epsilon, delta, sampling rate or updates."""
    _check_epsilon(epsilon)
    if noise.updates < 1:
        raise ValueError(f"{told_updates(noise.updates)}: nothing is released, so that no noise hides it; write at least 1 step")

    def cost(first: float) -> float:
        return epsilon_of(noise.history(sampling_rate, first), delta)

    def rough_cost(first: float) -> float:
        return quick_bound(noise.history(sampling_rate, first), delta)

    if rough_cost(MOST_NOISE) > epsilon and cost(MOST_NOISE) > epsilon:
        least = rounded_up(cost(MOST_NOISE))
        raise TooSmall(f"dp.epsilon: {epsilon:g} cannot be kept in {told_updates(noise.updates)} at sampling rate {sampling_rate:.3g}: even a noise multiplier of {MOST_NOISE:g} costs {least:g}", least)
    enough, too_little = _bracket(rough_cost, epsilon)
    while enough < MOST_NOISE and cost(enough) > epsilon:  # rare: the numerical bound above the Renyi bound, at very small epsilons
        enough, too_little = min(MOST_NOISE, enough * 1.1), enough
    while too_little > LEAST_NOISE and cost(too_little) <= epsilon:
        enough, too_little = too_little, max(LEAST_NOISE, too_little * 0.8)
    if too_little == LEAST_NOISE and cost(LEAST_NOISE) <= epsilon:
        raise TooLarge(
            f"dp.epsilon: {epsilon:g} needs a noise multiplier below {LEAST_NOISE:g} in {told_updates(noise.updates)}, which protects nobody; "
            f"write at most {_rounded_down(cost(LEAST_NOISE)):g}, or dp.noise_multiplier: {LEAST_NOISE:g}"
        )
    return _narrow(cost, epsilon, enough, too_little)


@functools.lru_cache(maxsize=256)
def steps_within(epsilon: float, delta: float, sampling_rate: float, noise_multiplier: float, noise: Profile) -> int:
    """The most updates of this noise profile, from its beginning and beyond its end, that cost at most `epsilon` at `delta` by prv, to one in a
    thousand: exact below two thousand. noise_multiplier: of the first update.

    Raises ValueError if not even one update does, or ten million do."""
    return _most_updates(epsilon, delta, noise_multiplier, lambda updates: noise.first(updates).history(sampling_rate, noise_multiplier))


def updates_with_most_noise(epsilon: float, delta: float, sampling_rate: float, noise: Profile) -> int:
    """To how many updates this course must be shortened, so that MOST_NOISE keeps the budget; 0 if not even one does."""
    if epsilon_of(noise.resized(1).history(sampling_rate, MOST_NOISE), delta) > epsilon:
        return 0
    return _most_updates(epsilon, delta, MOST_NOISE, lambda updates: noise.resized(updates).history(sampling_rate, MOST_NOISE))


def batch_with_most_noise(epsilon: float, delta: float, batch: int, records: int, noise: Profile) -> int:
    """The largest batch below `batch` with which MOST_NOISE keeps the budget, by the quick bound; 0 if not even one record does."""

    def kept(expected: int) -> bool:
        return expected == 0 or quick_bound(noise.history(expected / records, MOST_NOISE), delta) <= epsilon

    return batch - 1 if kept(batch - 1) else _last(kept, 0, batch - 1)


def _most_updates(epsilon: float, delta: float, noise_multiplier: float, history: Callable[[int], History]) -> int:
    """history: of so many updates."""
    _check_epsilon(epsilon)

    def cost(updates: int) -> float:
        return epsilon_of(history(updates), delta)

    def rough_cost(updates: int) -> float:
        return quick_bound(history(updates), delta)

    if cost(1) > epsilon:
        raise ValueError(f"dp.epsilon: {epsilon:g} does not allow a single critic update with dp.noise_multiplier {noise_multiplier:g}, which costs {cost(1):.3g}; write a larger dp.noise_multiplier")
    if rough_cost(MOST_UPDATES) <= epsilon:
        raise TooLarge(f"dp.epsilon: {epsilon:g} allows more than {MOST_UPDATES:,} critic updates with dp.noise_multiplier {noise_multiplier:g}; write a smaller dp.noise_multiplier or dp.epsilon")
    within = _last(lambda updates: rough_cost(updates) <= epsilon, 1, MOST_UPDATES)
    beyond = within + 1
    while beyond < MOST_UPDATES and cost(beyond) <= epsilon:
        within, beyond = beyond, min(MOST_UPDATES, max(beyond + 1, beyond * 5 // 4))
    while beyond - within > max(1, within // 1000):
        middle = (within + beyond) // 2
        within, beyond = (middle, beyond) if cost(middle) <= epsilon else (within, middle)
    return within


def _check_epsilon(epsilon: float) -> None:
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(f"dp.epsilon: {epsilon:g} is no budget; write a number above 0, such as 8")


def told_updates(count: int) -> str:
    """Never "steps": that is the key of the generator's updates, each of which comes after several of the critic's."""
    return f"{count:,} critic update{'' if count == 1 else 's'}"


# solving


def _bracket(cost: Callable[[float], float], epsilon: float) -> tuple[float, float]:
    """(enough noise, a little too little) by bisection, to 2 %."""
    enough, too_little = MOST_NOISE, LEAST_NOISE
    while enough / too_little > 1.02:
        middle = math.sqrt(enough * too_little)
        enough, too_little = (middle, too_little) if cost(middle) <= epsilon else (enough, middle)
    return enough, max(LEAST_NOISE, too_little * 0.9)


def _narrow(cost: Callable[[float], float], epsilon: float, enough: float, too_little: float) -> float:
    """The least of the rounded multipliers that is enough, by regula falsi: between logarithms the curve is nearly straight."""
    enough = rounded_up(enough)
    low, high = math.log(cost(enough) / epsilon), math.log(cost(too_little) / epsilon)
    aim = math.log(CLOSE) / 2  # a little inside, so that a straight enough curve ends at once
    for _ in range(MOST_TRIES):
        if low >= math.log(CLOSE):
            break
        tried = rounded_up(enough * (too_little / enough) ** ((aim - low) / (high - low)))
        if not too_little < tried < enough:
            break
        value = math.log(cost(tried) / epsilon)
        if value <= 0:
            enough, low = tried, value
        else:
            too_little, high = tried, value
    return enough


def _last(holds: Callable[[int], bool], first: int, beyond: int) -> int:
    """The last number that `holds`, which `first` does and `beyond` does not."""
    while beyond - first > 1:
        middle = (first + beyond) // 2
        first, beyond = (middle, beyond) if holds(middle) else (first, middle)
    return first


def rounded_up(value: float) -> float:
    """To four digits, never below: how an epsilon is told. `value` is above 0."""
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - DIGITS)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.{DIGITS}g}")


def _rounded_down(value: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - DIGITS)
    return float(f"{math.floor(value / unit) * unit:.{DIGITS}g}")
