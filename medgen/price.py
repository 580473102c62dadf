"""`medgen privacy`: what the private trainings of a spec will cost, and what they would at other numbers, before a GPU is used. Called by cli.py.

Reads the data as `medgen data` does, because the price depends on how many patients and slices there are."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medgen import rundir, spec
from medgen.dp import accounting, budget
from medgen.dp.card import WIDTH, told
from medgen.dp.ceiling import attack_ceiling, group
from medgen.dp.mechanism import History, Mechanism, steps_of
from medgen.dp.priced import Cohort, Priced, Unit, clip_norms, delta_of, history_of, is_private, plural
from medgen.dp.profile import Profile, course
from medgen.errors import InputError
from medgen.prepare.page import Table
from medgen.spec import Spec
from medgen.spec_data import DataSpec
from medgen.spec_stages import TrainStage

EPSILONS = (1.0, 3.0, 8.0, 20.0)  # strong, usual for a cautious release, usual for images, weak
FEW_PATIENTS = 500  # below: what fact there is on small cohorts is told
TOO_FEW_PATIENTS = 100  # below: no number of updates helps, and that is told
ENOUGH_PATIENTS = 5_000  # what they are compared with
PAGE = "docs/private_training.md"


def privacy(spec_path: Path, overrides: Sequence[str], stage_name: str | None) -> str:
    """What to print. Raises InputError if no stage (or not the one asked for) trains with differential privacy, or a plan cannot be."""
    points = spec.load_points(spec_path, overrides)
    plans = _plans(points[0].spec, stage_name)
    parts = [f"the first of {len(points)} points of the sweep: {', '.join(f'{key}={value}' for key, value in points[0].values.items())}"] if len(points) > 1 else []
    priced = []
    for name, plan in plans.items():
        cohort = _cohort(points[0].spec, points[0].spec.stages[name])
        print(f"{name}: counting {cohort.patients:,} patients, {cohort.slices:,} slices", file=sys.stderr, flush=True)
        try:
            parts.append(f"{name}\n{price(plan, cohort)}")
            priced.append((plan.unit, history_of(plan, cohort.records(plan.unit)), delta_of(plan, cohort.records(plan.unit))))
        except ValueError as error:
            raise InputError(f"stages.{name}.config: {error}") from None
    return "\n\n".join([*parts, *_together(priced)])


# the stages of a spec


def _plans(checked: Spec, name: str | None) -> dict[str, Priced]:
    """The private train stages, or the one asked for."""
    found = {key: plan for key, stage in checked.stages.items() if isinstance(stage, TrainStage) and (plan := _priced(stage)) is not None}
    names = ", ".join(found) or "none"
    if name is None and not found:
        raise InputError(f"no train stage trains with differential privacy; how to write one: {PAGE}")
    if name is not None and name not in found:
        kind = "there is no such stage" if name not in checked.stages else "it does not train with differential privacy"
        raise InputError(f"--stage {name}: {kind}; those that do: {names}")
    return found if name is None else {name: found[name]}


def _priced(stage: TrainStage) -> Priced | None:
    """The plan of a stage whose family trains privately and whose configuration says so; None for all others."""
    config = spec.family_config(stage.config) if stage.repeat is None else None
    return config if isinstance(config, Priced) and is_private(config) else None


def _cohort(checked: Spec, stage: object) -> Cohort:
    """Whom the stage learns from: the slices of the train split that training uses."""
    from medgen.data.store import open_store

    assert isinstance(checked.data, DataSpec) and isinstance(stage, TrainStage)  # a train stage is there
    store = open_store(checked.data, checked.seed, rundir.cache_root(rundir.runs_root()), lambda text: print(text, file=sys.stderr, flush=True))
    rows = store.select("train", spec.family_config(stage.config).trains_positive_only(checked.data))
    slices = store.rows["patient"].iloc[rows].value_counts()
    return Cohort(len(slices), len(rows), int(slices.max()))


# the screen


@dataclass(frozen=True)
class _Line:
    """A row of the table: what is changed, and the history; or the noise that would be needed, where it is not a sensible one."""

    label: str
    history: History | str


def price(plan: Priced, cohort: Cohort) -> str:
    """What the plan costs, what others would, and what that means to a patient: text of 100 columns at most.

    Raises ValueError if the plan cannot be: too small an epsilon, a delta that promises nothing, a batch of more than there are."""
    records = cohort.records(plan.unit)
    delta, planned = delta_of(plan, records), history_of(plan, records)
    if plan.noise_multiplier == 0:
        raise ValueError("dp.noise_multiplier: 0 promises nothing, so that it has no price; write a number above 0, or dp.epsilon")
    updates = steps_of(planned)
    if updates == 0:
        raise ValueError("dp.epsilon is spent before the first step is over; write a larger dp.epsilon or dp.noise_multiplier")
    noise = plan.noise_profile.first(updates)
    lines = [_Line("as planned", planned), *_changed(planned, noise, plan.expected_batch), *(_Line(f"for epsilon {target:g}", _for_epsilon(planned[0].sampling_rate, noise, target, delta)) for target in EPSILONS)]
    parts = [
        _folded(f"({told(accounting.epsilon(planned, delta))}, {delta:.3g})-differential privacy of each {plan.unit}: {_counted(plan, updates)}, each with {plan.expected_batch:,} of "
                f"{records:,} {plural(plan.unit)} expected, noise multiplier {course(planned[0].noise_multiplier, planned[-1].noise_multiplier)}, clip norm {course(*clip_norms(plan, updates))}."),
        _table(lines, records, delta).text(),
        _folded("epsilon: by the PRV accountant, to be cited; RDP: an older bound, which is higher. AUC, TPR: the most that any attack on the membership of one "
                f"{plan.unit} may reach, TPR at 1 % false positives. All are rounded up."),
        _by_unit(plan.unit, planned, cohort, delta).text(),
        *(_folded(sentence) for sentence in _sentences(plan, planned, cohort)),
    ]  # fmt: skip
    return "\n\n".join(parts)


def _counted(plan: Priced, updates: int) -> str:
    """How many there will be, and whether the budget ends them: with both an epsilon and a noise."""
    if updates == plan.noise_profile.updates:
        return budget.told_updates(updates)
    return f"{updates:,} of {budget.told_updates(plan.noise_profile.updates)}, after which the budget is spent"


def _changed(planned: History, noise: Profile, batch: int) -> list[_Line]:
    rate, first_noise, updates = planned[0].sampling_rate, planned[0].noise_multiplier, noise.updates
    changes = [("half the updates", rate, updates // 2), ("twice the updates", rate, 2 * updates),
               *([("half the batch", rate / 2, updates)] if batch % 2 == 0 else []), ("twice the batch", 2 * rate, updates)]  # fmt: skip
    return [_Line(label, noise.resized(count).history(changed, first_noise)) for label, changed, count in changes if changed <= 1 and count > 0]


def _for_epsilon(sampling_rate: float, noise: Profile, epsilon: float, delta: float) -> History | str:
    try:
        return noise.history(sampling_rate, budget.noise_multiplier_for(epsilon, delta, sampling_rate, noise))
    except budget.TooSmall:
        return f"> {budget.MOST_NOISE:g}"
    except budget.TooLarge:
        return f"< {budget.LEAST_NOISE:g}"


def _table(lines: Sequence[_Line], records: int, delta: float) -> Table:
    head = ("", "batch", "sampling rate", "updates", "noise", "epsilon", "RDP", "AUC", "TPR")
    return Table("", head, tuple((line.label, *_cells(line.history, records, delta)) for line in lines))


def _cells(history: History | str, records: int, delta: float) -> tuple[str, ...]:
    if isinstance(history, str):
        return ("", "", "", history, "", "", "", "")
    spent = accounting.spent(history, delta)
    ceiling = attack_ceiling(spent.epsilon_prv, delta)
    return (
        f"{history[0].sampling_rate * records:,.4g}", f"{history[0].sampling_rate:.3g}", f"{steps_of(history):,}", _noise(history),
        told(spent.epsilon_prv), told(spent.epsilon_rdp), _most(ceiling.auc), _most(ceiling.true_positive_rate(0.01)),
    )  # fmt: skip


def _noise(history: History) -> str:
    """Of the first update, and of the last one if it has another."""
    return "-".join(dict.fromkeys(f"{stretch.noise_multiplier:.4g}" for stretch in (history[0], history[-1])))


def _most(share: float) -> str:
    """A share that is a limit, to three decimals, never below."""
    return f"{math.ceil(share * 1000 - 1e-9) / 1000:.3f}"


def _by_unit(unit: Unit, planned: History, cohort: Cohort, delta: float) -> Table:
    """The same updates, batch and noise with patients and with slices as records, and what each promises the patient with most slices."""
    batch = planned[0].sampling_rate * cohort.records(unit)
    rows: list[tuple[str, ...]] = []
    units: tuple[Unit, Unit] = ("patient", "slice")
    for counted in units:
        records, most = cohort.records(counted), cohort.most_records(counted)
        if batch > records:
            rows.append((counted, f"{records:,}", "above 1", "none", "", "", ""))
            continue
        their_delta = min(delta, budget.advised_delta(records)) if counted != unit else delta
        epsilon = accounting.epsilon(tuple(replace(stretch, sampling_rate=batch / records) for stretch in planned), their_delta)
        of_patient, patients_delta = group(epsilon, their_delta, most)
        kept = patients_delta < 1 / cohort.patients
        rows.append((f"{counted}{' (planned)' if counted == unit else ''}", f"{records:,}", f"{batch / records:.3g}", told(epsilon), f"{their_delta:.2g}",
                     told(of_patient), f"{patients_delta:.2g}" if kept else "no promise"))  # fmt: skip
    return Table("", ("one record is a", "records", "sampling rate", "epsilon", "delta", f"of a patient's {cohort.most_slices} slices", "delta"), tuple(rows))


def _sentences(plan: Priced, planned: History, cohort: Cohort) -> list[str]:
    said = []
    if cohort.most_slices > 1:
        said.append("An epsilon of a slice says little of a patient: k slices come and go together, with k times the epsilon and a delta that grows like e^((k - 1) epsilon). "
                    + (f"This plan protects slices, and a patient has up to {cohort.most_slices}: write unit: patient to promise patients something." if plan.unit == "slice" else "This plan protects patients."))  # fmt: skip
    if cohort.patients < TOO_FEW_PATIENTS:
        said.append(_too_few(plan, planned[0], cohort))
    elif cohort.patients < FEW_PATIENTS:
        said.append(f"{cohort.patients:,} patients are few: each is in a large share of the updates. Meaningful privacy for patients takes thousands of them, or some hundreds and about a thousand critic updates; "
                    "with 200 patients, batches of 32 and noise 5, 1,000 updates cost epsilon 3.3 at delta 0.001, and 10,000 cost 14.6.")  # fmt: skip
    return said


def _too_few(plan: Priced, first: Mechanism, cohort: Cohort) -> str:
    """At one sampling rate and noise multiplier, and so at one epsilon and delta, the batch grows with the cohort, and the noise on its mean falls."""
    in_updates = 1 - (1 - first.sampling_rate) ** cohort.most_records(plan.unit)
    noise = first.noise_multiplier / plan.expected_batch
    return (
        f"{cohort.patients:,} patients are too few to be hidden usefully, whatever epsilon says: one is in {'up to ' if cohort.most_records(plan.unit) > 1 else ''}{in_updates:.0%} of the updates, and what images pay is "
        f"the noise for each {plan.unit} of a batch, noise multiplier / batch = {noise:.2g}, where 1 is as long as the longest gradient of one. "
        f"{ENOUGH_PATIENTS:,} patients at this sampling rate and noise multiplier pay {noise * cohort.patients / ENOUGH_PATIENTS:.2g}."
    )


def _together(priced: Sequence[tuple[Unit, History, float]]) -> list[str]:
    """What all stages cost whoever gets what all of them made: the same records paid for each."""
    if len(priced) < 2 or len({unit for unit, _, _ in priced}) > 1:
        return []
    history = tuple(stretch for _, planned, _ in priced for stretch in planned)
    delta = max(delta for _, _, delta in priced)
    return [_folded(f"All {len(priced)} stages learn from the same {plural(priced[0][0])}: together they cost epsilon {told(accounting.epsilon(history, delta))} at delta {delta:.3g}.")]


def _folded(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False)
