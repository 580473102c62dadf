"""A manifest: a CSV table with a line per image, for data of any layout, and where a file does not say what it is; called by tree.py.

Columns: image, patient; and, where wanted (an empty cell is for the file to say): contours (one file, or several with ; between), contour_image
(which image of these files it is: SOP Instance UID, slice/phase of a .con, image of a table), frame (of a multi-frame file, from 0), type
(T1, T2 or cine), ms_per_value, region (apex, mid or base), first_pixel_centre (what the contour file calls the first pixel's centre).
Paths count from the folder of the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from medgen import csv_files
from medgen.cardiac.candidates import Candidate, Offer
from medgen.cardiac.dicom import Told
from medgen.cardiac.map_type import REGIONS, TYPES
from medgen.errors import InputError

NEEDED = {"the DICOM file": "image", "who must not be in two splits": "patient"}
OPTIONAL = ("contours", "contour_image", "frame", "type", "ms_per_value", "region", "first_pixel_centre")
Word = TypeVar("Word", bound=str)


def offer(path: Path) -> Offer:
    """Raises InputError naming the line for a cell that cannot be, a column that is unknown, or an image that stands twice."""
    rows = csv_files.read_rows(path)
    csv_files.require_columns(path, list(rows[0][1]), NEEDED)
    unknown = [column for column in rows[0][1] if column not in (*NEEDED.values(), *OPTIONAL)]
    if unknown:
        raise InputError(f"{path}: unknown column {unknown[0]!r}; the columns are: {', '.join((*NEEDED.values(), *OPTIONAL))}; rename or remove it")
    seen: dict[tuple[Path, int | None], int] = {}
    candidates = []
    for number, row in rows:
        candidate = _candidate(path, number, {column: cell.strip() for column, cell in row.items()})
        for frame in {candidate.frame, None}:  # all frames and one of them is twice too
            if (candidate.image, frame) in seen:
                raise InputError(f"{path}:{number}: {row['image']} stands in line {seen[candidate.image, frame]} already; keep one of them")
        seen[candidate.image, candidate.frame] = number
        candidates.append(candidate)
    return Offer("manifest", candidates, [])


def _candidate(path: Path, number: int, row: dict[str, str]) -> Candidate:
    where = f"{path}:{number}"
    for column in NEEDED.values():
        if not row[column]:
            raise InputError(f"{where}: {column} is empty; every image needs a file and a patient, for splits are by patient")
    ms_per_value = _decimal(where, row, "ms_per_value")
    if ms_per_value is not None and ms_per_value <= 0:
        raise InputError(f"{where}: ms_per_value is {ms_per_value:g}; write how many ms one stored value means, above 0")
    contours = tuple(_place(path, part) for part in row.get("contours", "").split(";") if part.strip())
    for column in ("contour_image", "first_pixel_centre"):
        if row.get(column) and not contours:
            raise InputError(f"{where}: {column} has no effect without contours; name their file, or empty the cell")
    image = _place(path, row["image"])
    told = Told(_word(where, row, "type", TYPES), ms_per_value, _word(where, row, "region", REGIONS), _folders(path, image))
    return Candidate(image, row["patient"], told, contours, row.get("contour_image") or None, _frame(where, row), _decimal(where, row, "first_pixel_centre"))


def _place(path: Path, text: str) -> Path:
    return path.parent / Path(text.strip()).expanduser()


def _folders(path: Path, image: Path) -> tuple[str, ...]:
    """Those between the manifest and the image, which may tell its type; what lies above is not about the image."""
    return image.relative_to(path.parent).parts[-2::-1] if image.is_relative_to(path.parent) else ()


def _word(where: str, row: dict[str, str], column: str, allowed: Sequence[Word]) -> Word | None:
    text = row.get(column, "")
    if not text:
        return None
    for word in allowed:
        if text == word:
            return word
    raise InputError(f"{where}: {column} is {text!r}; write one of {', '.join(allowed)}, or nothing")


def _frame(where: str, row: dict[str, str]) -> int | None:
    text = row.get("frame", "")
    if text and not (text.isdecimal() and len(text) < 7):
        raise InputError(f"{where}: frame is {text!r}; write a whole number, 0 for the first, or nothing for a file of one")
    return int(text) if text else None


def _decimal(where: str, row: dict[str, str], column: str) -> float | None:
    text = row.get(column, "")
    try:
        number = float(text) if text else None
    except ValueError:
        number = float("nan")
    if number is not None and not abs(number) < 1e6:  # a NaN is not smaller
        raise InputError(f"{where}: {column} is {text!r}; write a number, or nothing")
    return number
