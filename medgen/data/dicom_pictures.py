"""A DICOM file of one frame as a picture: photographs in colour, grey values by their rescale, more is brighter. Called by jsonl_images.py.

Cardiac maps, whose values are times, are read by cardiac/dicom.py, which also gives what holds for any DICOM file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medgen.cardiac.dicom import damage_told, frames_of, open_dataset, package_for, require_decoder
from medgen.errors import InputError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

SPACINGS = ("PixelSpacing", "ImagerPixelSpacing")  # in the patient; at the detector
IN_COLOUR = ("RGB", "YBR")


@dataclass(frozen=True)
class DicomLook:
    """What the header tells. `spacing_mm`: between rows, between columns; None where the file does not say."""

    rows: int
    columns: int
    channels: int
    spacing_mm: tuple[float, float] | None


def look_at_dicom(path: Path) -> DicomLook:
    """Raises InputError unless the file is one frame that can be decoded here."""
    with damage_told(path):
        dataset = open_dataset(path, pixels=False)
        return _look(path, dataset)


def read_dicom(path: Path) -> np.ndarray:
    """float32 [C, H, W]: of colours 0 to 255, of grey values what their rescale makes of them. Raises InputError if they cannot be decoded."""
    with damage_told(path):
        dataset = open_dataset(path, pixels=True)
        look = _look(path, dataset)
        stored = _stored(path, dataset)
        if stored.shape[:2] != (look.rows, look.columns):
            raise InputError(f"{path}: the pixels have shape {stored.shape}, expected {look.rows} rows and {look.columns} columns")
        return np.moveaxis(stored, 2, 0).astype(np.float32) if look.channels == 3 else _grey(path, dataset, stored)[None]


def _look(path: Path, dataset: Dataset) -> DicomLook:
    require_decoder(path, dataset)
    frames = frames_of(path, dataset)
    if frames > 1:
        raise InputError(f"{path}: {frames} frames in one file; save one frame a file")
    photometric = str(dataset.get("PhotometricInterpretation") or "MONOCHROME2")
    if not photometric.startswith(("MONOCHROME", *IN_COLOUR)):
        raise InputError(f"{path}: pixels of the kind {photometric}; save it as grey values (MONOCHROME) or in colour (RGB)")
    channels = 3 if photometric.startswith(IN_COLOUR) else 1
    if channels == 3 and int(dataset.get("BitsAllocated", 8)) != 8:
        raise InputError(f"{path}: colours of {dataset.BitsAllocated} bits; 8 are known")
    return DicomLook(int(dataset.Rows), int(dataset.Columns), channels, _spacing(dataset))


def _spacing(dataset: Dataset) -> tuple[float, float] | None:
    for keyword in SPACINGS:
        found = dataset.get(keyword)
        if found is not None and len(found) == 2 and all(0 < float(step) < 1e3 for step in found):
            return float(found[0]), float(found[1])
    return None


def _stored(path: Path, dataset: Dataset) -> np.ndarray:
    from pydicom.pixels import pixel_array

    if not any(keyword in dataset for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise InputError(f"{path}: the file has no pixels; copy it again")
    try:
        return np.asarray(pixel_array(dataset))
    except Exception as error:  # a damaged stream ends in whatever its decoder raises
        syntax = dataset.file_meta.TransferSyntaxUID
        install = f", or pip install pylibjpeg {package_for(syntax.name)} for {syntax.name}" if syntax.is_compressed else ""
        raise InputError(f"{path}: the pixels cannot be decoded ({error}); is the file cut short? copy it again{install}") from None


def _grey(path: Path, dataset: Dataset, stored: np.ndarray) -> np.ndarray:
    """[H, W] in the unit of the rescale. MONOCHROME1, where more is darker, is turned; declared padding becomes the least value of the others."""
    values = stored.astype(np.float64)
    if not np.isfinite(values).all():
        raise InputError(f"{path}: {int((~np.isfinite(values)).sum())} pixels are no numbers (NaN or infinite); save the file again")
    padding = _padding(dataset, values)
    if str(dataset.get("PhotometricInterpretation")) == "MONOCHROME1":
        values = (2 ** int(dataset.BitsStored) - 1 if dataset.PixelRepresentation == 0 else -1) - values
    scaled = values * float(dataset.get("RescaleSlope", 1) or 1) + float(dataset.get("RescaleIntercept", 0) or 0)
    if padding.any() and not padding.all():
        scaled[padding] = scaled[~padding].min()
    return scaled.astype(np.float32)


def _padding(dataset: Dataset, values: np.ndarray) -> np.ndarray:
    """bool [H, W], true where the file says that there is no image."""
    first = dataset.get("PixelPaddingValue")
    if first is None:
        return np.zeros(values.shape, bool)
    last = dataset.get("PixelPaddingRangeLimit")
    low, high = sorted((float(first), float(first if last is None else last)))
    return (values >= low) & (values <= high)
