"""How the noise multiplier or the clip norm goes over a training: stretches of updates, with the share of the first value that each has.

Plain facts that look at no data. Used by budget.py, priced.py, price.py and private families."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from medgen.dp.mechanism import History, Mechanism

STRETCHES = 8  # of a value that changes: each of other noise takes the accountant as long as a whole training of one noise


@dataclass(frozen=True)
class Profile:
    """stretches: (updates, share of the first value), in order; the first share is 1, shares are above 0."""

    stretches: tuple[tuple[int, float], ...]

    @property
    def updates(self) -> int:
        return sum(count for count, _ in self.stretches)

    def share(self, number: int) -> float:
        """Of the update with this number, from 0 on; the last share goes on."""
        for (_, share), beyond in zip(self.stretches, self._ends(), strict=True):
            if number < beyond:
                return share
        return self.stretches[-1][1]

    def first(self, updates: int) -> Profile:
        """So many updates of its beginning; the last share goes on."""
        ends = [min(end, updates) for end in self._ends()]
        ends[-1] = updates
        return self._ending_at(ends)

    def resized(self, updates: int) -> Profile:
        """The same course in more or fewer updates."""
        return self._ending_at([-(-end * updates // self.updates) for end in self._ends()])

    def history(self, sampling_rate: float, first_noise: float) -> History:
        """Where the value is the noise multiplier."""
        return tuple(Mechanism(sampling_rate, first_noise * share, count) for count, share in self.stretches)

    def _ends(self) -> list[int]:
        return list(itertools.accumulate(count for count, _ in self.stretches))

    def _ending_at(self, ends: list[int]) -> Profile:
        counts = (end - start for start, end in itertools.pairwise([0, *ends]))
        return Profile(tuple((count, share) for count, (_, share) in zip(counts, self.stretches, strict=True) if count > 0))


def constant(updates: int) -> Profile:
    return Profile(((updates, 1.0),))


def geometric(updates: int, last_share: float) -> Profile:
    """From 1 to `last_share` in stretches of equal length, each by the same factor from the one before; fewer than STRETCHES only for fewer updates.

    Changing noise and clipping on the way is dynamic DP-SGD: Du et al. 2021, arXiv:2111.00173."""
    count = min(STRETCHES, updates)
    even = Profile(tuple((1, last_share ** (place / max(1, count - 1))) for place in range(count)))
    return even.resized(updates)


def course(first: float, last: float) -> str:
    """In words: 3.9, or 3.9 falling to 1.95."""
    if first == last:
        return f"{first:.4g}"
    return f"{first:.4g} {'falling' if last < first else 'rising'} to {last:.4g}"
