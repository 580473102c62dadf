"""One image file of any kind: what its header tells, its values in [0, 1], its labels where it is a mask. Used by jsonl_images.py and evaluate/."""

from __future__ import annotations

import re
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medgen.data import image_files, stacks, volumes
from medgen.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
LOSSY = (".jpg", ".jpeg")
VOLUMES = (".nii", ".nii.gz")
SUFFIXES = (*PICTURES, *VOLUMES, ".npy")
CONTENT = 0.05  # smallest share of non-background pixels that a slice of a volume must have, as in the data of a job
ROUNDING = 1e-3  # stored images may leave [0,1] by the rounding of their file format
MOST_LABELS = 64  # of a mask; a picture has more grey values


@dataclass(frozen=True)
class Reading:
    """How files become images in [0, 1]. `size`: pixels per side to bring all to. `window`: what is black and white in NIfTI and npy."""

    size: int | None = None
    window: tuple[float, float] | None = None
    gray: bool = False  # colour pictures as gray ones
    patient: re.Pattern[str] | None = None  # its first group, in a file's path inside the folder, is the patient
    content: float = CONTENT  # smallest share of pixels above 0 that a slice of a volume must have; 0 for masks and pairs


@dataclass(frozen=True)
class Look:
    """What a header tells: `count` images of `channels` x `height` x `width`; 8 bits a value or finer."""

    path: Path
    count: int
    channels: int
    height: int
    width: int
    eight_bits: bool
    is_stack: bool = False
    is_volume: bool = False
    spacing_mm: tuple[float, float] | None = None  # between rows, between columns; pictures do not say


def suffix_of(name: str) -> str | None:
    """`.png`, `.nii.gz`, ...; None for anything else."""
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if name.lower().endswith(suffix)), None)


def stem_of(name: str) -> str:
    """A path without its suffix: what the two files of a pair share."""
    suffix = suffix_of(name)
    return name if suffix is None else name[: -len(suffix)]


def look_at(path: Path) -> Look:
    """The header of an image file. Raises InputError if it has none."""
    suffix = suffix_of(path.name)
    if suffix in VOLUMES:
        header = volumes.read_header(path)
        axis = header.slice_axis(2)
        width, height = (count for place, count in enumerate(header.shape) if place != axis)
        column_mm, row_mm = (step for place, step in enumerate(header.spacing_mm) if place != axis)
        return Look(path, header.shape[axis], 1, height, width, eight_bits=False, is_volume=header.shape[axis] > 1, spacing_mm=(row_mm, column_mm))
    if suffix == ".npy":
        shape = image_files.read_slice(path).array.shape
        return Look(path, 1, 1, shape[0], shape[1], eight_bits=False)
    picture = _picture(path)
    return Look(path, 1, 3 if picture.mode in ("RGB", "P") else 1, picture.height, picture.width, eight_bits=picture.mode in ("L", "RGB", "P", "1"))


def _picture(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large ones are refused by their size
            picture = Image.open(path)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable picture ({error})") from None
    pages = getattr(picture, "n_frames", 1)  # formats with a single page do not say
    if pages > 1:
        raise InputError(f"{path}: {pages} pages in one file; save one picture a file, or a NIfTI volume")
    if picture.mode not in ("L", "1", "RGB", "P", "I;16", "I;16B", "I"):
        raise InputError(f"{path}: a {picture.mode} picture; gray (8 or 16 bits) or RGB without transparency is known; save other numbers as npy or NIfTI")
    return picture


def values_of(look: Look) -> np.ndarray:
    """As stored, float32 [n, C, H, W]; pictures already in [0, 1]."""
    if look.is_stack:
        return (stacks.read_images(look.path) + 1) / 2
    suffix = suffix_of(look.path.name)
    if suffix in VOLUMES:
        volume = volumes.read_volume(look.path)
        return volumes.display_slices(volume, volumes.read_header(look.path).slice_axis(2))[:, None]
    if suffix == ".npy":
        return image_files.read_slice(look.path).array.astype(np.float32)[None, None]
    stored = stored_pixels(look.path)
    if stored.ndim == 3:
        stored = np.moveaxis(stored, 2, 0)
    scale = 1 if stored.dtype == np.bool_ else 255 if look.eight_bits else 65535
    return (stored.astype(np.float32) / np.float32(scale)).reshape(1, look.channels, look.height, look.width)


def gray_of(values: np.ndarray) -> np.ndarray:
    """[n, 3, H, W] as [n, 1, H, W]: brightness by ITU-R BT.601."""
    gray: np.ndarray = (values * np.array([0.299, 0.587, 0.114], np.float32)[None, :, None, None]).sum(axis=1, keepdims=True)
    return gray


def stored_pixels(path: Path) -> np.ndarray:
    """[H, W] or [H, W, 3] of a picture, in the numbers of the file. Raises InputError if they cannot be decoded."""
    picture = _picture(path)
    try:
        return np.asarray(picture.convert("RGB") if picture.mode == "P" else picture)
    except (OSError, SyntaxError, ValueError, zlib.error) as error:
        raise InputError(f"{path}: the pixels cannot be read ({error}); is the file cut short?") from None


def in_window(values: np.ndarray, look: Look, reading: Reading) -> np.ndarray:
    if not np.isfinite(values).all():
        raise InputError(f"{look.path}: {int((~np.isfinite(values)).sum())} values are NaN or infinite; replace them, for example by 0")
    is_picture = look.is_stack or suffix_of(look.path.name) in PICTURES
    if reading.window is not None and not is_picture:
        low, high = reading.window
        return np.clip((values - low) / (high - low), 0, 1).astype(np.float32)
    least, most = float(values.min()), float(values.max())
    if least < -ROUNDING or most > 1 + ROUNDING:
        raise InputError(f"{look.path}: values from {least:g} to {most:g}; say what is black and what is white, the same for both sides: --window LOW,HIGH")
    return np.clip(values, 0, 1)


def labels_of(look: Look) -> np.ndarray:
    """The labels of a mask, int32 [n, H, W]. Raises InputError if it is no mask."""
    if look.path.name.lower().endswith(LOSSY):
        raise InputError(f"{look.path}: a JPEG has no sharp labels; save masks as PNG or NIfTI")
    suffix = suffix_of(look.path.name)
    stored = stored_pixels(look.path)[None] if suffix in PICTURES else values_of(look)[:, 0]
    if stored.ndim == 4:
        if not (stored == stored[..., :1]).all():
            raise InputError(f"{look.path}: a mask in colour; one channel of labels is expected")
        stored = stored[..., 0]
    whole = np.isfinite(stored).all() and (stored == np.rint(stored)).all()
    if not whole or len(np.unique(stored)) > MOST_LABELS:
        raise InputError(f"{look.path}: not a mask: {len(np.unique(stored))} different values from {stored.min():g} to {stored.max():g}; a mask holds few whole numbers, 0 is background")
    return stored.astype(np.int32)
