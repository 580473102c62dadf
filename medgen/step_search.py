"""Which numbers of sampling steps to try, and which of those tried is the smallest that is as good as the best. Used by find_steps.py.

Numbers alone: what is measured at a number of steps is handed in. Golden-section search: J. Kiefer, "Sequential minimax search for a
maximum", Proc. AMS 4 (1953); here over whole numbers, evenly on a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

GOLDEN = (math.sqrt(5) - 1) / 2
RESOLUTION = 1.1  # numbers of steps within this factor are not told apart: nobody saves time by it

Measure = Callable[[int], float]


def golden_section(measure: Measure, low: int, high: int) -> int:
    """The whole number in [low, high] where `measure` is smallest, to within a factor of 1.1 (below 20: exactly), if it first falls and then rises.

    No number is measured twice. One that falls all the way ends at `high`, one that rises at `low`. Raises ValueError for low < 1 or high < low."""
    if not 1 <= low <= high:
        raise ValueError(f"the smallest number of steps is 1 and none is below the smallest, got {low} to {high}")
    found: dict[int, float] = {}

    def at(number: int) -> float:
        if number not in found:
            found[number] = measure(number)
        return found[number]

    left, right = low, high
    while not _is_narrow(left, right):
        first, second = _inside(left, right, found)
        if at(first) <= at(second):
            right = second
        else:
            left = first
    for number in range(left, right + 1) if right - left <= 2 else {left, right} & {low, high}:
        at(number)
    return min(found, key=lambda number: (found[number], number))


def _is_narrow(left: int, right: int) -> bool:
    return right - left <= 2 or right / left <= RESOLUTION


def _inside(left: int, right: int, known: Collection[int]) -> tuple[int, int]:
    """Two numbers between left and right, about in the golden ratio; one that is known already is one of them.

    The other is put where it belongs, and not opposite to the known one: rounding would drive them to the ends step by step."""
    lower, upper = (left * (right / left) ** share for share in (1 - GOLDEN, GOLDEN))
    first = min((number for number in known if left < number < right), key=lambda number: min(abs(number - lower), abs(number - upper)), default=None)
    if first is None:
        first = _clipped(lower, left, right)
    second = _clipped(upper if abs(first - lower) < abs(first - upper) else lower, left, right)
    if second == first:
        second = first + 1 if first + 1 < right else first - 1
    return min(first, second), max(first, second)


def _clipped(place: float, left: int, right: int) -> int:
    return min(max(round(place), left + 1), right - 1)


def smallest_as_good(is_worse: Callable[[int], bool], tried: Collection[int], best: int, low: int) -> int:
    """The smallest number of steps from `low` on that is as good as the best, to within a factor of 1.1, going down from it: the first
    that is worse ends the way. Asks for numbers between those that were tried, and for `low`, where that decides."""
    good, bad = best, None
    for number in sorted({number for number in tried if low <= number < best} | {low}, reverse=True):
        if number < best and is_worse(number):
            bad = number
            break
        good = min(good, number)
    while bad is not None and good - bad > 1 and good / bad > RESOLUTION:
        middle = _clipped(math.sqrt(good * bad), bad, good)
        if is_worse(middle):
            bad = middle
        else:
            good = middle
    return good
