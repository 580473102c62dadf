"""One cardiac image with contours into the slice cache: on its canvas, as it was acquired, and the edges of its anatomy. Called by build.py."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medgen import files
from medgen.cardiac.dicom import Header, Map
from medgen.cardiac.map_type import PLAUSIBLE_MS, UNIT
from medgen.cardiac.rasterise import LABELS, MYOCARDIUM
from medgen.cardiac.tree import Entry
from medgen.data import index
from medgen.data.array_files import ArrayFile
from medgen.data.index import MASK, Source
from medgen.data.maps import (
    EDGES,
    HEART_MARGIN_PIXELS,
    NATIVES,
    PIXELS,
    Canvas,
    Native,
    NativeMaps,
    canvas_of,
    edges_of,
    heart_of,
    resample,
)
from medgen.errors import InputError
from medgen.spec_data import DataSpec

if TYPE_CHECKING:
    import pandas

AFFINES = "affines"
SIZE_STEP = 16  # sizes of images are told in steps that networks can halve
ARRAYS: dict[str, tuple[tuple[int, ...], type]] = {PIXELS: ((), np.float32), EDGES: ((6,), np.float64)}
NATIVE = "native"  # of a row while the cache is built: where its image lies in the arrays above
LEAST_SHARE = 0.05  # of a window that muscle should reach; T2 of 50 ms reaches a quarter of the default one
USUAL_THICKNESS_MM = 8.0  # where a file does not tell the thickness of its slice
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
FLAT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # orientation of an image that tells none: rows run to posterior, columns to the patient's left


def add_image(data: DataSpec, number: int, source: Source, entry: Entry, arrays: dict[str, ArrayFile]) -> dict[str, Any]:
    """Append one image to the arrays and return its row. Raises InputError if it cannot be what its contours and its unit say."""
    image, anatomy = entry.load(), entry.anatomy()
    window = _window(data, source, image)
    labels = anatomy.labels(entry.grid())
    _require_plausible(source, image, labels, window)
    edges = edges_of(anatomy)
    native = Native((image.rows, image.columns), image.spacing_mm, arrays[PIXELS].count, (arrays[EDGES].count, arrays[EDGES].count + len(edges)), window, heart_of(anatomy))
    canvas = canvas_of(native, native.spacing_mm, data.size)
    low, high = window
    scaled = np.clip((resample(image.pixels, native.grid, canvas) - low) / (high - low), 0, 1) * canvas.valid()
    on_canvas = anatomy.labels(canvas.grid)
    affine = affine_of(image, canvas)
    blocks = {"image": scaled[None], MASK: on_canvas[None], AFFINES: affine[None], PIXELS: image.pixels.ravel(), EDGES: edges}
    for name, block in blocks.items():
        arrays[name].append(block)
    return {
        "id": source.id, "patient": source.patient, "split": source.split, "slice": image.frame, "label": source.label, "caption": None,
        "level": image.region, "unit": image.unit, "mask_pixels": int((on_canvas > 0).sum()), "content": 1.0,
        "spacing_x_mm": native.spacing_mm[1], "spacing_y_mm": native.spacing_mm[0], "thickness_mm": image.slice_thickness_mm or USUAL_THICKNESS_MM,
        "window_low_image": float(low), "window_high_image": float(high), **_means(image, labels), "source": number, NATIVE: asdict(native),
    }  # fmt: skip


def write_natives(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Take what is needed to find the images again out of the rows, into a file of its own."""
    files.write_json(folder / NATIVES, [row.pop(NATIVE) for row in rows])


def read_natives(folder: Path) -> list[Native]:
    return [
        Native(tuple(record["shape"]), tuple(record["spacing_mm"]), record["first_pixel"], tuple(record["edges"]), tuple(record["window"]), tuple(record["heart"]))
        for record in files.read_json(folder / NATIVES)
    ]


def cut_hearts(maps: NativeMaps) -> list[str]:
    """A note if hearts are larger than the canvas at their own spacing: what is measured of them is measured of a part."""
    sides = [max(bottom - top, right - left) for top, bottom, left, right in (native.heart for native in maps.natives)]
    cut = sum(side > maps.size for side in sides)
    if not cut:
        return []
    enough = math.ceil((max(sides) + 2 * HEART_MARGIN_PIXELS) / SIZE_STEP) * SIZE_STEP
    return [f"{cut} of {len(sides)} hearts are larger than data.size: {maps.size} pixels, and are cut; data.size: {enough} holds them all"]


