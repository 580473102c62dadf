"""`medgen prepare match`: remove whole subjects until the groups are alike in age and sex. Called by cli.py.

One subject at a time, always the one without whom the largest standardised mean difference is smallest (then the next largest, and
so on; then the one with the fewest images; then drawn by the seed). Where all differences are small and a test still tells the groups
apart, the one without whom the smallest p-value is largest. Nobody is put back, so it ends."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medgen import csv_files, files, rng
from medgen.errors import MedgenError
from medgen.prepare import page, words
from medgen.prepare.page import Section, Table
from medgen.prepare.statistics import (
    Alikeness,
    Measures,
    compare,
    group_sums,
    image_differences,
    measures_of,
    pairwise_differences,
)
from medgen.prepare.table import Balance, Cohort, Columns, Subject, read_cohort, require_comparable_groups

FEWEST_PER_GROUP = 2
DIGITS = 9  # differences that agree so far are equal: the order of summing must not decide


@dataclass(frozen=True)
class Limits:
    """When groups count as alike: every difference below the one, every p-value above the other."""

    max_difference: float
    min_p: float

    def differences_met(self, alikeness: Alikeness) -> bool:
        return all(value < self.max_difference for value in alikeness.differences.values())

    def met(self, alikeness: Alikeness) -> bool:
        return self.differences_met(alikeness) and alikeness.worst_p > self.min_p


@dataclass(frozen=True)
class Matching:
    """Who stays, in the order of the table, and who was removed, in the order of removal. `alikeness` is of those who stay."""

    kept: list[Subject]
    removed: list[Subject]
    alikeness: Alikeness


def by_group(subjects: Sequence[Subject]) -> dict[str, list[Subject]]:
    """In the order in which the groups first appear."""
    found: dict[str, list[Subject]] = {}
    for subject in subjects:
        found.setdefault(subject.group, []).append(subject)
    return found


def match_subjects(subjects: Sequence[Subject], limits: Limits, max_removed: float, seed: int) -> Matching:
    """The first matching within the limits; where there is none before a share `max_removed` of every group is gone, the best one met."""
    pool = _Pool.of(subjects, max_removed, seed)
    best: tuple[tuple[float, ...], Matching] | None = None
    while True:
        now = pool.matching()
        if limits.met(now.alikeness):
            return now
        badness = _badness(now.alikeness, limits)
        if best is None or badness < best[0]:
            best = (badness, now)
        choices = pool.choices()
        if not len(choices):
            return best[1]
        if limits.differences_met(now.alikeness):
            pool.remove(_by_p(pool, choices, limits))
        else:
            pool.remove(choices[int(_order_by_difference(pool, choices)[0])])


def _badness(alikeness: Alikeness, limits: Limits) -> tuple[float, ...]:
    """Small differences before all else, then p-values."""
    if limits.differences_met(alikeness):
        return (0.0, -alikeness.worst_p)
    return (1.0, *sorted((round(value, DIGITS) for value in alikeness.differences.values()), reverse=True))


@dataclass
class _Pool:
    """Everybody, and who is still there. Subjects of one group, sex and age are interchangeable: of each such kind one is tried."""

    subjects: list[Subject]
    measured: Measures
    group_of: np.ndarray
    groups: int
    kind_of: np.ndarray
    first_to_go: np.ndarray  # all positions, fewest images first, then as drawn
    fewest: np.ndarray  # how many of each group must stay
    there: np.ndarray
    removed: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, subjects: Sequence[Subject], max_removed: float, seed: int) -> _Pool:
        measured = measures_of(subjects)
        names = list(by_group(subjects))
        group_of = np.array([names.index(subject.group) for subject in subjects])
        kind_of = np.unique(np.column_stack([group_of, measured.values]), axis=0, return_inverse=True)[1].reshape(-1)
        drawn = rng.permutation(len(subjects), seed, "prepare/match")
        images = np.array([len(subject.images) for subject in subjects])
        sizes = np.bincount(group_of)
        fewest = np.maximum(FEWEST_PER_GROUP, sizes - np.floor(max_removed * sizes + 1e-9).astype(int))
        return cls(list(subjects), measured, group_of, len(names), kind_of, drawn[np.argsort(images[drawn], kind="stable")], fewest, np.ones(len(subjects), bool))

    def matching(self) -> Matching:
        kept = [subject for subject, there in zip(self.subjects, self.there, strict=True) if there]
        return Matching(kept, [self.subjects[position] for position in self.removed], compare(by_group(kept)))

    def choices(self) -> np.ndarray:
        """Positions of those who may go, one of each kind; the order is that of `first_to_go`."""
        spare = np.bincount(self.group_of[self.there], minlength=self.groups) > self.fewest
        may_go = self.first_to_go[self.there[self.first_to_go] & spare[self.group_of[self.first_to_go]]]
        firsts = np.unique(self.kind_of[may_go], return_index=True)[1]
        return may_go[np.sort(firsts)]

    def remove(self, position: int) -> None:
        self.there[position] = False
        self.removed.append(int(position))

    def differences_without(self, choices: np.ndarray) -> np.ndarray:
        """[choices, pairs * k]: all differences if that one went, the largest first."""
        there = self.there
        count, total, squares = group_sums(self.measured.values[there], np.ones(there.sum()), self.group_of[there], self.groups)
        one = np.eye(self.groups)[self.group_of[choices]]
        gone = one[:, :, None] * self.measured.values[choices][:, None, :]
        found = pairwise_differences(count - one, total - gone, squares - gone**2, self.measured.is_share)
        return -np.sort(-np.round(found.reshape(len(choices), -1), DIGITS), axis=1)


def _order_by_difference(pool: _Pool, choices: np.ndarray) -> np.ndarray:
    """Best first; equal ones stay in the order of `choices`."""
    return np.lexsort(pool.differences_without(choices).T[::-1])


def _by_p(pool: _Pool, choices: np.ndarray, limits: Limits) -> int:
    """Among those whose leaving keeps all differences small, if there are any: the one without whom the smallest p-value is largest."""
    ordered = choices[_order_by_difference(pool, choices)]
    small = pool.differences_without(ordered)[:, 0] < limits.max_difference
    ordered = ordered[small] if small.any() else ordered[:1]
    return int(max(ordered, key=lambda position: _worst_p_without(pool, int(position))))


def _worst_p_without(pool: _Pool, position: int) -> float:
    left = [subject for number, subject in enumerate(pool.subjects) if pool.there[number] and number != position]
    return round(compare(by_group(left)).worst_p, 12)


# the verb


def match(table: Path, out: Path, columns: Columns, balance: Balance, limits: Limits, max_removed: float, seed: int) -> str:
    """Write the matched table and its report to `out`; returns what to print. Raises MedgenError, and writes nothing, if no matching is found."""
    words.require_something_to_compare(balance, "match")
    files.require_new(out)
    cohort = read_cohort(table, columns)
    require_comparable_groups(cohort)
    subjects = cohort.subjects()
    before = compare(by_group(subjects))
    matching = match_subjects(subjects, limits, max_removed, seed)
    rows = _comparison(before, matching.alikeness, limits)
    if not limits.met(matching.alikeness):
        raise MedgenError(_failure(table, cohort, matching, rows, max_removed))
    record = _record(cohort, matching, before, limits, max_removed, seed)
    with files.folder_in_one_move(out) as folder:
        kept = {position for subject in matching.kept for position in subject.images}
        csv_files.write_rows(folder / "matched.csv", cohort.header, [row for position, row in enumerate(cohort.rows) if position in kept])
        csv_files.write_rows(folder / "removed.csv", cohort.header, [row for position, row in enumerate(cohort.rows) if position not in kept])
        files.write_json(folder / "report.json", record)
        files.write_text(folder / "report.html", _page(cohort, matching, rows, record))
    return "\n".join([_headline(cohort, matching), words.left_out(cohort), "", rows.text(), "", f"{out}: matched.csv, removed.csv, report.json, report.html"])


def _comparison(before: Alikeness, after: Alikeness, limits: Limits) -> Table:
    differences = [
        (f"difference of {name}", words.number(value), words.number(after.differences.get(name, 0.0)), f"below {limits.max_difference:g}")
        for name, value in before.differences.items()
    ]
    tests = [
        (f"p of {name} ({after.tests[name].name})", words.p_value(test.p), words.p_value(after.tests[name].p), f"above {limits.min_p:g}")
        for name, test in before.tests.items()
    ]
    return Table("", ("", "before", "after", "wanted"), (*differences, *tests))


def _counts(cohort: Cohort, matching: Matching) -> Table:
    everybody, kept = by_group(cohort.subjects()), by_group(matching.kept)
    rows = [
        (group, *(f"{value:,}" for value in (len(everybody[group]), len(kept[group]), _images(everybody[group]), _images(kept[group]))),
         *words.known_ages(everybody[group]), *words.known_ages(kept[group]))
        for group in cohort.groups
    ]
    ages = ("age before", "after") if cohort.columns.age is not None else ()
    return Table("Who stays", ("group", "subjects before", "after", "images before", "after", *ages), tuple(rows))


def _images(subjects: Sequence[Subject]) -> int:
    return sum(len(subject.images) for subject in subjects)


def _headline(cohort: Cohort, matching: Matching) -> str:
    everybody = Counter(subject.group for subject in cohort.subjects())
    kept = Counter(subject.group for subject in matching.kept)
    groups = ", ".join(f"{group} {kept[group]} of {everybody[group]}" for group in cohort.groups)
    return (f"{len(matching.kept)} of {everybody.total()} subjects stay ({groups}), "
            f"with {_images(matching.kept)} of {len(cohort.images)} images")  # fmt: skip


def _failure(table: Path, cohort: Cohort, matching: Matching, rows: Table, max_removed: float) -> str:
    return (
        f"{table}: the groups could not be matched; nothing was written. The best that was met, with {_headline(cohort, matching)}:\n"
        f"{rows.text()}\n"
        f"At most {max_removed:.0%} of each group may be removed: allow more with --max-removed, allow larger differences with --max-smd "
        "or smaller p-values with --min-p, or add subjects where the groups overlap"
    )


def _record(cohort: Cohort, matching: Matching, before: Alikeness, limits: Limits, max_removed: float, seed: int) -> dict[str, Any]:
    everybody = cohort.subjects()
    sides = {"before": (everybody, before), "after": (matching.kept, matching.alikeness)}
    return {
        "verb": "match",
        "table": str(cohort.path),
        "table_sha256": files.sha256_file(cohort.path),
        "age_of_a_subject": "mean over its images",
        "limits": {"max_smd": limits.max_difference, "min_p": limits.min_p, "max_removed": max_removed},
        "seed": seed,
        "left_out_images": cohort.left_out,
        **{when: {"groups": words.group_counts(cohort, subjects), **alikeness.record(), "image_differences": _finite(image_differences(by_group(subjects)))}
           for when, (subjects, alikeness) in sides.items()},
        "removed": [{"subject": subject.name, "group": subject.group, "sex": subject.sex, "age_years": subject.age_years, "images": len(subject.images)}
                    for subject in matching.removed],
    }  # fmt: skip


def _finite(differences: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in differences.items()}


def _page(cohort: Cohort, matching: Matching, rows: Table, record: dict[str, Any]) -> str:
    everybody = cohort.subjects()
    images = Table("What a network sees: every image counted", ("", "before", "after"), tuple(
        (f"difference of {name}", words.number(value), words.number(record["after"]["image_differences"].get(name, 0.0)))
        for name, value in record["before"]["image_differences"].items()
    ))
    removed = Table("Removed, in this order", ("subject", "group", "sex", "age", "images"), tuple(
        (subject.name, subject.group, subject.sex or "", words.age(subject.age_years), str(len(subject.images))) for subject in matching.removed
    ), folded=True)
    charts = page.age_charts({"before": by_group(everybody), "after": by_group(matching.kept)}, cohort.groups)
    return page.render(
        title=f"{' and '.join(cohort.groups)}, matched",
        lead=f"{_headline(cohort, matching)}. {words.left_out(cohort)}".strip(),
        sections=[Section("Are the groups alike?", EXPLANATION, (rows, _counts(cohort, matching)), charts, page.group_keys(cohort.groups) if charts else ()),
                  Section("What was done", f"{METHOD} Seed {record['seed']}.", (images, removed), (), ())],
        table=cohort.path,
    )


EXPLANATION = (
    "A difference is the standardised mean difference: the difference of two means (or shares) in units of their standard deviation, the largest "
    "of any pair of groups; below 0.1 is usually called negligible. The p-values compare one value per subject, whose age is its mean age over its images."
)
METHOD = (
    "Whole subjects were removed one at a time, each time the one without whom the largest difference is smallest; where several were equal, one "
    "with fewest images. Where all differences were small and a test still told the groups apart, the one without whom the smallest p-value is largest."
)
