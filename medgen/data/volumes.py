"""One image file as a checked volume in RAS order, and the geometry of its display slices; called by store.py, index.py.

Orientation: files are turned to the closest right-anterior-superior order, so `axis` 0, 1, 2 is sagittal, coronal, axial
whatever the scanner stored. A display slice then shows DICOM's usual view: the patient's left on the right side of
axial and coronal images, anterior (or superior) on top; no slice is ever interpolated by this, only flipped."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medgen.data.image_files import read_slice
from medgen.errors import InputError

if TYPE_CHECKING:
    import nibabel

AFFINE_TOLERANCE_MM = 1e-2  # rounding of headers by common tools, far below a voxel
FLAT_SUFFIXES = (".png", ".npy")


@dataclass(frozen=True)
class Header:
    """Shape (3 numbers, RAS order) and affine of a file, without its voxels."""

    path: Path
    shape: tuple[int, ...]
    affine: np.ndarray

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        return tuple(float(step) for step in np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0)))

    def slice_axis(self, wanted: int) -> int:
        """`wanted`, or the axis of length 1 of a file that holds a single slice."""
        flat = [axis for axis, count in enumerate(self.shape) if count == 1]
        return flat[0] if len(flat) == 1 else wanted


def read_header(path: Path) -> Header:
    """Raises InputError if the file is missing, unreadable, not 2-D or 3-D, or has an impossible affine."""
    if path.suffix in FLAT_SUFFIXES:
        image = _flat_image(path)
    else:
        image = _open(path)
    return Header(path, tuple(int(count) for count in image.shape), np.asarray(image.affine, dtype=np.float64))


def read_volume(path: Path) -> np.ndarray:
    """The voxels as float32 in RAS order. Raises InputError if they cannot be read or are not all finite numbers."""
    image = _flat_image(path) if path.suffix in FLAT_SUFFIXES else _open(path)
    try:
        volume = np.asarray(image.dataobj, dtype=np.float32)
    except (OSError, EOFError, zlib.error, ValueError, TypeError) as error:
        raise InputError(f"{path}: the voxels cannot be read ({error}); is the file cut short? copy it again") from None
    broken = volume.size - int(np.isfinite(volume).sum())
    if broken:
        raise InputError(f"{path}: {broken} of {volume.size} voxels are NaN or infinite; replace them, for example by 0")
    return volume


def _open(path: Path) -> nibabel.Nifti1Image:
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        image: Any = nibabel.load(path)
        image = nibabel.squeeze_image(image) if image.ndim > 3 else image
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path}: not a readable NIfTI file ({error})") from None
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise InputError(f"{path}: expected a 3-D volume or a single slice, got shape {tuple(image.shape)}; save one time point or channel per file")
    if image.get_data_dtype().fields is not None or image.get_data_dtype().kind == "c":
        raise InputError(f"{path}: expected one number per voxel, got {image.get_data_dtype()}; convert it to grey values")
    _check_affine(path, image.affine)
    if image.ndim == 2:
        image = nibabel.Nifti1Image(np.asarray(image.dataobj)[:, :, None], image.affine, image.header)
    return nibabel.as_closest_canonical(image)


def _flat_image(path: Path) -> nibabel.Nifti1Image:
    """A PNG or npy slice as a NIfTI image whose display slice is the picture itself."""
    import nibabel

    if not path.exists():
        raise InputError(f"{path}: no such file")
    image = read_slice(path)
    return nibabel.as_closest_canonical(nibabel.Nifti1Image(image.array.astype(np.float32)[:, :, None], image.affine))


def _check_affine(path: Path, affine: np.ndarray) -> None:
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputError(f"{path}: the affine in the header is not usable (voxel size 0 or NaN); repair the header")


def display_slices(volume: np.ndarray, axis: int) -> np.ndarray:
    """A RAS volume as [n, H, W]: slice k, top row first. A view, nothing is copied."""
    return np.moveaxis(volume, axis, 0)[:, ::-1, ::-1].swapaxes(1, 2)


def slice_affine(header: Header, axis: int, number: int, size: int) -> np.ndarray:
    """4x4 float64: (row, column, 0) of slice `number`, after padding and resizing to `size`, to patient mm (RAS)."""
    column_axis, row_axis = (other for other in range(3) if other != axis)
    height, width = header.shape[row_axis], header.shape[column_axis]
    side = max(height, width)
    scale = side / size
    to_voxel = np.zeros((4, 4))
    for display, (voxel_axis, count) in enumerate(((row_axis, height), (column_axis, width))):
        # pixel centre p of the result lies at (p + 0.5) * scale - 0.5 of the padded square; display runs backwards
        to_voxel[voxel_axis, display] = -scale
        to_voxel[voxel_axis, 3] = count - 1 - (0.5 * scale - 0.5 - (side - count) // 2)
    to_voxel[axis, 2] = 1.0
    to_voxel[axis, 3] = number
    to_voxel[3, 3] = 1.0
    return header.affine @ to_voxel


def require_same_grid(owner: str, first: Header, others: list[Header]) -> None:
    """Raises InputError unless all files of one patient have the shape and affine of the first."""
    for other in others:
        if other.shape != first.shape:
            raise InputError(
                f"{owner}: {other.path} has shape {other.shape}, but {first.path} has {first.shape}; "
                "resample them to one grid"
            )
        if not np.allclose(other.affine, first.affine, atol=AFFINE_TOLERANCE_MM):
            worst = float(np.abs(other.affine - first.affine).max())
            raise InputError(
                f"{owner}: {other.path} and {first.path} have different affines (up to {worst:.3g} mm); "
                "resample them to one grid or correct the header"
            )
