"""`medgen prepare split`: train, val and test by subject, each with its share of every group, alike in age and sex. Called by cli.py.

scikit-learn's StratifiedGroupKFold deals the subjects out anew for every try; the first split that passes all tests is taken, and
if none does, none is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from medgen import csv_files, files
from medgen.errors import InputError, MedgenError
from medgen.prepare import page, words
from medgen.prepare.match import by_group
from medgen.prepare.page import Section, Table
from medgen.prepare.statistics import Alikeness, compare
from medgen.prepare.table import Cohort, Columns, Subject, read_cohort, require_comparable_groups
from medgen.spec_data import SPLITS

COLUMN = "split"
MOST_FOLDS = 20  # shares are met to a twentieth; fewer folds where a group has fewer subjects
FEWEST_PER_GROUP = 2  # on every side, so that there is something to test


@dataclass(frozen=True)
class Shares:
    """Of all images; the rest is for training."""

    test: float
    val: float

    def __post_init__(self) -> None:
        if self.test + self.val >= 1 or self.test + self.val <= 0:
            raise InputError(f"--test {self.test:g} and --val {self.val:g}: together they must be more than 0 and less than 1")

    @property
    def wanted(self) -> tuple[str, ...]:
        """The splits that get images, in the order of SPLITS."""
        share = {"train": 1.0, "val": self.val, "test": self.test}
        return tuple(split for split in SPLITS if share[split] > 0)


@dataclass(frozen=True)
class Split:
    """The side of every image, and how alike it all is: the groups within each side, and train with each other side."""

    side_of: tuple[str, ...]
    within: dict[str, Alikeness]
    between: dict[str, Alikeness]

    @property
    def worst_p(self) -> float:
        return min(alikeness.worst_p for alikeness in (*self.within.values(), *self.between.values()))


def deal(groups: Sequence[str], subjects: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """A fold number 0 .. folds-1 for every image: whole subjects, every fold with about the same share of each group."""
    from sklearn.model_selection import StratifiedGroupKFold

    dealt = np.empty(len(groups), int)
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    for number, (_, held_out) in enumerate(splitter.split(np.zeros(len(groups)), np.array(groups), np.array(subjects))):
        dealt[held_out] = number
    return dealt


def find_split(cohort: Cohort, shares: Shares, min_p: float, tries: int, seed: int) -> Split:
    """The first with every p-value above `min_p`, else the one whose smallest is largest. Raises MedgenError if no try gave every side every group."""
    best: Split | None = None
    for number in range(tries):
        tried = _judged(cohort, shares, _sides(cohort, shares, seed + number))
        if tried is not None and (best is None or tried.worst_p > best.worst_p):
            best = tried
        if best is not None and best.worst_p > min_p:
            return best
    if best is None:
        raise MedgenError(f"{cohort.path}: none of {tries} splits gave every side {FEWEST_PER_GROUP} subjects of every group; nothing was written. "
                          "Give larger shares with --test and --val, or add subjects")  # fmt: skip
    return best


def _sides(cohort: Cohort, shares: Shares, seed: int) -> np.ndarray:
    """The split of every image: the last folds are test, then the last folds of a new deal of the others are val."""
    side_of = np.full(len(cohort.images), "train", dtype="<U5")
    _hold_out(cohort, side_of, "test", shares.test, seed)
    _hold_out(cohort, side_of, "val", shares.val / (1 - shares.test), seed)
    return side_of


def _hold_out(cohort: Cohort, side_of: np.ndarray, side: str, share: float, seed: int) -> None:
    rest = np.flatnonzero(side_of == "train")
    images = [cohort.images[position] for position in rest]
    fewest = min(len({image.subject for image in images if image.group == group}) for group in cohort.groups)
    if share == 0 or fewest < 2:  # the side stays empty, and _judged refuses it
        return
    part = _folds(share, min(MOST_FOLDS, fewest))
    dealt = deal([image.group for image in images], [image.subject for image in images], part.denominator, seed)
    side_of[rest[dealt >= part.denominator - part.numerator]] = side


def _folds(share: float, most: int) -> Fraction:
    """How many of how many folds come closest to a share, at least one and not all of them."""
    return min(max(Fraction(share).limit_denominator(most), Fraction(1, most)), 1 - Fraction(1, most))


def _judged(cohort: Cohort, shares: Shares, side_of: np.ndarray) -> Split | None:
    """None if some side has too few subjects of some group."""
    sides = _subjects_by_side(cohort, side_of)
    by_side = {side: by_group(sides[side]) for side in shares.wanted}
    if any(len(groups.get(group, [])) < FEWEST_PER_GROUP for groups in by_side.values() for group in cohort.groups):
        return None
    within = {side: compare(groups) for side, groups in by_side.items()}
    between = {f"train and {side}": compare({"train": sides["train"], side: sides[side]}) for side in shares.wanted if side != "train"}
    return Split(tuple(str(side) for side in side_of), within, between)


def _subjects_by_side(cohort: Cohort, side_of: Sequence[str] | np.ndarray) -> dict[str, list[Subject]]:
    found: dict[str, list[Subject]] = {side: [] for side in SPLITS}
    for subject in cohort.subjects():
        (side,) = {str(side_of[position]) for position in subject.images}
        found[side].append(subject)
    return found


# the verb


def split(table: Path, out: Path, columns: Columns, shares: Shares, min_p: float, tries: int, seed: int) -> str:
    """Write the table with a column `split` and its report to `out`; returns what to print. Raises MedgenError, and writes nothing, if no try passes."""
    files.require_new(out)
    cohort = read_cohort(table, columns)
    require_comparable_groups(cohort)
    if COLUMN in cohort.header:
        raise InputError(f"{table}: has a column {COLUMN!r} already; remove it to split anew")
    _require_enough(cohort, shares)
    found = find_split(cohort, shares, min_p, tries, seed)
    counts, tests = _counts(cohort, shares, found), _tests_table(found, min_p)
    if not found.worst_p > min_p:
        raise MedgenError(_failure(cohort, tests, tries))
    record = _record(cohort, shares, found, min_p, tries, seed)
    with files.folder_in_one_move(out) as folder:
        rows = [{**row, COLUMN: side} for row, side in zip(cohort.rows, found.side_of, strict=True)]
        csv_files.write_rows(folder / "split.csv", (*cohort.header, COLUMN), rows)
        files.write_json(folder / "report.json", record)
        files.write_text(folder / "report.html", _page(cohort, shares, found, counts, tests, seed, tries))
    shown = [counts.text(), tests.text() if tests.rows else "", f"{out}: split.csv, report.json, report.html"]
    return "\n\n".join(part for part in (words.left_out(cohort), *shown) if part)


def _require_enough(cohort: Cohort, shares: Shares) -> None:
    needed = FEWEST_PER_GROUP * len(shares.wanted)
    for group, subjects in by_group(cohort.subjects()).items():
        if len(subjects) < needed:
            raise InputError(f"{cohort.path}: the group {group!r} has {len(subjects)} subjects; {', '.join(shares.wanted)} need {FEWEST_PER_GROUP} each, so {needed}")


def _counts(cohort: Cohort, shares: Shares, found: Split) -> Table:
    sides = _subjects_by_side(cohort, found.side_of)
    rows = []
    for side in shares.wanted:
        images = found.side_of.count(side)
        groups = by_group(sides[side])
        rows.append((side, f"{len(sides[side]):,}", f"{images:,}", f"{100 * images / len(found.side_of):.1f} %",
                     *(f"{len(groups[group]):,}" for group in cohort.groups), *words.known_ages(sides[side])))  # fmt: skip
    return Table("", ("", "subjects", "images", "share", *cohort.groups, *(["age"] if cohort.columns.age is not None else [])), tuple(rows))


def _tests_table(found: Split, min_p: float) -> Table:
    rows = []
    for what, alikeness in {**{f"groups within {side}": alikeness for side, alikeness in found.within.items()}, **found.between}.items():
        for name, test in alikeness.tests.items():
            differences = [value for measure, value in alikeness.differences.items() if (measure == "age") == (name == "age")]
            rows.append((f"{what}: {name} ({test.name})", words.number(max(differences)), words.p_value(test.p), f"above {min_p:g}"))
    return Table("", ("", "difference", "p", "wanted"), tuple(rows))


def _failure(cohort: Cohort, tests: Table, tries: int) -> str:
    whole = compare(by_group(cohort.subjects()))
    advice = (f"In the whole table the smallest p-value between the groups is {words.p_value(whole.worst_p)}: medgen prepare match first"
              if whole.worst_p < 0.2 else "Try more with --tries, other shares, or a smaller --min-p")  # fmt: skip
    return f"{cohort.path}: none of {tries} splits is balanced; nothing was written. The best one:\n{tests.text()}\n{advice}"


def _record(cohort: Cohort, shares: Shares, found: Split, min_p: float, tries: int, seed: int) -> dict[str, Any]:
    sides = _subjects_by_side(cohort, found.side_of)
    return {
        "verb": "split",
        "table": str(cohort.path),
        "table_sha256": files.sha256_file(cohort.path),
        "age_of_a_subject": "mean over its images",
        "shares": {"test": shares.test, "val": shares.val},
        "limits": {"min_p": min_p, "tries": tries},
        "seed": seed,
        "left_out_images": cohort.left_out,
        "sides": {side: {"groups": words.group_counts(cohort, sides[side]), **found.within[side].record()} for side in shares.wanted},
        "between": {pair: alikeness.record() for pair, alikeness in found.between.items()},
    }


def _page(cohort: Cohort, shares: Shares, found: Split, counts: Table, tests: Table, seed: int, tries: int) -> str:
    sides = _subjects_by_side(cohort, found.side_of)
    by_side = {side: sides[side] for side in shares.wanted}
    beside = page.age_charts({"each side": by_side}, shares.wanted)
    within = page.age_charts({f"groups within {side}": by_group(subjects) for side, subjects in by_side.items()}, cohort.groups)
    return page.render(
        title=f"{', '.join(shares.wanted[:-1])} and {shares.wanted[-1]}",
        lead=f"{len(cohort.subjects())} subjects with {len(cohort.images)} images; nobody is in two splits. {words.left_out(cohort)}".strip(),
        sections=[Section("Who is where", "", (counts,), beside, page.group_keys(shares.wanted) if beside else ()),
                  Section("Are they alike?", f"{METHOD} Seed {seed}, at most {tries} tries.", (tests,), within, page.group_keys(cohort.groups) if within else ())],
        table=cohort.path,
    )  # fmt: skip


METHOD = (
    "Whole subjects were dealt out at random, each side with its share of every group, until every p-value was above its limit: between the groups "
    "within each side, and between training and each other side. One value per subject, whose age is its mean age over its images. A difference is "
    "the standardised mean difference; small sides make large ones by chance."
)
