"""Contours.json: four arrays of numbers for one slice, as the cardiac mapping cohorts keep them; called by contour_files.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from medgen.cardiac.contours import Contour, Kind
from medgen.errors import InputError

# The reference rasteriser fills these polygons on integer pixel centres, and nothing else about the software that drew them is known.
FIRST_PIXEL_CENTRE = 0.0
PREFIXES: dict[str, Kind] = {"epicardial_contours": "epicardium", "endocardial_contours": "endocardium", "right_ventricular_contours": "right_ventricle"}


def parse(path: Path, content: bytes) -> list[Contour]:
    """The contours whose two arrays are there and not empty. Raises InputError naming the key that is wrong."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable JSON ({error}); is the file cut short? copy it again") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected an object with the keys {_allowed()}, got a {type(found).__name__}")
    for key in found:
        if key not in [f"{prefix}_{axis}" for prefix in PREFIXES for axis in "xy"]:
            raise InputError(f"{path}: unknown key {key[:80]!r}; the keys are: {_allowed()}; remove it")
    return [contour for prefix, kind in PREFIXES.items() for contour in _contour(path, found, prefix, kind)]


def _allowed() -> str:
    return ", ".join(f"{prefix}_x, {prefix}_y" for prefix in PREFIXES)


def _contour(path: Path, found: dict[str, object], prefix: str, kind: Kind) -> list[Contour]:
    """None or one."""
    keys = [f"{prefix}_{axis}" for axis in "xy"]
    there = [key for key in keys if key in found]
    if not there:
        return []
    if len(there) == 1:
        other = keys[1 - keys.index(there[0])]
        raise InputError(f"{path}: {there[0]} is there, {other} is not; a contour needs both: add it or remove the other")
    columns, rows = (_numbers(path, key, found[key]) for key in keys)
    if len(columns) != len(rows):
        raise InputError(f"{path}: {keys[0]} has {len(columns)} numbers, {keys[1]} has {len(rows)}; every point needs both")
    return [Contour(kind, np.array([columns, rows], np.float64).T, source=f"{path}: {prefix}")] if columns else []


def _numbers(path: Path, key: str, value: object) -> list[float]:
    if not isinstance(value, list):
        raise InputError(f"{path}: {key} is a {type(value).__name__}; write an array of numbers")
    for position, number in enumerate(value):
        if isinstance(number, bool) or not isinstance(number, int | float) or abs(number) > 1e300:  # beyond that an integer is no float
            raise InputError(f"{path}: {key}: entry {position + 1} is {str(number)[:40]!r}; write numbers only")
    return [float(number) for number in value]
