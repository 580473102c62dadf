"""What (epsilon, delta) means to one record: the most that any membership attack may reach, and what is left for a group of records.

Used by card.py, price.py, and whoever sets a measured attack beside the promise. No accountant is needed here."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Ceiling:
    """The best an attacker may do who knows all other records, the training and its result, and asks whether this record was in.

    `advantage`: the largest true positive rate - false positive rate; `auc`: of any ranking; both in [0, 1]."""

    epsilon: float
    delta: float
    advantage: float
    auc: float

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """The most at this false positive rate in [0, 1]: Kairouz, Oh and Viswanath 2015, arXiv:1311.0776, theorem 2.1, both of its lines.

        Raises ValueError for a rate outside."""
        if not 0 <= false_positive_rate <= 1:
            raise ValueError(f"false_positive_rate: {false_positive_rate:g} is not between 0 and 1")
        shrunk = math.exp(-self.epsilon)
        rising = self.delta if false_positive_rate == 0 else min(1.0, false_positive_rate / shrunk + self.delta) if shrunk > 0 else 1.0
        return min(1.0, rising, 1 - shrunk * (1 - self.delta - false_positive_rate))


def attack_ceiling(epsilon: float, delta: float) -> Ceiling:
    """What any membership attack may reach at most under (epsilon, delta)-differential privacy, epsilon from 0 to infinity.

    advantage = (e^epsilon - 1 + 2 delta) / (e^epsilon + 1): Humphries et al. 2023, arXiv:2010.12112, theorem 3.1; there the two lines of
    `true_positive_rate` meet. auc = 1 - (1 - delta)^2 / (1 + e^epsilon): the area under them, three straight pieces. They hold
    where a record is in or out independently of the others; people who come together (several scans of one) are a `group`.
    Raises ValueError for an epsilon below 0 or a delta outside [0, 1]."""
    _check(epsilon, delta)
    shrunk = math.exp(-epsilon)
    return Ceiling(epsilon, delta, advantage=(1 - shrunk + 2 * delta * shrunk) / (1 + shrunk), auc=1 - (1 - delta) ** 2 * shrunk / (1 + shrunk))


def group(epsilon: float, delta: float, members: int) -> tuple[float, float]:
    """(epsilon, delta) of `members` records that come and go together: k epsilon, and delta x (1 + e^epsilon + ... + e^((k - 1) epsilon)).

    One record after the other, Dwork and Roth 2014, theorem 2.2, with the deltas added up. A delta of 1, the most that is returned, promises
    nothing. Raises ValueError for fewer than one member, an epsilon below 0 or a delta outside [0, 1]."""
    _check(epsilon, delta)
    if members < 1:
        raise ValueError(f"members: {members}: a group has at least one")
    if delta == 0:
        return members * epsilon, 0.0
    total = 0.0
    for number in range(members):
        exponent = number * epsilon
        total += delta * math.exp(exponent) if exponent < 700 else math.inf
        if total >= 1:
            return members * epsilon, 1.0
    return members * epsilon, total


def _check(epsilon: float, delta: float) -> None:
    if not epsilon >= 0:
        raise ValueError(f"epsilon: {epsilon:g} is below 0")
    if not 0 <= delta <= 1:
        raise ValueError(f"delta: {delta:g} is not between 0 and 1")
