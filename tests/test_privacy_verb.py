"""`medgen privacy`: the screen that prices a private training, and which stages of a spec it prices."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_spec

from medgen import price
from medgen.dp import accounting, budget
from medgen.dp.card import told
from medgen.dp.ceiling import attack_ceiling
from medgen.dp.mechanism import Mechanism
from medgen.dp.priced import Cohort, Priced, Unit, delta_of, history_of, is_private
from medgen.dp.profile import Profile, constant, geometric


@dataclass(frozen=True)
class Plan:
    """What a private family's configuration tells."""

    unit: Unit = "patient"
    epsilon: float | None = None
    noise_multiplier: float | None = 5.0
    delta: float | None = 1e-3
    clip_norm: float = 1.0
    expected_batch: int = 32
    steps: int = 300  # of one update each
    critic_steps: int = 1
    noise_decay: float | None = None
    clip_decay: float | None = None

    @property
    def noise_profile(self) -> Profile:
        return constant(self.steps) if self.noise_decay is None else geometric(self.steps, self.noise_decay)

    @property
    def clip_profile(self) -> Profile:
        return constant(self.steps) if self.clip_decay is None else geometric(self.steps, self.clip_decay)

    def critic_steps_total(self, records: int) -> int:
        return self.steps


SMALL = Cohort(patients=200, slices=10_000, most_slices=50)
LARGE = Cohort(patients=10_000, slices=240_000, most_slices=28)


def rows(text: str) -> dict[str, list[str]]:
    """The lines of both tables by their first words."""
    return {line[2:].split("  ")[0]: line.split("  ", 1)[1].split("  ") for line in text.splitlines() if line.startswith("  ")}


def cells(text: str, label: str) -> list[str]:
    return [cell.strip() for cell in rows(text)[label] if cell.strip()][1:]


def test_the_screen_tells_the_plan_and_others() -> None:
    text = price.price(Plan(), SMALL)
    assert max(map(len, text.splitlines())) <= 100
    planned = Mechanism(0.16, 5.0, 300)
    prv, rdp = (accounting.epsilon((planned,), 1e-3, accountant) for accountant in ("prv", "rdp"))  # type: ignore[arg-type]
    assert cells(text, "as planned")[:6] == ["32", "0.16", "300", "5", told(prv), told(rdp)]
    assert f"({told(prv)}, 0.001)-differential privacy of each patient: 300 critic updates" in text
    ceiling = attack_ceiling(prv, 1e-3)
    for shown, exact in zip(cells(text, "as planned")[6:], (ceiling.auc, ceiling.true_positive_rate(0.01)), strict=True):
        assert exact <= float(shown) < exact + 0.001, "a limit is never told lower than it is"
    for label, mechanism in {"half the updates": replace(planned, steps=150), "twice the updates": replace(planned, steps=600),
                             "half the batch": replace(planned, sampling_rate=0.08), "twice the batch": replace(planned, sampling_rate=0.32)}.items():  # fmt: skip
        assert cells(text, label)[4] == told(accounting.epsilon((mechanism,), 1e-3))
    for target in (1, 3, 8, 20):
        noise, epsilon = cells(text, f"for epsilon {target}")[3:5]
        assert float(noise) == budget.noise_multiplier_for(target, 1e-3, 0.16, constant(300)) and 0.99 * target <= float(epsilon) <= target


def test_a_budget_is_turned_into_noise() -> None:
    plan = Plan(epsilon=8.0, noise_multiplier=None, delta=None)
    text = price.price(plan, LARGE)
    noise = budget.noise_multiplier_for(8.0, 1e-5, 0.0032, constant(300))
    assert history_of(plan, 10_000) == (Mechanism(0.0032, noise, 300),) and delta_of(plan, 10_000) == 1e-5
    assert cells(text, "as planned")[3] == f"{noise:.4g}" and f"noise multiplier {noise:.4g}" in text
    assert float(cells(text, "as planned")[4]) <= 8


def test_noise_that_falls_is_priced_in_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(price, "EPSILONS", (1.0, 3.0))  # larger ones take longer to count
    plan = Plan(steps=40, noise_decay=0.5, clip_decay=0.3)
    text = price.price(plan, SMALL)
    assert max(map(len, text.splitlines())) <= 100
    planned = geometric(40, 0.5).history(0.16, 5.0)
    assert history_of(plan, 200) == planned
    assert "40 critic updates, each with 32 of 200 patients expected, noise multiplier 5 falling to 2.5, clip norm 1 falling to 0.3." in " ".join(text.split())
    assert cells(text, "as planned")[3:5] == ["5-2.5", told(accounting.epsilon(planned, 1e-3))]
    for label, changed in (("half the updates", geometric(20, 0.5).history(0.16, 5.0)), ("twice the batch", geometric(40, 0.5).history(0.32, 5.0))):
        assert cells(text, label)[3:5] == ["5-2.5", told(accounting.epsilon(changed, 1e-3))]
    first = budget.noise_multiplier_for(3, 1e-3, 0.16, geometric(40, 0.5))
    assert cells(text, "for epsilon 3")[3] == f"{first:.4g}-{first / 2:.4g}"
    by_slice = accounting.epsilon(geometric(40, 0.5).history(32 / 10_000, 5.0), budget.advised_delta(10_000))
    assert cells(text, "slice")[2] == told(by_slice)


