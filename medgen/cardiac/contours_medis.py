"""Medis QMass `.con`: a header, then blocks [XYCONTOUR] of one curve each; called by contour_files.py.

A block is a line `slice phase type 1.0`, a line with the number of points and that many lines `x y`, on the grid of `Image_resolution=COLUMNSxROWS`."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from medgen.cardiac.contours import Contour, Kind
from medgen.errors import InputError

# Not published. Scripts known to read these files divide by the enlargement and fill on integer pixel centres, which is this.
FIRST_PIXEL_CENTRE = 0.0
BLOCK = "[XYCONTOUR]"
KIND_OF: dict[int, Kind] = {0: "endocardium", 1: "epicardium", 5: "right_ventricle"}
NAMES = {2: "right ventricular epicardium"}  # known, and of no use here
RESOLUTION = re.compile(r"Image_resolution\s*=\s*(\d{1,6})\s*x\s*(\d{1,6})\s*$")


def parse(path: Path, content: bytes) -> tuple[list[Contour], list[str]]:
    """The contours, whose `image` is "slice/phase", and what each curve of another type is called. Raises InputError naming the line."""
    lines = content.decode("latin-1").splitlines()
    grid = _grid(path, lines)
    contours: list[Contour] = []
    others: list[str] = []
    at = 0
    while at < len(lines):
        if lines[at].strip() != BLOCK:
            at += 1
            continue
        image, kind_number = _heading(path, lines, at + 1)
        points = _points(path, lines, at + 2)
        if kind_number in KIND_OF:
            contours.append(Contour(KIND_OF[kind_number], points, image=image, grid_shape=grid, source=f"{path}:{at + 1}"))
        else:
            others.append(NAMES.get(kind_number, f"curves of type {kind_number}"))
        at += 3 + len(points)
    return contours, others


def _grid(path: Path, lines: list[str]) -> tuple[int, int]:
    for line in lines:
        found = RESOLUTION.match(line.strip())
        if found:
            return int(found[2]), int(found[1])
    raise InputError(f"{path}: no line Image_resolution=COLUMNSxROWS, so the enlargement of the contours is unknown; export the contours again")


def _line(path: Path, lines: list[str], at: int, wanted: str) -> str:
    if at >= len(lines):
        raise InputError(f"{path}:{len(lines)}: the file ends where {wanted} should follow; it is cut short: copy it again")
    return lines[at].strip()


def _heading(path: Path, lines: list[str], at: int) -> tuple[str, int]:
    """"slice/phase" and the number of the type."""
    text = _line(path, lines, at, "the line `slice phase type`")
    words = text.split()
    if len(words) < 3 or not all(re.fullmatch(r"\d{1,6}", word) for word in words[:3]):
        raise InputError(f"{path}:{at + 1}: expected `slice phase type`, three whole numbers, got {text[:60]!r}; is the file damaged?")
    return f"{int(words[0])}/{int(words[1])}", int(words[2])


def _points(path: Path, lines: list[str], at: int) -> np.ndarray:
    text = _line(path, lines, at, "the number of points")
    if not re.fullmatch(r"\d{1,6}", text):
        raise InputError(f"{path}:{at + 1}: expected the number of points, got {text[:60]!r}; is the file damaged?")
    points = []
    for position in range(at + 1, at + 1 + int(text)):
        line = _line(path, lines, position, f"{text} points")
        try:
            column, row = (float(word) for word in line.split())
        except ValueError:
            raise InputError(f"{path}:{position + 1}: expected two numbers, column and row, got {line[:60]!r}; line {at + 1} promises {text} points") from None
        points.append((column, row))
    return np.array(points, np.float64).reshape(-1, 2)
