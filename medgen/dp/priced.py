"""What a training must tell of itself to be counted before it starts: `Priced`, which private families' configurations fulfil.

Used by price.py, and by a private training to know its noise: both see the same history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from medgen.dp import budget
from medgen.dp.enough import too_few
from medgen.dp.mechanism import History
from medgen.dp.profile import Profile

Unit = Literal["patient", "slice"]


@runtime_checkable
class Priced(Protocol):
    """A plan of critic updates that each release a clipped, noisy sum. One of `epsilon` and `noise_multiplier` is given and the other None; both
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
        """Of the first update."""
        ...

    @property
    def noise_profile(self) -> Profile:
        """How it goes on, over all updates that are wanted."""
        ...

    @property
    def delta(self) -> float | None:
        """None: 1 / (10 x records), rounded down."""
        ...

    @property
    def clip_norm(self) -> float:
        """Of the first update."""
        ...

    @property
    def clip_profile(self) -> Profile: ...

    @property
    def expected_batch(self) -> int:
        """Records in an update on average: sampling rate x records."""
        ...

    @property
    def critic_steps(self) -> int:
        """Updates in each of its `steps`, the key that is written."""
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
    problem = too_few(plan.expected_batch, plan.unit, records)
    if problem is not None:
        raise ValueError(problem)
    rate, noise = plan.expected_batch / records, plan.noise_profile.first(plan.critic_steps_total(records))
    if noise.updates == 0:
        return ()
    if plan.noise_multiplier is not None:
        return noise.history(rate, plan.noise_multiplier)
    if plan.epsilon is None:
        raise ValueError("neither epsilon nor noise_multiplier is given: nothing is promised of this training")
    try:
        return noise.history(rate, budget.noise_multiplier_for(plan.epsilon, delta_of(plan, records), rate, noise))
    except budget.TooSmall as error:
        raise budget.TooSmall(f"{error}; what would do: {_ways(plan, plan.epsilon, records, noise, error.least)}", error.least) from None


def _ways(plan: Priced, epsilon: float, records: int, noise: Profile, least: float) -> str:
    """What would do where no noise keeps the budget, each as a key and a value that can be written; ways that no whole number is left of are left out."""
    delta = delta_of(plan, records)
    steps = budget.updates_with_most_noise(epsilon, delta, plan.expected_batch / records, noise) // plan.critic_steps
    batch = budget.batch_with_most_noise(epsilon, delta, plan.expected_batch, records, noise)
    told_steps = f"steps: {steps}" if plan.critic_steps == 1 else f"steps: {steps} (each has {budget.told_updates(plan.critic_steps)})"
    return ", or ".join([f"dp.epsilon: {least:g}", *([told_steps] if steps else []), *([f"batch_size: {batch}"] if batch else [])])


def clip_norms(plan: Priced, updates: int) -> tuple[float, float]:
    """Of the first and of the last of so many updates."""
    return plan.clip_norm, plan.clip_norm * plan.clip_profile.share(updates - 1)


def plural(unit: Unit) -> str:
    return f"{unit}s"