def test_patients_and_slices_stand_side_by_side() -> None:
    by_slice = price.price(Plan(unit="slice", delta=1e-5), SMALL)
    assert "write unit: patient to promise patients something" in " ".join(by_slice.split())
    of_patient = cells(by_slice, "patient")
    of_slice = cells(by_slice, "slice (planned)")
    assert of_patient[:2] == ["200", "0.16"] and of_slice[:2] == ["10,000", "0.0032"]
    epsilon = accounting.epsilon((Mechanism(0.0032, 5.0, 300),), 1e-5)
    assert of_slice[2] == told(epsilon) and of_slice[4] == told(50 * epsilon), "a patient with k slices has k times the epsilon"
    by_patient = price.price(Plan(), SMALL)
    assert "This plan protects patients." in by_patient
    assert cells(by_patient, "patient (planned)")[4] == cells(by_patient, "patient (planned)")[2], "a patient is one record"


def test_few_patients_are_told_so() -> None:
    text = " ".join(price.price(Plan(), SMALL).split())
    assert "200 patients are few" in text
    assert "1,000 updates cost epsilon 3.3 at delta 0.001, and 10,000 cost 14.6." in text
    for steps, told_epsilon in ((1_000, 3.3), (10_000, 14.6)):
        assert told_epsilon - 0.1 < accounting.epsilon((Mechanism(32 / 200, 5.0, steps),), 1e-3) <= told_epsilon
    assert "are few" not in price.price(Plan(delta=1e-5), LARGE)


def test_so_few_patients_that_nothing_helps_are_told_so() -> None:
    """The comparison holds: the same sampling rate and noise, in a larger cohort, have the same epsilon and less noise on the mean of a batch."""
    text = " ".join(price.price(Plan(noise_multiplier=4.0, expected_batch=2, steps=80), Cohort(patients=8, slices=40, most_slices=5)).split())
    assert "8 patients are too few to be hidden usefully, whatever epsilon says: one is in 25% of the updates" in text
    assert "noise multiplier / batch = 2, where 1 is as long as the longest gradient of one. 5,000 patients at this sampling rate and noise multiplier pay 0.0032." in text
    assert pytest.approx(0.0032) == 4.0 / (5_000 * 0.25) and "thousand critic updates" not in text


def test_a_budget_that_ends_training_early_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "critic_steps_total", lambda plan, records: 8)
    assert ": 8 of 300 critic updates, after which the budget is spent, each with 32 of 200 patients" in " ".join(price.price(Plan(epsilon=1.0), SMALL).split())


def test_what_would_do_does() -> None:
    """Each way out is a key and a value that can be written, and with it the plan has a price; one of which nothing is left is not told."""
    plan = Plan(epsilon=0.1, noise_multiplier=None, steps=9_000, critic_steps=3)
    with pytest.raises(budget.TooSmall) as refused:
        history_of(plan, 200)
    found = re.fullmatch(r".*; what would do: dp\.epsilon: ([0-9.]+), or steps: ([0-9]+) \(each has 3 critic updates\), or batch_size: ([0-9]+)", str(refused.value))
    assert found is not None
    for changes in ({"epsilon": float(found[1])}, {"steps": 3 * int(found[2])}, {"expected_batch": int(found[3])}):
        assert history_of(replace(plan, **changes), 200)[0].noise_multiplier <= budget.MOST_NOISE
    with pytest.raises(budget.TooSmall, match=r"what would do: dp\.epsilon: [0-9.]+$"):
        history_of(Plan(epsilon=1e-6, noise_multiplier=None, delta=1e-9), 200)


def test_half_a_record_is_no_batch() -> None:
    text = price.price(Plan(expected_batch=3), SMALL)
    assert "half the batch" not in rows(text) and "twice the batch" in rows(text)


