"""One line of a JSONL file into the slice cache: its image in a black square, the region of each pixel by the shares that its masks cover. Called by build.py."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from medgen.data.array_files import ArrayFile
from medgen.data.image_files import FLAT_AFFINE
from medgen.data.index import MASK, Source
from medgen.data.jsonl_images import Seen, look_at_line, read_image, read_mask
from medgen.data.jsonl_lines import Line
from medgen.data.resize import resize_images, shares_of
from medgen.data.windows import window_of
from medgen.errors import InputError
from medgen.spec_data import DataSpec

if TYPE_CHECKING:
    import pandas

JSONL_VERSION = 1  # raise it when the same lines and spec would give other images or masks
AFFINES = "affines"
SHARE_ROUNDING = 1e-9  # of shares, which are sums; far below a pixel of any mask


def add_image(data: DataSpec, number: int, source: Source, line: Line, arrays: dict[str, ArrayFile]) -> dict[str, Any] | None:
    """Append one image to the arrays and return its row; None if its mask is empty and data.positive_only leaves it out.

    Raises InputError with all that is wrong with its files."""
    seen, problems = look_at_line(line, data)
    if seen is None or problems:
        raise InputError("; ".join(problems))
    values = read_image(seen, len(data.images))
    low, high = _window(data, seen, values)
    regions, overlap, lost = region_numbers(data, line)
    if data.positive_only and not regions.any():
        return None
    scaled = resize_images(np.clip((values - low) / (high - low), 0, 1), data.size)
    affine = affine_of(seen, data.size)
    for place, channel in enumerate(data.images):
        arrays[channel].append(scaled[place][None])
    if MASK in arrays:
        arrays[MASK].append(regions[None])
    arrays[AFFINES].append(affine[None])
    spacing_mm = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    windows = {f"window_{end}_{channel}": value for channel in data.images for end, value in (("low", low), ("high", high))}
    return {
        "id": source.id, "patient": source.patient, "split": source.split, "slice": 0, "label": source.label, "caption": source.caption,
        "mask_pixels": int((regions > 0).sum()) if MASK in arrays else None, "masked": source.has_mask, "masks_of": list(line.masks or {}),
        "overlap_pixels": overlap, "lost": lost, "content": 1.0,
        "spacing_x_mm": float(spacing_mm[1]), "spacing_y_mm": float(spacing_mm[0]), "thickness_mm": float(spacing_mm[2]), **windows, "source": number,
    }  # fmt: skip


def _window(data: DataSpec, seen: Seen, values: np.ndarray) -> tuple[float, float]:
    """What becomes 0 and 1: all that a picture can hold; of NIfTI and DICOM, whose values have no ends, data.window."""
    if seen.white is None:
        return window_of(str(seen.path), values, data.window)
    if values.min() == values.max():
        raise InputError(f"{seen.path}: every pixel is {values.flat[0]:g}; is it the image? remove the line, or give another file")
    return 0.0, float(seen.white)


def region_numbers(data: DataSpec, line: Line) -> tuple[np.ndarray, int, list[str]]:
    """uint8 [size, size]: the number of each pixel's class, 0 outside all. A class owns a pixel of which it covers data.mask_share.

    Where several do, the last of data.regions has it; also in how many pixels that is so, and the classes that a mask shows and no pixel is left of."""
    numbers, overlap, lost = np.zeros((data.size, data.size), np.uint8), 0, []
    for number, name in enumerate(data.region_names, 1):
        path = (line.masks or {}).get(name)
        if path is None:
            continue
        mask = read_mask(path)
        owned = shares_of(mask, data.size) >= data.mask_share - SHARE_ROUNDING
        overlap += int((owned & (numbers > 0)).sum())
        lost += [name] if mask.any() and not owned.any() else []
        numbers[owned] = number
    return numbers, overlap, lost


def affine_of(seen: Seen, size: int) -> np.ndarray:
    """4 x 4, (row, column, 0) of the square to mm as a flat picture has them: 1 mm a pixel of the file where it says nothing, in no place of a patient."""
    side = max(seen.height, seen.width)
    scale = side / size
    row_mm, column_mm = seen.spacing_mm or (1.0, 1.0)
    to_file = np.diag([scale * row_mm, scale * column_mm, 1.0, 1.0])
    for axis, (count, step_mm) in enumerate(((seen.height, row_mm), (seen.width, column_mm))):
        to_file[axis, 3] = (0.5 * scale - 0.5 - (side - count) // 2) * step_mm
    return np.asarray(FLAT_AFFINE @ to_file)


def notes(data: DataSpec, rows: pandas.DataFrame) -> list[str]:
    """What happened to masks on their way to the pixels that a model sees."""
    found = []
    overlapping = rows[rows["overlap_pixels"] > 0]
    if len(overlapping):
        found.append(f"in {len(overlapping)} images classes overlap: {int(overlapping['overlap_pixels'].sum()):,} pixels belong to the later one in data.regions, and no longer to an earlier one")
    lost = Counter(name for names in rows["lost"] for name in names)
    given = Counter(name for names in rows["masks_of"] for name in names)
    for name in data.region_names:
        if lost[name]:
            found.append(f"{lost[name]} of {given[name]} masks of {name} have no pixel left at {data.size} x {data.size}: none is covered to {data.mask_share:g} by it; write a lower data.mask_share, or a larger data.size")
    unmasked = int((~rows["masked"].astype(bool)).sum())
    if 0 < unmasked < len(rows):
        found.append(f"{unmasked} of {len(rows)} images have no mask: nothing is known of them, and their pixels count as background wherever masks are read")
    return found
