"""The privacy card: all that somebody needs who cites a guarantee, and what it does not cover. Written by private trainings, read by the report.

Nothing on it is private: numbers of records and steps, noise, and what they cost."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from medgen.dp import accounting
from medgen.dp.accounting import Spent
from medgen.dp.budget import check_delta, rounded_up
from medgen.dp.ceiling import attack_ceiling, group
from medgen.dp.mechanism import History, Mechanism, merged, steps_of
from medgen.dp.priced import Unit, plural
from medgen.dp.profile import course

CARD_VERSION = 1
WIDTH = 100  # columns of a screen
ADJACENCY = "one record more or less (add or remove), Poisson sampling"
NOT_COVERED = (
    "The noise is of an ordinary generator of random numbers, in floating point: whoever can exploit its rounding (Mironov 2012) is not covered.",
    "Settings, seeds and checkpoints that were chosen by looking at other trainings on the same records: each of them costs its own epsilon.",
    "Preparing the data must treat each record by itself; what was computed of all records together (windows, means, matching) is not covered.",
    "Whatever else is told of the real records (how many there are, validation, evaluation, suspected copies, losses, pictures, how long updates took) is a release of its own.",
    "Who was trained on is taken as given: a split by chance of one patient more is another split for others too. A patient is what the table of files calls one.",
)


@dataclass(frozen=True)
class Card:
    """A guarantee and what it rests on.

    unit: what one record is. most_records: of one patient, 1 where the unit is the patient. history: the critic's updates, in stretches that
    were alike. last_clip_norm: where the clip norm changed on the way, which costs nothing. limits: sentences on what this training leaves open beyond NOT_COVERED. spent: infinite epsilons where there was no noise. accountants: who counted, with versions."""

    unit: Unit
    records: int
    most_records: int
    history: History
    clip_norm: float
    spent: Spent
    accountants: Mapping[str, str]
    limits: tuple[str, ...] = ()
    last_clip_norm: float | None = None

    @property
    def steps(self) -> int:
        """Updates of the critic, each of which is charged; the generator's are free, as they see no records."""
        return steps_of(self.history)

    def record(self) -> dict[str, Any]:
        """For JSON, complete without the code: an infinite epsilon is null, which is no guarantee."""
        ceiling = attack_ceiling(self.spent.epsilon_prv, self.spent.delta)
        return {
            "version": CARD_VERSION, "unit": self.unit, "adjacency": ADJACENCY, "records": self.records, "most_records_of_one_patient": self.most_records,
            "delta": self.spent.delta, "epsilon_prv": _finite(self.spent.epsilon_prv), "epsilon_rdp": _finite(self.spent.epsilon_rdp), "accountants": dict(self.accountants),
            "critic_steps": self.steps, "clip_norm": self.clip_norm, **({} if self.last_clip_norm is None else {"last_clip_norm": self.last_clip_norm}),
            "history": [{**asdict(stretch), "expected_batch": round(stretch.sampling_rate * self.records, 6)} for stretch in self.history],
            "attack_at_most": {"advantage": ceiling.advantage, "auc": ceiling.auc, "true_positive_rate_at_0.01": ceiling.true_positive_rate(0.01)},
            "not_covered": [*self.limits, *NOT_COVERED],
        }  # fmt: skip

    def words(self) -> list[str]:
        """Lines for a screen of 100 columns."""
        if math.isinf(self.spent.epsilon_prv):
            return ["no differential privacy: there were steps without noise"]
        facts = {
            "epsilon": f"{told(self.spent.epsilon_prv)} by {self.accountants['prv']}; {told(self.spent.epsilon_rdp)} by {self.accountants['rdp']}",
            "delta": f"{self.spent.delta:.3g}, of {self.records:,} {plural(self.unit)}",
            "unit": f"one {self.unit}, added or removed" + (" with all its slices" if self.unit == "patient" else ""),
            "steps": "; ".join(self._alike_in_words(rate, tuple(stretches)) for rate, stretches in itertools.groupby(self.history, lambda stretch: stretch.sampling_rate)) or "none",
            "attacks": self._attacks_in_words(),
            **({"patients": self._patients_in_words()} if self.most_records > 1 else {}),
        }
        indent = max(len(name) for name in facts) + 4
        lines = [f"({told(self.spent.epsilon_prv)}, {self.spent.delta:.3g})-differential privacy of each {self.unit}"]
        lines += [line for name, text in facts.items() for line in hung(f"  {name}", text, indent)]
        return [*lines, "not covered", *(line for text in (*self.limits, *NOT_COVERED) for line in hung("  -", text, 4))]

    def _alike_in_words(self, sampling_rate: float, stretches: History) -> str:
        """Stretches of one sampling rate."""
        noise = [f"{stretch.noise_multiplier:.4g}" + (f" in {stretch.steps:,}" if len(stretches) > 1 else "") for stretch in stretches]
        return (f"{steps_of(stretches):,} critic updates, {sampling_rate * self.records:.4g} {plural(self.unit)} expected in each (sampling rate {sampling_rate:.3g}), "
                f"noise multiplier {', then '.join(noise)}, clip norm {self._clip_in_words()}")  # fmt: skip

    def _clip_in_words(self) -> str:
        return course(self.clip_norm, self.clip_norm if self.last_clip_norm is None else self.last_clip_norm)

    def _attacks_in_words(self) -> str:
        ceiling = attack_ceiling(self.spent.epsilon_prv, self.spent.delta)
        return f"on the membership of one {self.unit}: AUC at most {rounded_up(ceiling.auc):.4f}, true positives at 1 % false ones at most {rounded_up(100 * ceiling.true_positive_rate(0.01)):.4g} %"

    def _patients_in_words(self) -> str:
        epsilon, delta = group(self.spent.epsilon_prv, self.spent.delta, self.most_records)
        worth = "which promises nothing" if delta >= 1 else f"delta {delta:.2g}"
        return f"one with {self.most_records} slices has epsilon {told(epsilon)}, {worth}"