def test_what_cannot_be_is_not_priced() -> None:
    """A batch above all records has no row, nor does an epsilon that no sensible noise gives."""
    assert cells(price.price(Plan(expected_batch=1, delta=1e-5, steps=1), LARGE), "for epsilon 20") == ["< 0.2"]
    assert cells(price.price(Plan(noise_multiplier=300.0, expected_batch=200, steps=4_000), SMALL), "for epsilon 1") == ["> 100"]
    text = price.price(Plan(unit="slice", expected_batch=300, delta=1e-4, steps=3), Cohort(patients=200, slices=500, most_slices=4))
    assert "half the batch" in rows(text) and "twice the batch" not in rows(text)
    assert cells(text, "patient") == ["200", "above 1", "none"]


@pytest.mark.parametrize(("plan", "message"), [
    (Plan(expected_batch=201), r"batch_size: 201 patients in an update, but the training split has 200; write 200 or fewer"),
    (Plan(delta=0.005), r"dp\.delta: 0.005 is not below 1 / 200 records.*write 0.0005"),
    (Plan(epsilon=0.01, noise_multiplier=None, steps=10_000), r"dp\.epsilon: 0.01 cannot be kept in 10,000 critic updates.*what would do: dp\.epsilon: [0-9.]+, or steps: [0-9]+, or batch_size: 1$"),
    (Plan(noise_multiplier=None), "neither epsilon nor noise_multiplier"),
    (Plan(noise_multiplier=0.0), "dp.noise_multiplier: 0 promises nothing"),
    (Plan(steps=0), "dp.epsilon is spent before the first step is over"),
])  # fmt: skip
def test_what_is_no_plan_is_refused(plan: Plan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        price.price(plan, SMALL)


def test_a_plan_without_noise_or_budget_is_not_private() -> None:
    assert isinstance(Plan(), Priced) and is_private(Plan()) and is_private(Plan(epsilon=1.0, noise_multiplier=None))
    assert not is_private(Plan(noise_multiplier=None))


def test_the_verb_refuses_specs_without_privacy(medgen: Callable[..., subprocess.CompletedProcess[str]], write_spec: Callable[[dict[str, Any]], Path]) -> None:
    path = write_spec(tiny_spec())
    assert "no train stage trains with differential privacy; how to write one: docs/private_training.md" in medgen("privacy", path, expect=2).stderr
    assert "--stage train_seg: it does not train with differential privacy; those that do: none" in medgen("privacy", path, "--stage", "train_seg", expect=2).stderr
    assert "--stage trian: there is no such stage" in medgen("privacy", path, "--stage", "trian", expect=2).stderr


@pytest.fixture
def private_spec(write_spec: Callable[[dict[str, Any]], Path]) -> Callable[..., Path]:
    """Two private stages and one that is not, over four training patients."""
    def write(**dp: Any) -> Path:
        config = {"model": "dpwgan", "channels": ["bravo"], "latent": 4, "features": 4, "steps": 10, "critic_steps": 2, "batch_size": 1}
        stages = {name: {"kind": "train", "config": {**config, "dp": privacy}} for name, privacy in (("first", dp), ("second", dp), ("open", "none"))}
        return write_spec({**tiny_spec(), "data": {"format": "phantom", "patients": 6, "size": 32, "every": 2}, "stages": stages})

    return write


def test_the_verb_prices_the_private_stages(medgen: Callable[..., subprocess.CompletedProcess[str]], private_spec: Callable[..., Path]) -> None:
    path = private_spec(noise_multiplier=5.0)
    text = medgen("privacy", path).stdout
    assert max(map(len, text.splitlines())) <= 100
    words = " ".join(text.split())
    assert text.startswith("first\n") and "\n\nsecond\n" in text and "\nopen\n" not in text
    assert "each patient: 20 critic updates, each with 1 of 4 patients expected, noise multiplier 5, clip norm 1." in words
    both = accounting.epsilon((Mechanism(0.25, 5.0, 40),), 0.02)
    assert words.endswith(f"All 2 stages learn from the same patients: together they cost epsilon {told(both)} at delta 0.02.")
    second = medgen("privacy", path, "--stage", "second", "-o", "stages.second.config.steps=20", "-o", "stages.second.config.dp.noise_decay=0.5").stdout
    assert "first" not in second and "40 critic updates" in second and "noise multiplier 5 falling to 2.5" in " ".join(second.split())
    assert "--stage open: it does not train with differential privacy; those that do: first, second" in medgen("privacy", path, "--stage", "open", expect=2).stderr


def test_the_verb_says_where_a_plan_cannot_be(medgen: Callable[..., subprocess.CompletedProcess[str]], private_spec: Callable[..., Path]) -> None:
    refused = medgen("privacy", private_spec(noise_multiplier=5.0), "-o", "stages.first.config.dp.noise_multiplier=0", expect=2)
    assert "stages.first.config: dp.noise_multiplier: 0 promises nothing, so that it has no price" in refused.stderr
