"""What a training must tell of itself to be counted before it starts: `Priced`, which private families' configurations fulfil.

Used by price.py, and by a private training to know its noise: both see the same history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from medgen.dp import budget
from medgen.dp.mechanism import History
from medgen.dp.profile import Profile

Unit = Literal["patient", "slice"]


@runtime_checkable
class Priced(Protocol):
    """A plan of steps that each release a clipped, noisy sum. One of `epsilon` and `noise_multiplier` is given and the other None; both
    None: a training without differential privacy."""

    @property
    def unit(self) -> Unit:
        """What is protected, and drawn: one of it is a record."""
        ...

    @property
    def epsilon(self) -> float | None:
        """The budget that the noise is chosen for."""
        ...

    @property
    def noise_multiplier(self) -> float | None:
        """Of the first step."""
        ...

    @property
    def noise_profile(self) -> Profile:
        """How it goes on, over all steps that are wanted."""
        ...

    @property
    def delta(self) -> float | None:
        """None: 1 / (10 x records), rounded down."""
        ...

    @property
    def clip_norm(self) -> float:
        """Of the first step."""
        ...

    @property
    def clip_profile(self) -> Profile: ...

    @property
    def expected_batch(self) -> int:
        """Records in a step on average: sampling rate x records."""
        ...

    def critic_steps_total(self, records: int) -> int:
        """How many noisy sums are released in the whole training: all that are wanted, or fewer."""
        ...


@dataclass(frozen=True)
class Cohort:
    """Whom a training learns from. `most_slices`: of one patient."""

    patients: int
    slices: int
    most_slices: int

    def records(self, unit: Unit) -> int:
        return {"patient": self.patients, "slice": self.slices}[unit]

    def most_records(self, unit: Unit) -> int:
        """Of one patient."""
        return {"patient": 1, "slice": self.most_slices}[unit]


def is_private(plan: Priced) -> bool:
    return plan.epsilon is not None or plan.noise_multiplier is not None


def delta_of(plan: Priced, records: int) -> float:
    """The plan's, or the advised one. Raises ValueError if it is not below 1 / records."""
    delta = plan.delta if plan.delta is not None else budget.advised_delta(records)
    budget.check_delta(delta, records)
    return delta


def history_of(plan: Priced, records: int) -> History:
    """What the plan does to the records, its noise solved for if it names an epsilon; empty if nothing is released.

    Raises ValueError where that cannot be."""
    if plan.expected_batch > records:
        raise ValueError(f"the expected batch of {plan.expected_batch} is more than there are: {records:,} {plural(plan.unit)}; write a smaller batch, or bring more data")
    rate, noise = plan.expected_batch / records, plan.noise_profile.first(plan.critic_steps_total(records))
    if noise.updates == 0:
        return ()
    if plan.noise_multiplier is not None:
        return noise.history(rate, plan.noise_multiplier)
    if plan.epsilon is None:
        raise ValueError("neither epsilon nor noise_multiplier is given: nothing is promised of this training")
    return noise.history(rate, budget.noise_multiplier_for(plan.epsilon, delta_of(plan, records), rate, noise))


def clip_norms(plan: Priced, steps: int) -> tuple[float, float]:
    """Of the first and of the last of so many steps."""
    return plan.clip_norm, plan.clip_norm * plan.clip_profile.share(steps - 1)


def plural(unit: Unit) -> str:
    return f"{unit}s"
