"""Sunnybrook text contours: one `column row` per line, what it is in the file's name; called by contour_files.py."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from medgen.cardiac.contours import Contour, Kind
from medgen.errors import InputError

# Drawn with a program that counts from 1. Measured on the five patients of the public subset: moved by (-0.86, -0.94) pixels with a standard error
# of 0.09 the 96 endocardial contours lie best on the edge between blood and muscle, so 0 and a half are excluded.
FIRST_PIXEL_CENTRE = 1.0
NAME = re.compile(r"IM-\d+-(\d+)-([a-z0-9]+)contour-(?:manual|auto)\.txt", re.IGNORECASE)
KIND_OF: dict[str, Kind] = {"i": "endocardium", "o": "epicardium"}


def recognises(first_line: str) -> bool:
    return len(first_line.split()) == 2 and all(_is_number(word) for word in first_line.split())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def parse(path: Path, content: bytes) -> list[Contour]:
    """One contour; its `image` is the number in the name. Raises InputError naming the line that is wrong, or a name that does not say what it is."""
    named = NAME.fullmatch(path.name)
    if named is None or named[2].lower() not in KIND_OF:
        raise InputError(f"{path}: the name does not say which contour this is; "
                         "allowed are IM-0001-0048-icontour-manual.txt (endocardium) and IM-0001-0048-ocontour-manual.txt (epicardium); rename it")  # fmt: skip
    points = [_point(path, number, line) for number, line in enumerate(content.decode("ascii", "replace").splitlines(), start=1) if line.strip()]
    return [Contour(KIND_OF[named[2].lower()], np.array(points), image=str(int(named[1])), source=str(path))]


def _point(path: Path, number: int, line: str) -> tuple[float, float]:
    words = line.split()
    if len(words) != 2 or not all(_is_number(word) for word in words):
        raise InputError(f"{path}:{number}: expected two numbers, column and row, got {line[:60]!r}; is the file damaged?")
    return float(words[0]), float(words[1])