def dark_blood(rows: pandas.DataFrame) -> list[str]:
    """A note on images whose left ventricle is not brighter than its myocardium: without contrast agent that is a contour in another place."""
    dark = rows[rows["mean_left_ventricle"].astype(float) <= rows["mean_myocardium"].astype(float)]
    if not len(dark):
        return []
    named = ", ".join(dark["id"][: index.SHOWN])
    return [f"in {len(dark)} images blood is no brighter than muscle ({named}{' ...' if len(dark) > index.SHOWN else ''}): are their contours where the heart is? after contrast agent T1 can be so"]


def dull_windows(rows: pandas.DataFrame) -> list[str]:
    """A note on types whose window is so wide that muscle is all but black: nothing could be told apart there, nor written in whole ms."""
    told = []
    for kind, own in rows[rows["unit"] == UNIT["T1"]].groupby("label"):
        low, high = own["window_low_image"].iloc[0], own["window_high_image"].iloc[0]
        share = float(((own["mean_myocardium"].astype(float) - low) / (high - low)).median())
        if share < LEAST_SHARE:
            told.append(f"the window of {kind}, {low:g} to {high:g} ms, is so wide that its myocardium lies at {share:.2%} of it, all but black; write a narrower data.windows_ms")
    return told


def affine_of(header: Header, canvas: Canvas) -> np.ndarray:
    """4 x 4, (row, column, 0) of the canvas to the patient's mm, RAS. DICOM says LPS; an image that tells no place lies at 0, flat."""
    orientation = np.array(header.orientation or FLAT)
    along_columns, along_rows = orientation[:3], orientation[3:]  # in which the columns count up, and the rows
    step, first_mm = canvas.grid.spacing_mm, canvas.grid.origin_mm
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = along_rows * step[0], along_columns * step[1]
    affine[:3, 2] = np.cross(along_columns, along_rows) * (header.slice_thickness_mm or USUAL_THICKNESS_MM)
    affine[:3, 3] = np.array(header.position_mm or (0.0, 0.0, 0.0)) + along_rows * first_mm[0] + along_columns * first_mm[1]
    affine[:3] = LPS_TO_RAS @ affine[:3]
    return affine


def _window(data: DataSpec, source: Source, image: Map) -> tuple[float, float]:
    if image.type != "cine":
        return data.windows_ms[image.type]
    assert data.window.percentiles is not None, "the spec wants percentiles of cine frames"
    low, high = (float(value) for value in np.percentile(image.pixels[image.pixels != 0], data.window.percentiles)) if image.pixels.any() else (0.0, 0.0)
    if not low < high:
        raise InputError(f"patient {source.patient}: {image.source}: all its pixels are {low:g}; leave the image out")
    return low, high


def _require_plausible(source: Source, image: Map, labels: np.ndarray, window: tuple[float, float]) -> None:
    """A map in another unit would be all white or all black, and teach that hearts can be so."""
    muscle = image.pixels[labels == MYOCARDIUM]
    if image.type == "cine" or not len(muscle):
        return
    middle, (low, high) = float(np.median(muscle)), PLAUSIBLE_MS[image.type]
    told = f"patient {source.patient}: {image.source}: the median {image.type} of the myocardium is {middle:.4g} ms (unit by {image.unit_from})"
    if not low < middle < high:
        raise InputError(f"{told}, and no heart has less than {low:g} or more than {high:g}; write its ms_per_value into a manifest, or leave the image out")
    if not window[0] < middle < window[1]:
        raise InputError(f"{told}, outside the window {list(window)}; write another data.windows_ms")


def _means(image: Map, labels: np.ndarray) -> dict[str, float | None]:
    """Of each region that has pixels, in the unit of the image."""
    found = {}
    for number, name in enumerate(LABELS):
        inside = image.pixels[labels == number]
        if number:
            found[f"mean_{name}"] = float(inside.mean()) if len(inside) else None
    return found
