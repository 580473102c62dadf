"""Contours as a table, for tools that have no format of their own: a line per point, in drawing order; called by contour_files.py.

Columns: kind (epicardium, endocardium or right_ventricle), column_px, row_px; and, where wanted, image (which image of several the curve is
drawn on), closed (yes or no; yes without it), image_rows and image_columns (the size of the image, so that another size is noticed)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medgen import csv_files
from medgen.cardiac.contours import KINDS, Contour, Kind
from medgen.errors import InputError

FIRST_PIXEL_CENTRE = 0.0  # a format of medgen's own: it counts as medgen does
NEEDED = {"what the curve bounds": "kind", "from left to right": "column_px", "from top to bottom": "row_px"}
OPTIONAL = ("image", "closed", "image_rows", "image_columns")


def recognises(first_line: str) -> bool:
    return "column_px" in first_line and "row_px" in first_line


def parse(path: Path) -> list[Contour]:
    """In the order of the file. Raises InputError naming the line that is wrong."""
    lines = csv_files.read_rows(path)
    csv_files.require_columns(path, list(lines[0][1]), NEEDED)
    for column in lines[0][1]:
        if column not in (*NEEDED.values(), *OPTIONAL):
            raise InputError(f"{path}: unknown column {column!r}; the columns are: {', '.join((*NEEDED.values(), *OPTIONAL))}; remove or rename it")
    groups: dict[tuple[str, str], list[tuple[int, dict[str, str]]]] = {}
    for number, row in lines:
        groups.setdefault((row.get("image", ""), row["kind"]), []).append((number, row))
    return [_contour(path, image, rows) for (image, _), rows in groups.items()]


def _contour(path: Path, image: str, rows: list[tuple[int, dict[str, str]]]) -> Contour:
    first, _ = rows[0]
    kind = _kind(path, *rows[0])
    points = [(_number(path, number, row, "column_px"), _number(path, number, row, "row_px")) for number, row in rows]
    for number, row in rows[1:]:
        for column in ("closed", "image_rows", "image_columns"):
            if row.get(column) != rows[0][1].get(column):
                raise InputError(f"{path}:{number}: {column} is {row[column]!r}, but {rows[0][1][column]!r} in line {first} of the same curve; write the same")
    return Contour(kind, np.array(points), _closed(path, *rows[0]), image, _shape(path, *rows[0]), f"{path}:{first}")


def _kind(path: Path, number: int, row: dict[str, str]) -> Kind:
    for kind in KINDS:
        if row["kind"].strip() == kind:
            return kind
    raise InputError(f"{path}:{number}: kind is {row['kind']!r}; write one of {', '.join(KINDS)}")


def _closed(path: Path, number: int, row: dict[str, str]) -> bool:
    text = row.get("closed", "yes")
    if text not in ("yes", "no"):
        raise InputError(f"{path}:{number}: closed is {text!r}; write yes or no")
    return text == "yes"


def _shape(path: Path, number: int, row: dict[str, str]) -> tuple[int, int] | None:
    given = [row[column] for column in ("image_rows", "image_columns") if column in row]
    if not given:
        return None
    if len(given) == 1 or not all(text.strip().isdecimal() and len(text) < 7 for text in given):
        raise InputError(f"{path}:{number}: the size of the image is {' by '.join(map(repr, given))}; write image_rows and image_columns, two whole numbers")
    return int(given[0]), int(given[1])


def _number(path: Path, number: int, row: dict[str, str], column: str) -> float:
    try:
        return float(row[column])
    except ValueError:
        raise InputError(f"{path}:{number}: {column} is {row[column]!r}; write a number of pixels") from None
