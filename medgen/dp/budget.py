"""From an epsilon to what a training must add or may do: the noise, the steps, a delta that means something. Used by private families and price.py.

Everything is rounded to the private side: what is returned costs no more than was asked for, by the accountant that is reported (prv)."""

from __future__ import annotations

import contextlib
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
MOST_STEPS = 10_000_000
ADVISED_SHARE = 10  # delta is advised to be 1 / (this x records)


class TooSmall(ValueError):
    """An epsilon that needs more than MOST_NOISE."""


class TooLarge(ValueError):
    """An epsilon that needs less than LEAST_NOISE, or allows more than MOST_STEPS."""


def advised_delta(records: int) -> float:
    """1 / (10 x records), rounded down to one digit: easy to cite."""
    value = 1 / (ADVISED_SHARE * records)
    unit = 10.0 ** math.floor(math.log10(value) + 1e-9)
    return float(f"{math.floor(value / unit + 1e-9) * unit:.1g}")


def check_delta(delta: float, records: int) -> None:
    """Raise ValueError unless delta is above 0 and below 1 / records (Dwork and Roth 2014, section 2.3)."""
    if not 0 < delta < 1:
        raise ValueError(f"delta: {delta:g} is not above 0 and below 1; for {records:,} records write {advised_delta(records):g}")
    if delta >= 1 / records:
        raise ValueError(
            f"delta: {delta:g} is not below 1 / {records:,} records = {1 / records:.2g}: it would allow to publish a record as it is, drawn by chance; "
            f"write {advised_delta(records):g}"
        )


@functools.lru_cache(maxsize=256)
def noise_multiplier_for(epsilon: float, delta: float, sampling_rate: float, noise: Profile) -> float:
    """The least first noise multiplier, to four digits, with which steps of this noise profile cost at most `epsilon` at `delta` by prv.

    The cost is at most epsilon and at least 99 % of it. Raises TooSmall or TooLarge, saying what would do, where no multiplier from 0.2 to
    100 does that, and ValueError for numbers that are no epsilon, delta, sampling rate or steps."""
    _check_epsilon(epsilon)
    steps = noise.updates
    if steps < 1:
        raise ValueError(f"steps: {steps}: nothing is released in no steps; write at least 1")

    def cost(first: float) -> float:
        return epsilon_of(noise.history(sampling_rate, first), delta)

    def rough_cost(first: float) -> float:
        return quick_bound(noise.history(sampling_rate, first), delta)

    if rough_cost(MOST_NOISE) > epsilon and cost(MOST_NOISE) > epsilon:
        raise TooSmall(_too_small(epsilon, delta, sampling_rate, noise, cost(MOST_NOISE)))
    enough, too_little = _bracket(rough_cost, epsilon)
    while enough < MOST_NOISE and cost(enough) > epsilon:  # rare: the numerical bound above the Renyi bound, at very small epsilons
        enough, too_little = min(MOST_NOISE, enough * 1.1), enough
    while too_little > LEAST_NOISE and cost(too_little) <= epsilon:
        enough, too_little = too_little, max(LEAST_NOISE, too_little * 0.8)
    if too_little == LEAST_NOISE and cost(LEAST_NOISE) <= epsilon:
        raise TooLarge(
            f"epsilon: {epsilon:g} needs a noise multiplier below {LEAST_NOISE:g} in {steps:,} steps, which protects nobody; "
            f"write at most {_rounded_down(cost(LEAST_NOISE)):g}, or noise_multiplier: {LEAST_NOISE:g}"
        )
    return _narrow(cost, epsilon, enough, too_little)


@functools.lru_cache(maxsize=256)
def steps_within(epsilon: float, delta: float, sampling_rate: float, noise_multiplier: float, noise: Profile) -> int:
    """The most steps of this noise profile, from its beginning and beyond its end, that cost at most `epsilon` at `delta` by prv, to one in a
    thousand: exact below two thousand. noise_multiplier: of the first step.

    Raises ValueError if not even one step does, or ten million do."""
    return _most_steps(epsilon, delta, noise_multiplier, lambda steps: noise.first(steps).history(sampling_rate, noise_multiplier))


def _most_steps(epsilon: float, delta: float, noise_multiplier: float, history: Callable[[int], History]) -> int:
    """history: of so many steps."""
    _check_epsilon(epsilon)

    def cost(steps: int) -> float:
        return epsilon_of(history(steps), delta)

    def rough_cost(steps: int) -> float:
        return quick_bound(history(steps), delta)

    if cost(1) > epsilon:
        raise ValueError(f"epsilon: {epsilon:g} does not allow a single step with noise_multiplier {noise_multiplier:g}, which costs {cost(1):.3g}; write a larger noise_multiplier")
    if rough_cost(MOST_STEPS) <= epsilon:
        raise TooLarge(f"epsilon: {epsilon:g} allows more than {MOST_STEPS:,} steps with noise_multiplier {noise_multiplier:g}; write a smaller noise_multiplier or epsilon")
    within = _last(lambda steps: rough_cost(steps) <= epsilon, 1, MOST_STEPS)
    beyond = within + 1
    while beyond < MOST_STEPS and cost(beyond) <= epsilon:
        within, beyond = beyond, min(MOST_STEPS, max(beyond + 1, beyond * 5 // 4))
    while beyond - within > max(1, within // 1000):
        middle = (within + beyond) // 2
        within, beyond = (middle, beyond) if cost(middle) <= epsilon else (within, middle)
    return within


def _check_epsilon(epsilon: float) -> None:
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon: {epsilon:g} is no budget; write a number above 0, such as 8")


def _too_small(epsilon: float, delta: float, sampling_rate: float, noise: Profile, least: float) -> str:
    """What would do instead: other steps, another batch, another epsilon."""
    steps = noise.updates
    ways = [f"epsilon: {rounded_up(least):g}"]
    with contextlib.suppress(ValueError):  # not even one step
        ways.append(f"at most {_most_steps(epsilon, delta, MOST_NOISE, lambda count: noise.resized(count).history(sampling_rate, MOST_NOISE)):,} steps")
    rate = _largest_rate(epsilon, delta, noise)
    if rate is not None:
        ways.append(f"an expected batch {sampling_rate / rate:.3g} times smaller (sampling rate {rate:.2g})")
    return f"epsilon: {epsilon:g} cannot be kept in {steps:,} steps at sampling rate {sampling_rate:.3g}: even a noise multiplier of {MOST_NOISE:g} costs {least:.3g}; what would do: {', or '.join(ways)}"


def _largest_rate(epsilon: float, delta: float, noise: Profile) -> float | None:
    """A sampling rate that keeps the budget with the most noise, found by halving; None if none does."""
    for halvings in range(1, 40):
        if quick_bound(noise.history(0.5**halvings, MOST_NOISE), delta) <= epsilon:
            return 0.5**halvings
    return None


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
