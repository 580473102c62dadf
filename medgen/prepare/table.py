"""A table of images and the subjects in it, checked before anything is computed; read by match.py, split.py and stack.py.

One row is one image. What is tested and moved is always the subject: its age is the mean age over its images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from medgen import csv_files
from medgen.errors import InputError

OLDEST_YEARS = 130.0
MOST_GROUPS = 20  # more are no classes, but a column named by mistake
SHOWN = 5


class Balance(str, Enum):
    """What is compared between groups and between splits."""

    BOTH = "both"
    AGE = "age"
    SEX = "sex"
    NONE = "none"


@dataclass(frozen=True)
class Columns:
    """The names of the columns. None: this table is not asked for it. `groups` in the order wanted; empty: all, sorted."""

    subject: str
    group: str
    image: str | None
    sex: str | None
    age: str | None
    groups: tuple[str, ...]

    def wanted(self) -> dict[str, str]:
        """What every column is for, and its name."""
        named = {"the subject": self.subject, "the group": self.group, "the image's name": self.image, "the sex": self.sex, "the age": self.age}
        return {purpose: name for purpose, name in named.items() if name is not None}


class Preset(str, Enum):
    """Tables whose columns are known."""

    PLAIN = "plain"
    ADNI = "adni"


PRESETS = {
    Preset.PLAIN: Columns("subject", "group", None, "sex", "age", ()),
    Preset.ADNI: Columns("Subject", "Group", "Image Data ID", "Sex", "Age", ("CN", "AD")),
}


def columns_of(
    preset: Preset, balance: Balance, subject: str | None, group: str | None, image: str | None, sex: str | None, age: str | None, groups: str | None
) -> Columns:
    """The preset with what the user named instead; without the columns that `balance` leaves out."""
    known = PRESETS[preset]
    return Columns(
        subject=subject if subject is not None else known.subject,
        group=group if group is not None else known.group,
        image=image if image is not None else known.image,
        sex=(sex if sex is not None else known.sex) if balance in (Balance.BOTH, Balance.SEX) else None,
        age=(age if age is not None else known.age) if balance in (Balance.BOTH, Balance.AGE) else None,
        groups=known.groups if groups is None else _group_names(groups),
    )


def _group_names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if "" in names or len(set(names)) < len(names):
        raise InputError(f"--groups {text!r}: give different names with commas, for example --groups CN,AD")
    return names


@dataclass(frozen=True)
class Image:
    """One row of the table."""

    line: int
    subject: str
    group: str
    sex: str | None
    age_years: float | None


@dataclass(frozen=True)
class Subject:
    """Somebody with at least one image; `images` are positions in Cohort.images."""

    name: str
    group: str
    sex: str | None
    age_years: float | None
    images: tuple[int, ...]


@dataclass(frozen=True)
class Cohort:
    """The rows of the wanted groups in their order. `rows` holds all their cells as they stand in the file, beside `images`."""

    path: Path
    columns: Columns
    header: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    images: tuple[Image, ...]
    groups: tuple[str, ...]
    left_out: dict[str, int]  # images of other groups

    def subjects(self) -> list[Subject]:
        """In the order in which they first appear."""
        found: dict[str, list[int]] = {}
        for position, image in enumerate(self.images):
            found.setdefault(image.subject, []).append(position)
        return [self._subject(name, positions) for name, positions in found.items()]

    def _subject(self, name: str, positions: list[int]) -> Subject:
        images = [self.images[position] for position in positions]
        ages = [image.age_years for image in images if image.age_years is not None]
        mean = math.fsum(ages) / len(ages) if ages else None
        return Subject(name, images[0].group, images[0].sex, mean, tuple(positions))


def read_cohort(path: Path, columns: Columns) -> Cohort:
    """Raises InputError naming the line if a cell is unusable, an image stands twice, or a subject has two groups or two sexes."""
    lines = csv_files.read_rows(path)
    header = tuple(lines[0][1])
    _require_columns(path, columns, header)
    read = [(row, _image(path, columns, number, row)) for number, row in lines]
    groups = columns.groups or tuple(sorted({image.group for _, image in read}))
    left_out = Counter(image.group for _, image in read if image.group not in groups)
    kept = [(row, _with_numbers(path, columns, row, image)) for row, image in read if image.group in groups]
    cohort = Cohort(path, columns, header, tuple(row for row, _ in kept), tuple(image for _, image in kept), groups, dict(left_out))
    _require_groups(cohort)
    _require_one_of_each(cohort)
    _require_unique_images(cohort)
    return cohort


def _require_columns(path: Path, columns: Columns, header: Sequence[str]) -> None:
    try:
        csv_files.require_columns(path, header, columns.wanted())
    except InputError as error:
        fits = [preset.value for preset, known in PRESETS.items() if set(known.wanted().values()) <= set(header)]
        hint = f"; --preset {fits[0]} fits this table" if fits else "; name yours with --subject, --group, --sex, --age, or say with --balance what the table has"
        raise InputError(f"{error}{hint}") from None


def _cell(path: Path, line: int, row: dict[str, str], column: str) -> str:
    text = row[column].strip()
    if not text:
        raise InputError(f"{path}:{line}: {column} is empty; fill it in or remove the line")
    return text


def _image(path: Path, columns: Columns, line: int, row: dict[str, str]) -> Image:
    """Who it is; sex and age are read for the wanted groups only."""
    return Image(line, _cell(path, line, row, columns.subject), _cell(path, line, row, columns.group), None, None)


def _with_numbers(path: Path, columns: Columns, row: dict[str, str], image: Image) -> Image:
    sex = None if columns.sex is None else _cell(path, image.line, row, columns.sex)
    age = None if columns.age is None else _age(path, image.line, columns.age, _cell(path, image.line, row, columns.age))
    return replace(image, sex=sex, age_years=age)


def _age(path: Path, line: int, column: str, text: str) -> float:
    try:
        years = float(text)
    except ValueError:
        years = math.nan
    if not 0 <= years <= OLDEST_YEARS:
        raise InputError(f"{path}:{line}: {column} is {text!r}; write years as a number from 0 to {OLDEST_YEARS:g}, with a point: 73.5")
    return years


def _require_groups(cohort: Cohort) -> None:
    there = {image.group for image in cohort.images}
    named = f"{cohort.path}: column {cohort.columns.group!r}"
    if len(cohort.groups) > MOST_GROUPS:
        raise InputError(f"{named} holds {len(cohort.groups)} different values; name the column of the groups with --group, or choose groups with --groups")
    for group in cohort.groups:
        if group not in there:
            raise InputError(f"{named} never is {group!r}; the groups there are: {', '.join(sorted({*there, *cohort.left_out}))}; choose with --groups")


def require_comparable_groups(cohort: Cohort) -> None:
    """Raises InputError unless there are two groups or more with two subjects or more each."""
    subjects = Counter(subject.group for subject in cohort.subjects())
    named = f"{cohort.path}: column {cohort.columns.group!r}"
    if len(cohort.groups) < 2:
        raise InputError(f"{named} holds the group {cohort.groups[0]!r} only; there must be two or more to compare")
    for group in cohort.groups:
        if subjects[group] < 2:
            raise InputError(f"{named}: the group {group!r} has one subject; every group needs two or more, add some or leave it out with --groups")


def _require_one_of_each(cohort: Cohort) -> None:
    """Someone cannot be moved as a whole who is in two groups, nor counted who has two sexes."""
    first: dict[str, Image] = {}
    for image in cohort.images:
        known = first.setdefault(image.subject, image)
        for what, column, before, now in (("group", cohort.columns.group, known.group, image.group), ("sex", cohort.columns.sex, known.sex, image.sex)):
            if before != now:
                raise InputError(
                    f"{cohort.path}:{image.line}: subject {image.subject} has {column} {now!r}, but {before!r} in line {known.line}; "
                    f"a subject has one {what}: correct it, or remove the lines of one of them"
                )


def _require_unique_images(cohort: Cohort) -> None:
    column = cohort.columns.image
    if column is None:
        return
    lines: dict[str, int] = {}
    for row, image in zip(cohort.rows, cohort.images, strict=True):
        name = _cell(cohort.path, image.line, row, column)
        if lines.setdefault(name, image.line) != image.line:
            raise InputError(f"{cohort.path}:{image.line}: {column} {name} stands in line {lines[name]} already; keep one of them")
