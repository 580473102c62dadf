"""What a rank is doing now, in a word, and how many seconds of it are its own work. Made by task.py, set by train.py and context.py.

Setting a word costs a look at the clock: it may be done several times a step."""

from __future__ import annotations

import time
from statistics import median
from typing import Literal

Doing = Literal[
    "working", "meeting the others", "reading data", "computing a step", "exchanging gradients", "validating", "saving", "waiting for the others", "ending", "ended"
]  # fmt: skip
WITH_OTHERS: tuple[Doing, ...] = ("exchanging gradients", "waiting for the others")  # a rank that stands there may be waiting for another
LEAVING: tuple[Doing, ...] = ("ending", "ended")  # no other rank needs it any more
OWN_WORK: tuple[Doing, ...] = ("reading data", "computing a step")

SLOW_FACTOR, SLOW_WINDOWS = 2.0, 3  # so many times the others, for so many logging windows running
SLOW_SHARE = 0.1  # of a step's time that it costs at least: less is not worth a word
SLOW_SECONDS = 0.05  # and per step: where steps take tens of milliseconds, who is the slow one is left to the machine's mood


class Activity:
    """Set by the thread that works, read by the thread that beats."""

    def __init__(self) -> None:
        self.doing: Doing = "working"
        self._since = time.monotonic()
        self._own_seconds = 0.0

    def now(self, doing: Doing) -> None:
        moment = time.monotonic()
        if self.doing in OWN_WORK:
            self._own_seconds += moment - self._since
        self.doing, self._since = doing, moment

    def add_own(self, seconds: float) -> None:
        """What the clock has not seen (a GPU's own time), or, negative, what is measured otherwise."""
        self._own_seconds += seconds

    def take_own_seconds(self) -> float:
        """Of own work since the last call, with what is being done now."""
        self.now(self.doing)
        seconds, self._own_seconds = self._own_seconds, 0.0
        return seconds


class Stragglers:
    """Which ranks keep the others waiting, from their own seconds per step in each logging window."""

    def __init__(self) -> None:
        self._windows: dict[int, int] = {}  # by rank: slow windows running

    def window(self, own_seconds: list[float], step_seconds: float) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """(those that are slow now, those of them that were not until now), each with how many times slower than the others it is."""
        slow, new = [], []
        for rank, mine in enumerate(own_seconds):
            others = median(own_seconds[:rank] + own_seconds[rank + 1 :])
            is_slow = mine > SLOW_FACTOR * others and mine - others > max(SLOW_SHARE * step_seconds, SLOW_SECONDS)
            self._windows[rank] = self._windows.get(rank, 0) + 1 if is_slow else 0
            told = (rank, round(mine / max(others, 1e-9), 1))
            slow += [told] if self._windows[rank] >= SLOW_WINDOWS else []
            new += [told] if self._windows[rank] == SLOW_WINDOWS else []
        return slow, new
