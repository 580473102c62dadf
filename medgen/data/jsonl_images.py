"""The image and the masks of a line: what their headers tell, held against each other and the spec, and their pixels. Called by jsonl_index.py and jsonl_build.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medgen.data.dicom_pictures import look_at_dicom, read_dicom
from medgen.data.image_looks import (
    LOSSY,
    PICTURES,
    ROUNDING,
    VOLUMES,
    Look,
    gray_of,
    look_at,
    stored_pixels,
    suffix_of,
    values_of,
)
from medgen.data.jsonl_lines import Line
from medgen.errors import InputError
from medgen.spec_data import DataSpec

DICOM = (".dcm", ".dicom")
IMAGES = (*PICTURES, *VOLUMES, *DICOM)
MASKS = (*(suffix for suffix in PICTURES if suffix not in LOSSY), *VOLUMES)
MOST_PIXELS = 178_956_970  # of one image: where pillow refuses pictures, for all kinds of files
HIGHEST = {True: 255, False: 65535}  # white in a picture with 8 bits a value, or with more


@dataclass(frozen=True)
class Seen:
    """What the header of an image tells. `white`: the value of a picture that becomes 1; None where data.window says it."""

    path: Path
    height: int
    width: int
    channels: int
    white: int | None
    spacing_mm: tuple[float, float] | None  # between rows, between columns


def see(path: Path) -> Seen:
    """The header of an image. Raises InputError if it is none, or too large to be decoded."""
    name = path.name.lower()
    if not name.endswith(IMAGES):
        raise InputError(f"{path}: unknown image format; known are: {', '.join(IMAGES)}")
    if name.endswith(DICOM):
        dicom = look_at_dicom(path)
        seen = Seen(path, dicom.rows, dicom.columns, dicom.channels, 255 if dicom.channels == 3 else None, dicom.spacing_mm)
    else:
        look = look_at(path)
        _require_one(look)
        seen = Seen(path, look.height, look.width, look.channels, None if name.endswith(VOLUMES) else HIGHEST[look.eight_bits], look.spacing_mm)
    if seen.height * seen.width > MOST_PIXELS:
        raise InputError(f"{path}: {seen.width} x {seen.height} pixels; at most {MOST_PIXELS:,} are decoded: save it smaller")
    return seen


def _require_one(look: Look) -> None:
    if look.count > 1:
        raise InputError(f"{look.path}: a volume of {look.count} slices; save one slice a file, or use format: nifti or csv")


def look_at_line(line: Line, data: DataSpec) -> tuple[Seen | None, list[str]]:
    """The header of its image, and all that the headers of its files say against it; the pixels of masks are read only where they are in colour."""
    try:
        seen = see(line.image)
    except InputError as error:
        return None, [str(error), *_told_of_masks(line, None)]
    problems = []
    if seen.channels < len(data.images):
        problems.append(f"{line.image}: a gray image, and data.images names {', '.join(data.images)}; write {{image: 0}}, which takes coloured ones as gray, or save it in colour")
    return seen, problems + _told_of_masks(line, seen)


def _told_of_masks(line: Line, seen: Seen | None) -> list[str]:
    problems = []
    for path in (line.masks or {}).values():
        try:
            _check_mask(path, seen)
        except InputError as error:
            problems.append(str(error))
    return problems


def _check_mask(path: Path, seen: Seen | None) -> None:
    if not path.name.lower().endswith(MASKS):
        told = "a JPEG has no sharp edges" if path.name.lower().endswith(LOSSY) else "unknown format of a mask"
        raise InputError(f"{path}: {told}; known are: {', '.join(MASKS)}")
    look = look_at(path)
    _require_one(look)
    if look.height * look.width > MOST_PIXELS:
        raise InputError(f"{path}: {look.width} x {look.height} pixels; at most {MOST_PIXELS:,} are decoded: save it smaller")
    if seen is not None and (look.height, look.width) != (seen.height, seen.width):
        raise InputError(f"{path}: a mask of {look.width} x {look.height} pixels, and its image {seen.path} has {seen.width} x {seen.height}; save it in the size of the image")
    if look.channels > 1:
        read_mask(path)


def read_image(seen: Seen, channels: int) -> np.ndarray:
    """float32 [C, H, W] in the numbers of the file, with `channels` of them. Raises InputError if they cannot be decoded."""
    values = read_dicom(seen.path) if seen.path.name.lower().endswith(DICOM) else _stored(seen)
    if channels == 1 and len(values) == 3:
        values = gray_of(values[None])[0]
    return values[:channels]


def _stored(seen: Seen) -> np.ndarray:
    look = look_at(seen.path)
    values: np.ndarray = values_of(look)[0]
    if seen.white is None:
        return values
    if values.max() > 1 + ROUNDING or values.min() < -ROUNDING:
        raise InputError(f"{seen.path}: whole numbers from {values.min() * seen.white:g} to {values.max() * seen.white:g}, and a picture has 8 or 16 bits; save it so, or as NIfTI")
    return values * np.float32(seen.white)


def read_mask(path: Path) -> np.ndarray:
    """bool [H, W], true inside. Raises InputError unless there are at most two values, and one of two is 0."""
    look = look_at(path)
    stored = stored_pixels(path) if suffix_of(path.name) in PICTURES else values_of(look)[0, 0]
    inside = np.asarray(stored.any(axis=2) if stored.ndim == 3 else stored != 0)
    found = stored[inside]
    if len(found) and not (found == found[0]).all():
        values = np.unique(found, axis=0)
        if stored.ndim == 3 and not (stored == stored[..., :1]).all():
            raise InputError(f"{path}: a mask in {len(values) + (not inside.all())} colours; a mask is of one class: black, and one other colour; save a file per class")
        shown = ", ".join(f"{value:g}" for value in np.unique(found)[:3])
        raise InputError(f"{path}: no mask of one class: {len(values)} values beside 0, such as {shown}; a mask holds 0 and one other, save a file per class, without smooth edges")
    return inside
