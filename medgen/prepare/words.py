"""Numbers and sentences that match, split and stack share, for the terminal and for their pages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from medgen.errors import InputError
from medgen.prepare.table import Balance, Cohort, Subject
from medgen.report.words import number as three_digits

SMALLEST_P = 0.0001  # smaller ones are told as such


def number(value: float) -> str:
    return "0" if value == 0 else three_digits(value)


def p_value(p: float) -> str:
    return f"below {SMALLEST_P:g}" if p < SMALLEST_P else number(p)


def age(years: float | None) -> str:
    return "" if years is None else f"{years:.1f}"


def known_ages(subjects: Sequence[Subject]) -> list[str]:
    """One cell, `74.8 (55.2 to 90.1)`; none where ages are not known."""
    ages = [subject.age_years for subject in subjects if subject.age_years is not None]
    return [f"{sum(ages) / len(ages):.1f} ({min(ages):.1f} to {max(ages):.1f})"] if ages else []


def left_out(cohort: Cohort) -> str:
    """What the table holds besides, in a sentence; empty if there is nothing."""
    if not cohort.left_out:
        return ""
    groups = ", ".join(f"{count} of {group}" for group, count in sorted(cohort.left_out.items()))
    return f"Not looked at: images of other groups ({groups})."


def group_counts(cohort: Cohort, subjects: Sequence[Subject]) -> dict[str, Any]:
    """For JSON: of every group its subjects, images, sexes and mean age."""
    return {group: _counts([subject for subject in subjects if subject.group == group]) for group in cohort.groups}


def _counts(subjects: Sequence[Subject]) -> dict[str, Any]:
    ages = [subject.age_years for subject in subjects if subject.age_years is not None]
    return {
        "subjects": len(subjects),
        "images": sum(len(subject.images) for subject in subjects),
        "sexes": dict(sorted(Counter(subject.sex for subject in subjects if subject.sex is not None).items())),
        "mean_age_years": sum(ages) / len(ages) if ages else None,
    }


def require_something_to_compare(balance: Balance, verb: str) -> None:
    if balance is Balance.NONE:
        raise InputError(f"--balance none leaves {verb} nothing to compare; use both, age or sex")
