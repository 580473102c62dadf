"""JSONL files as sources: which lines there are, what is wrong between them, their patients and splits; called by index.py."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from medgen.data.image_looks import stem_of
from medgen.data.index import Source
from medgen.data.jsonl_images import look_at_line
from medgen.data.jsonl_lines import Line, Problem, read_lines, refuse
from medgen.data.splits import assign_splits
from medgen.errors import InputError
from medgen.spec_data import SPLITS, DataSpec, SplitFractions


@dataclass(frozen=True)
class Found:
    """All lines of all files, what is wrong with others, and the split of each file where files decide it."""

    lines: list[Line]
    problems: list[Problem]
    split_of: dict[Path, str]

    def split(self, line: Line) -> str | None:
        return self.split_of.get(line.file) or line.split


def read_sources(data: DataSpec, root: Path, seed: int, notes: list[str]) -> list[Source]:
    """One source per line. Raises InputError telling of all lines that cannot be used, as far as no image has to be opened for that."""
    found = find(data, root)
    refuse(found.problems)
    return _sources(data, root, seed, found, notes)


def read_checked(data: DataSpec, root: Path, seed: int, notes: list[str]) -> tuple[list[Source], list[tuple[int, ...]]]:
    """The same, with the shape of each image (columns, rows, 1), after a look at the header of every file."""
    found = find(data, root)
    missing = {(problem.file, problem.number) for problem in found.problems}
    looks = [(line, *look_at_line(line, data)) for line in found.lines if (line.file, line.number) not in missing]
    refuse([*found.problems, *(Problem(line.file, line.number, text) for line, _, told in looks for text in told)])
    return _sources(data, root, seed, found, notes), [(seen.width, seen.height, 1) for _, seen, _ in looks if seen is not None]


def find(data: DataSpec, root: Path) -> Found:
    """Every line, and what is wrong with each and between them. Raises InputError if there is no such file."""
    split_of = _files(root)
    lines, problems = list[Line](), list[Problem]()
    for file in split_of or {root: ""}:
        more, told = read_lines(file, data)
        lines += more
        problems += told
    found = Found(lines, problems, split_of)
    for check in (_missing_files, _copies, _split_problems, _patient_problems, _id_problems):
        found.problems.extend(check(found))
    return found


def _files(root: Path) -> dict[Path, str]:
    """The split of each file of a folder; of a single file nothing."""
    if root.is_file():
        return {}
    if not root.is_dir():
        raise InputError(f"data.root: {root} is missing; give the JSONL file, or a folder with train.jsonl and val.jsonl or test.jsonl")
    found = {root / f"{split}.jsonl": split for split in SPLITS if (root / f"{split}.jsonl").is_file()}
    if "train" not in found.values():
        others = ", ".join(sorted(path.name for path in root.glob("*.jsonl")))
        raise InputError(f"data.root: {root} has no train.jsonl{f', only {others}' if others else ''}; give the JSONL file itself, or name those of a folder train.jsonl, val.jsonl, test.jsonl")
    return found


# what is wrong between lines, and with what they name


def _missing_files(found: Found) -> list[Problem]:
    problems = []
    for line in found.lines:
        named = {"image": line.image, **{f"mask of {name}": path for name, path in (line.masks or {}).items()}}
        problems += [Problem(line.file, line.number, f"the {what} {path} is {_absence(path)}; paths count from the folder of {line.file.name}")
                     for what, path in named.items() if not _is_file(path)]  # fmt: skip
    return problems


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that nobody may look into
        return False


def _absence(path: Path) -> str:
    try:
        return "not a file" if path.exists() else "missing"
    except OSError as error:
        return f"not readable ({error.strerror})"


def _copies(found: Found) -> list[Problem]:
    return _repeated(found, lambda line: os.path.normpath(line.image), lambda line, first: f"the image {line.image} stands in {_place(line, first)} already; keep one of them")


def _id_problems(found: Found) -> list[Problem]:
    return _repeated(found, lambda line: line.id, lambda line, first: f"the id {line.id} stands in {_place(line, first)} already; give each line its own")


def _repeated(found: Found, key: Callable[[Line], str | None], told: Callable[[Line, Line], str]) -> list[Problem]:
    first: dict[str, Line] = {}
    problems = []
    for line in found.lines:
        value = key(line)
        if value is not None and first.setdefault(value, line) is not line:
            problems.append(Problem(line.file, line.number, told(line, first[value])))
    return problems


def _place(line: Line, other: Line) -> str:
    return f"line {other.number}" if line.file == other.file else other.where


def _split_problems(found: Found) -> list[Problem]:
    """A split is said by files, by every line, or by none."""
    if found.split_of:
        return [Problem(line.file, line.number, f"split is {line.split!r}, and the file's name says {found.split_of[line.file]}; remove one of them")
                for line in found.lines if line.split not in (None, found.split_of[line.file])]  # fmt: skip
    told = [line for line in found.lines if line.split is not None]
    if not told:
        return []
    if len(told) < len(found.lines):
        bare = [line for line in found.lines if line.split is None]
        return [Problem(line.file, line.number, f"no split, but line {told[0].number} has one; give every line its split, or none") for line in bare]
    if not any(line.split == "train" for line in told):
        return [Problem(told[0].file, told[0].number, f"no line has split train; the splits there are: {', '.join(sorted({str(line.split) for line in told}))}")]
    return []


def _patient_problems(found: Found) -> list[Problem]:
    first: dict[str, Line] = {}
    problems = []
    for line in found.lines:
        if line.patient is None:
            continue
        other = first.setdefault(line.patient, line)
        if found.split(other) != found.split(line):
            problems.append(Problem(line.file, line.number, f"patient {line.patient} is in {found.split(line)} here and in {found.split(other)} in {_place(line, other)}; "
                                    "the test result would be too good: keep each patient in one split"))  # fmt: skip
    return problems


# sources


def _sources(data: DataSpec, root: Path, seed: int, found: Found, notes: list[str]) -> list[Source]:
    ids = _ids(found)
    named = {line.patient for line in found.lines}
    patients = [line.patient or (name if name not in named else f"{name} (image)") for name, line in zip(ids, found.lines, strict=True)]
    alone = sum(line.patient is None for line in found.lines)
    if alone:
        notes.append(f"{alone} of {len(found.lines)} lines of {root} name no patient: each of their images counts as a patient of its own")
    given = [found.split(line) for line in found.lines]
    if given[0] is None:
        drawn = assign_splits(patients, data.splits.model_dump(), seed)
        splits = [drawn[patient] for patient in patients]
        notes.append(f"{root} names no splits: patients were split by data.splits and the seed")
    else:
        splits = [str(split) for split in given]
        if data.splits != SplitFractions():
            notes.append(f"{root} names its splits: that decides them, and data.splits is not used")
    sources = [
        Source(name, patient, split, dict.fromkeys(data.images, line.image), line.label, line.caption, line=line)
        for name, patient, split, line in zip(ids, patients, splits, found.lines, strict=True)
    ]
    return sorted(sources, key=lambda source: SPLITS.index(source.split))


def _ids(found: Found) -> list[str]:
    """Of the line, else its image's name, and where several images have one name also the split or the number of the line."""
    stems = Counter(stem_of(line.image.name) for line in found.lines)
    taken = {line.id for line in found.lines if line.id is not None}
    names = []
    for line in found.lines:
        stem = stem_of(line.image.name)
        names.append(line.id or (stem if stems[stem] == 1 and stem not in taken else f"{found.split_of.get(line.file, 'line')}_{line.number}_{stem}"))
    return names
