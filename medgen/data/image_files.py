"""One 2-D image or mask in one file, NIfTI, PNG or npy by suffix; called by generate, collect, evaluate and volumes.py.

The bytes depend on nothing but the content, so equal images are equal files."""

from __future__ import annotations

import gzip
import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medgen import files
from medgen.errors import InputError, MedgenError

SUFFIXES = (".nii.gz", ".png", ".npy")
Kind = Literal["image", "mask", "labels"]
MOST_LABEL = 255
STEPS = 65535  # images are stored as 16-bit integers: a step is 1.5e-5 of the range
# rows run to posterior and columns to the patient's left, 1 mm apart: the picture is its own display
FLAT_AFFINE = np.array([[0.0, -1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


@dataclass(frozen=True)
class SliceFile:
    """`array` [H, W]: float32 in [0, 1] for images, uint8 for masks and labels. PNG and npy carry no spacing: it is 1 mm there."""

    array: np.ndarray
    spacing_mm: tuple[float, float]  # between rows, between columns
    affine: np.ndarray  # (row, column, 0) to patient mm


def suffix_of(path: Path) -> str:
    """`.nii.gz`, `.png` or `.npy`. Raises InputError for anything else."""
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return suffix
    raise InputError(f"{path}: unknown image format; the formats are: {', '.join(SUFFIXES)}")


def write_slice(path: Path, array: np.ndarray, kind: Kind, affine: np.ndarray) -> None:
    """Write [H, W] float in [0, 1] (kind image), 0/1 (kind mask), or the number of each pixel's region (kind labels); `affine` maps (row, column, 0) to patient mm.

    Images keep 16 bits in NIfTI and PNG and float32 in npy; masks are 0/1, in PNG 0/255; labels are whole numbers from 0 to 255, in NIfTI and npy.
    Raises MedgenError if values are out of range or not finite, or for labels in PNG: such a file would be read back as something else."""
    _check(path, array, kind)
    suffix = suffix_of(path)
    if suffix == ".nii.gz":
        content = _nifti_bytes(array, kind, affine)
    elif suffix == ".png":
        content = _png_bytes(array, kind)
    else:
        content = _npy_bytes(array, kind)
    files.write_bytes(path, content)


def _check(path: Path, array: np.ndarray, kind: str) -> None:
    if array.ndim != 2:
        raise MedgenError(f"{path}: expected [H, W], got shape {array.shape}")
    if kind == "mask" and not np.isin(array, (0, 1)).all():
        raise MedgenError(f"{path}: a mask holds 0 and 1 only, got values from {array.min()} to {array.max()}")
    if kind == "labels" and not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= MOST_LABEL and (array == np.rint(array)).all()):
        raise MedgenError(f"{path}: labels are whole numbers from 0 to {MOST_LABEL}, got values from {array.min()} to {array.max()}")
    if kind == "labels" and suffix_of(path) == ".png":
        raise MedgenError(f"{path}: a PNG mask holds 0 and 255 only, so it cannot say which region a pixel is in; write NIfTI or npy")
    if kind == "image" and not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
        raise MedgenError(f"{path}: an image lies in [0, 1], got {array.min()} to {array.max()}")


def _as_steps(array: np.ndarray) -> np.ndarray:
    return np.rint(array.astype(np.float64) * STEPS).astype(np.uint16)


def _nifti_bytes(array: np.ndarray, kind: str, affine: np.ndarray) -> bytes:
    return nifti_bytes(_as_steps(array), affine, 1 / STEPS) if kind == "image" else nifti_bytes(array.astype(np.uint8), affine)


def nifti_bytes(stored: np.ndarray, affine: np.ndarray, slope: float | None = None, description: str = "") -> bytes:
    """A compressed NIfTI file of uint8 or uint16 [H, W]. `slope`: what a stored 1 is; `description`: at most 79 letters of ASCII."""
    import nibabel

    image = nibabel.Nifti1Image(stored[:, :, None], affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description
    if slope is not None:
        image.header.set_slope_inter(slope, 0)
    header = image.header.copy()
    raw = io.BytesIO()
    # written by hand: nibabel recomputes the slope when it saves an array
    header["magic"] = b"n+1"
    header.set_data_offset(352)
    raw.write(header.binaryblock)
    raw.write(b"\0" * (352 - len(header.binaryblock)))
    raw.write(stored.tobytes(order="F"))
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, compresslevel=6, mtime=0) as stream:
        stream.write(raw.getvalue())
    return packed.getvalue()


def _png_bytes(array: np.ndarray, kind: str) -> bytes:
    from PIL import Image

    stored = array.astype(np.uint8) * 255 if kind == "mask" else _as_steps(array)
    packed = io.BytesIO()
    Image.fromarray(stored).save(packed, format="PNG")
    return packed.getvalue()


def _npy_bytes(array: np.ndarray, kind: str) -> bytes:
    packed = io.BytesIO()
    np.save(packed, np.ascontiguousarray(array, dtype=np.float32 if kind == "image" else np.uint8))
    return packed.getvalue()


def read_slice(path: Path) -> SliceFile:
    """Read what write_slice wrote, or a comparable file. Raises InputError if it is missing, cut short or not 2-D."""
    readers = {".nii.gz": _read_nifti, ".png": _read_png, ".npy": _read_npy}
    reader = readers[suffix_of(path)]
    try:
        slice_file = reader(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error, ValueError, SyntaxError) as error:
        raise InputError(f"{path}: cannot be read ({error}); is the file cut short?") from None
    if slice_file.array.ndim != 2:
        raise InputError(f"{path}: expected one 2-D slice, got shape {slice_file.array.shape}")
    return slice_file


def _read_nifti(path: Path) -> SliceFile:
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    try:
        image: Any = nibabel.load(path)
    except ImageFileError as error:
        raise ValueError(error) from None
    is_labels = image.get_data_dtype() == np.uint8  # a mask is labels 0 and 1
    array = np.asarray(image.dataobj, dtype=np.uint8 if is_labels else np.float32)
    array = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    spacing = np.sqrt((image.affine[:3, :2] ** 2).sum(axis=0))
    return SliceFile(array, (float(spacing[0]), float(spacing[1])), np.asarray(image.affine))


def _read_png(path: Path) -> SliceFile:
    from PIL import Image

    with Image.open(path) as picture:
        if picture.mode not in ("L", "1", "I;16", "I;16B", "I"):
            raise ValueError(f"expected grey values, got a {picture.mode} picture")
        stored = np.asarray(picture)
    if stored.dtype == np.bool_ or (stored.dtype == np.uint8 and np.isin(stored, (0, 255)).all()):
        return SliceFile((stored > 0).astype(np.uint8), (1.0, 1.0), FLAT_AFFINE)
    steps = 255 if stored.dtype == np.uint8 else STEPS
    array = (stored.astype(np.float64) / steps).astype(np.float32)
    return SliceFile(array, (1.0, 1.0), FLAT_AFFINE)


def _read_npy(path: Path) -> SliceFile:
    array = np.load(path, allow_pickle=False)
    return SliceFile(array if array.dtype == np.uint8 else array.astype(np.float32), (1.0, 1.0), FLAT_AFFINE)
