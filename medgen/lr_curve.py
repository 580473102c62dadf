"""The curve of a learning-rate search: which rates are tried, how its losses are smoothed, when it ends, what it suggests. Used by lr_search.py.

Numbers alone: no torch here. Method: L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017 (arXiv:1506.01186), section 3.3."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medgen.errors import MedgenError

LOWEST_RATE, HIGHEST_RATE = 1e-7, 1e-1
SMOOTHING = 0.9  # the share of the past in the running mean
FEWEST_STEPS = 10  # before these the smoothed curve is no judge
STOP_FACTOR = 4.0  # times its best: beyond it the smoothed loss has blown up
MARGIN = 10.0  # between the rate of the lowest smoothed loss, beyond which training is about to fail, and the suggestion
LEAST_FALL = 0.9  # the lowest smoothed loss over the mean of the first losses: noise alone reaches this


def rates(steps: int) -> list[float]:
    """`steps` learning rates, each the same factor above the one before, from 1e-7 to 1e-1."""
    factor = (HIGHEST_RATE / LOWEST_RATE) ** (1 / (steps - 1))
    return [LOWEST_RATE * factor**number for number in range(steps)]


class Smoothed:
    """The running mean of losses that come one by one, corrected for its start at zero as Adam's moments are."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._mean = 0.0

    def add(self, loss: float) -> None:
        self._mean = SMOOTHING * self._mean + (1 - SMOOTHING) * loss
        self.values.append(self._mean / (1 - SMOOTHING ** (len(self.values) + 1)))

    @property
    def has_blown_up(self) -> bool:
        """True if the sweep is to end: the last smoothed loss is not finite, or far above the best of them."""
        last = self.values[-1]
        if not math.isfinite(last):
            return True
        return len(self.values) > FEWEST_STEPS and last > STOP_FACTOR * min(self.values[FEWEST_STEPS:])


@dataclass(frozen=True)
class Curve:
    """A sweep that has ended: a learning rate, the mean training loss over ranks and the smoothed loss of each step."""

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    asked: int  # steps of the whole sweep

    @property
    def lowest(self) -> int:
        """The step with the lowest smoothed loss, of those from which on it is smooth: before them a batch that happens to be easy would win."""
        finite = [value if math.isfinite(value) and number >= FEWEST_STEPS else math.inf for number, value in enumerate(self.smoothed)]
        return finite.index(min(finite))

    @property
    def suggestion(self) -> float:
        """A tenth of the rate with the lowest smoothed loss, to two digits: more would be noise."""
        return float(f"{self.rates[self.lowest] / MARGIN:.1e}")

    @property
    def in_words(self) -> str:
        end = "to the end of the sweep" if len(self.rates) == self.asked else f"until the loss blew up at {self.rates[-1]:.1e}"
        return f"a tenth of {self.rates[self.lowest]:.1e}, where the smoothed loss is lowest; {len(self.rates)} steps {end}"

    @property
    def record(self) -> dict[str, Any]:
        """JSON; a loss that is not finite is null."""
        losses, smoothed = ([value if math.isfinite(value) else None for value in values] for values in (self.losses, self.smoothed))
        return {"lr": self.suggestion, "rule": self.in_words, "steps": self.asked, "smoothing": SMOOTHING, "rates": self.rates, "losses": losses, "smoothed": smoothed}


def judged(rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], asked: int) -> Curve:
    """The curve, if it says anything. Raises MedgenError if a loss is not finite before any rate could harm, or no rate lowers the loss."""
    bad = next((number for number, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if bad is not None and bad < FEWEST_STEPS:
        raise MedgenError(f"find_lr: the loss is {losses[bad]} at step {bad + 1}, with a learning rate of {rates[bad]:.1e}, too small to be the cause: look at the data with `medgen data`")
    curve = Curve(list(rates), list(losses), list(smoothed), asked)
    at_first = sum(losses[:FEWEST_STEPS]) / FEWEST_STEPS
    if curve.smoothed[curve.lowest] > LEAST_FALL * at_first:
        raise MedgenError(f"find_lr: no learning rate lowers the loss in {len(losses)} steps (from {at_first:.4g} at first to {curve.smoothed[curve.lowest]:.4g} at the lowest), "
                          "as of weights that are trained already; remove find_lr and write lr, or give it more steps")  # fmt: skip
    return curve
