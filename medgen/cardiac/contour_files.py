"""A contour file of any format to contours in pixels of their images; called by tree.py. The content says which format it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from medgen.cardiac import contours_csv, contours_cvi42, contours_json, contours_medis, contours_sunnybrook
from medgen.cardiac.contours import Contour
from medgen.errors import InputError

Format = Literal["json", "sunnybrook", "cvi42", "medis", "csv"]
WORDS: dict[Format, str] = {
    "json": "Contours.json with epicardial_contours_x and so on",
    "sunnybrook": "Sunnybrook text, two numbers per line",
    "cvi42": "a cvi42 workspace exported as .cvi42wsx",
    "medis": "Medis .con with blocks [XYCONTOUR]",
    "csv": "a table with the columns kind, column_px and row_px",
}
FIRST_PIXEL_CENTRE: dict[Format, float] = {
    "json": contours_json.FIRST_PIXEL_CENTRE,
    "sunnybrook": contours_sunnybrook.FIRST_PIXEL_CENTRE,
    "cvi42": contours_cvi42.FIRST_PIXEL_CENTRE,
    "medis": contours_medis.FIRST_PIXEL_CENTRE,
    "csv": contours_csv.FIRST_PIXEL_CENTRE,
}
LARGEST_BYTES = 512 * 2**20  # a cvi42 workspace of a long study has about 50 MB


@dataclass(frozen=True)
class ContourFile:
    """`ignored`: how many curves of each other name the file holds, such as those of the long axis."""

    path: Path
    format: Format
    contours: tuple[Contour, ...]
    ignored: Mapping[str, int]


def read_contours(path: Path, first_pixel_centre: float | None = None) -> ContourFile:
    """Every contour of the file; it may be none. Points count from the centre of the first pixel (see contours.py), on the grid that the file counts in.

    `first_pixel_centre`: what the file calls the column and the row of that centre, instead of what is known of its format.
    Raises InputError naming file, and line or key, for a file of no known format or one that is damaged."""
    content = _content(path)
    name = recognise(path, content)
    contours, others = _parse(name, path, content)
    offset = FIRST_PIXEL_CENTRE[name] if first_pixel_centre is None else first_pixel_centre
    moved = tuple(replace(contour, points=contour.points - offset) for contour in contours) if offset else tuple(contours)
    return ContourFile(path, name, moved, Counter(others))


def recognise(path: Path, content: bytes) -> Format:
    """By what stands in it, whatever it is called. Raises InputError naming the formats there are."""
    text = content[:4096].decode("utf-8-sig", "replace").lstrip()
    first_line = text.splitlines()[0].strip() if text else ""
    if text.startswith("<") or content.startswith((b"\xff\xfe<", b"\xfe\xff\x00<")):  # UTF-16 too
        return "cvi42"
    if text.startswith("{"):
        return "json"
    if contours_medis.BLOCK.encode() in content:
        return "medis"
    if contours_csv.recognises(first_line):
        return "csv"
    if contours_sunnybrook.recognises(first_line):
        return "sunnybrook"
    binary = "; a binary cvi42 workspace (.cvi42ws) cannot be read: export it as .cvi42wsx" if b"\0" in content[:4096] else ""
    raise InputError(f"{path}: no known contour format; the formats are: {'; '.join(WORDS.values())}{binary}")


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise InputError(f"{path}: has {path.stat().st_size / 2**20:.0f} MB; a contour file has at most {LARGEST_BYTES / 2**20:.0f} MB; is this the right file?")
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not content.strip():
        raise InputError(f"{path}: the file is empty; copy it again or remove it")
    return content


def _parse(name: Format, path: Path, content: bytes) -> tuple[list[Contour], list[str]]:
    if name == "cvi42":
        return contours_cvi42.parse(path, content)
    if name == "medis":
        return contours_medis.parse(path, content)
    if name == "csv":
        return contours_csv.parse(path), []
    return (contours_json.parse if name == "json" else contours_sunnybrook.parse)(path, content), []