def issue(unit: Unit, records: int, most_records: int, history: History, clip_norm: float, delta: float, limits: tuple[str, ...] = (), last_clip_norm: float | None = None) -> Card:
    """Count what was done and write it down; last_clip_norm: where it changed on the way. Raises ValueError if delta is not below 1 / records."""
    check_delta(delta, records)
    return Card(unit, records, most_records, merged(history), clip_norm, accounting.spent(history, delta), accounting.accountants(), limits, last_clip_norm)


def from_record(record: Mapping[str, Any]) -> Card:
    """What `Card.record` wrote. Raises ValueError for something else."""
    try:
        if record["version"] != CARD_VERSION:
            raise ValueError(f"a privacy card of version {record['version']}; this medgen reads version {CARD_VERSION}")
        history = tuple(Mechanism(item["sampling_rate"], item["noise_multiplier"], item["steps"]) for item in record["history"])
        prv, rdp = (math.inf if record[name] is None else record[name] for name in ("epsilon_prv", "epsilon_rdp"))
        return Card(record["unit"], record["records"], record["most_records_of_one_patient"], history, record["clip_norm"], Spent(prv, rdp, record["delta"]), record["accountants"],
                    tuple(text for text in record["not_covered"] if text not in NOT_COVERED),
                    record.get("last_clip_norm"))  # fmt: skip
    except (KeyError, TypeError) as error:
        raise ValueError(f"no privacy card: {error!r}") from None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def told(epsilon: float) -> str:
    """Never less than it is."""
    return f"{rounded_up(epsilon):.4g}" if 0 < epsilon < math.inf else f"{epsilon:g}"


def hung(name: str, text: str, indent: int) -> list[str]:
    """A name and its text, folded to the screen beside it."""
    return textwrap.wrap(text, WIDTH, initial_indent=name.ljust(indent), subsequent_indent=" " * indent, break_long_words=False)
