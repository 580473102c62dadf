"""A folder of labelled slices at many sizes, `Real{256..4}x{..}.nii.gz` and `labels.csv`, read and checked; no torch, no pandas.

Written by medgen/prepare/stack.py or by the PACGAN reference system; read by whoever trains on or scores such a folder. A file holds
[W, H, C, N], or [W, H, N] with one channel; row i of labels.csv is slice i."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medgen import csv_files, files
from medgen.errors import InputError

if TYPE_CHECKING:
    import nibabel

LABELS, CLASSES = "labels.csv", "classes.json"
COLUMNS = {"the position in the stack": "ID", "the class": "Label", "the subject": "Subject_ID"}
SMALLEST = 4
ROUNDING = 1e-5  # how far float arithmetic may step over -1 and 1
WHOLE = re.compile(r"\d{1,9}")
STACK_NAME = re.compile(r"Real(\d{1,5})x(\d{1,5})\.nii(\.gz)?")
SHOWN = 5


@dataclass(frozen=True)
class Stack:
    """One side of a data set. Entry i of `labels` and `subjects` belongs to slice i of every size."""

    folder: Path
    files: dict[int, Path]  # by size, the smallest first
    channels: int
    labels: np.ndarray  # int64 [n], from 0 on
    subjects: tuple[str, ...]
    class_names: tuple[str, ...]  # by label

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.files)

    def images(self, size: int) -> np.ndarray:
        """All slices as float32 [n, c, h, w] with values in [-1, 1]. Raises InputError naming the slice whose values are not."""
        if size not in self.files:
            raise InputError(f"{self.folder}: no slices of {size} px; the sizes there are: {', '.join(str(number) for number in self.files)}")
        return read_images(self.files[size], self.subjects)


def read_images(path: Path, subjects: Sequence[str] = ()) -> np.ndarray:
    """All slices of a file as float32 [n, c, h, w] with values in [-1, 1]. Raises InputError naming the slice whose values are not.

    `subjects`: of each slice where they are known, for that message."""
    shape = _shape(path)
    try:
        stored = np.asarray(_open(path).dataobj, dtype=np.float32)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path}: the voxels cannot be read ({error}); is the file cut short? copy it again") from None
    images = stored.reshape(shape, order="F").transpose(3, 2, 1, 0)
    outside = ~(np.abs(images) <= 1 + ROUNDING).all(axis=(1, 2, 3))  # a NaN is outside too
    if outside.any():
        first = int(np.argmax(outside))
        whose = f" (subject {subjects[first]})" if subjects else ""
        others = f", as do {int(outside.sum()) - 1} others" if outside.sum() > 1 else ""
        raise InputError(
            f"{path}: slice {first}{whose} holds values from {images[first].min():g} to {images[first].max():g}{others}; "
            "allowed is -1 to 1: scale each slice as (x - m/2) / (m/2) with its maximum m"
        )
    return images


def open_stack(folder: Path) -> Stack:
    """Checks everything but the values of the slices. Raises InputError naming the file and the line or size that does not fit."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the one that holds {LABELS} and Real4x4.nii.gz, Real8x8.nii.gz and so on")
    by_size = _files_by_size(folder)
    labels, subjects = read_labels(folder / LABELS)
    channels = _check_shapes(by_size, len(labels), folder / LABELS)
    return Stack(folder, by_size, channels, labels, subjects, _class_names(folder, labels))


def _files_by_size(folder: Path) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        named = STACK_NAME.fullmatch(path.name)
        if named is None:
            continue
        if named[1] != named[2]:
            raise InputError(f"{path}: slices must be square, such as Real64x64.nii.gz; pad them")
        if int(named[1]) in found:
            raise InputError(f"{path}: {found[int(named[1])].name} is there as well; keep one of them")
        found[int(named[1])] = path
    if not found:
        raise InputError(f"{folder}: no file Real4x4.nii.gz, Real8x8.nii.gz or larger; medgen prepare stack writes them")
    largest = max(found)
    wanted = [SMALLEST * 2**step for step in range(largest.bit_length()) if SMALLEST * 2**step <= largest]
    missing = [size for size in wanted if size not in found]
    if missing or set(found) != set(wanted):
        raise InputError(
            f"{folder}: the sizes there are {', '.join(str(size) for size in sorted(found))}; training grows through all of 4, 8, 16 ... "
            f"to the largest: {_difference(missing, found, wanted)}"
        )
    return {size: found[size] for size in wanted}


def _difference(missing: Sequence[int], found: dict[int, Path], wanted: Sequence[int]) -> str:
    lacking = ", ".join(f"Real{size}x{size}.nii.gz" for size in missing)
    odd = ", ".join(path.name for size, path in sorted(found.items()) if size not in wanted)
    return "; ".join(part for part in (f"add {lacking}" if lacking else "", f"remove {odd}" if odd else "") if part)


def _open(path: Path) -> nibabel.Nifti1Image:
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        image: Any = nibabel.load(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path}: not a readable NIfTI file ({error})") from None
    if image.get_data_dtype().fields is not None or image.get_data_dtype().kind == "c":
        raise InputError(f"{path}: expected one number per voxel, got {image.get_data_dtype()}; keep colours in the third axis [W, H, 3, N]")
    return image


def _four_axes(path: Path, image: nibabel.Nifti1Image) -> nibabel.Nifti1Image:
    if image.ndim not in (3, 4):
        raise InputError(f"{path}: has shape {tuple(image.shape)}; expected [W, H, channels, slices] or [W, H, slices]")
    return image


def _shape(path: Path) -> tuple[int, int, int, int]:
    """Width, height, channels, slices."""
    shape = tuple(int(count) for count in _four_axes(path, _open(path)).shape)
    return (shape[0], shape[1], 1, shape[2]) if len(shape) == 3 else (shape[0], shape[1], shape[2], shape[3])


def _check_shapes(by_size: dict[int, Path], rows: int, labels: Path) -> int:
    """The number of channels, the same in all files; every file has as many slices as labels.csv has rows."""
    largest = max(by_size)
    channels, slices = _shape(by_size[largest])[2:]
    for size, path in by_size.items():
        shape = _shape(path)
        if shape[:2] != (size, size):
            raise InputError(f"{path}: holds slices of {shape[0]} x {shape[1]} px; its name says {size} x {size}")
        if shape[3] != slices:
            raise InputError(f"{path}: holds {shape[3]} slices, but {by_size[largest].name} holds {slices}; make both from the same images")
        if shape[2] != channels:
            raise InputError(f"{path}: has {shape[2]} channels, but {by_size[largest].name} has {channels}; make both from the same images")
    if channels not in (1, 3):
        raise InputError(f"{by_size[largest]}: has {channels} channels; allowed are 1 (grey) and 3 (colour)")
    if rows != slices:
        raise InputError(f"{labels}: has {rows} rows for the {slices} slices of {by_size[largest].name}; every slice needs one row, in the same order")
    return channels


def read_labels(path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Label and subject of every slice, in the order of the slices. Raises InputError naming the line that is wrong."""
    lines = csv_files.read_rows(path)
    csv_files.require_columns(path, list(lines[0][1]), COLUMNS)
    seen: dict[int, int] = {}
    labels, subjects = [], []
    for position, (line, row) in enumerate(lines):
        identifier = _whole(path, line, "ID", row["ID"])
        if seen.setdefault(identifier, line) != line:
            raise InputError(f"{path}:{line}: ID {identifier} stands in line {seen[identifier]} already; every slice has one row")
        if identifier != position:
            raise InputError(f"{path}:{line}: ID is {identifier}, expected {position}: rows are taken by position, so IDs run 0, 1, 2 ...; "
                             "put the rows into the order of the slices")  # fmt: skip
        labels.append(_whole(path, line, "Label", row["Label"]))
        subjects.append(row["Subject_ID"].strip())
        if not subjects[-1]:
            raise InputError(f"{path}:{line}: Subject_ID is empty; without it a subject could be in training and in validation; give every slice its subject")
    return np.array(labels, np.int64), tuple(subjects)


def _whole(path: Path, line: int, column: str, text: str) -> int:
    if not text.strip():
        raise InputError(f"{path}:{line}: {column} is empty; write a whole number from 0 on")
    if not WHOLE.fullmatch(text.strip()):
        raise InputError(f"{path}:{line}: {column} is {text!r}; write a whole number from 0 on, without a point")
    return int(text)


def _class_names(folder: Path, labels: np.ndarray) -> tuple[str, ...]:
    """From classes.json (name: label); without it the labels themselves, which then may have no gap."""
    path = folder / CLASSES
    count = int(labels.max()) + 1
    if path.exists():
        return named_classes(path, count)
    absent = sorted(set(range(min(count, len(labels) + 1))) - set(labels.tolist()))
    if absent:
        raise InputError(f"{folder / LABELS}: no slice has the Label {absent[0]}, but there is a Label {count - 1}; number the classes 0, 1, 2 ..., "
                         f"or name them all in {CLASSES}, such as {{\"CN\": 0, \"AD\": 1}}")  # fmt: skip
    return tuple(str(number) for number in range(count))


def named_classes(path: Path, count: int) -> tuple[str, ...]:
    """Of a classes.json, by label. Raises InputError unless it names at least `count`."""
    try:
        named = {str(name): number for name, number in files.read_json(path).items()}
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a JSON object of class names and labels ({error}), such as {{\"CN\": 0, \"AD\": 1}}") from None
    if [number for number in named.values() if type(number) is not int] or sorted(named.values()) != list(range(len(named))):
        raise InputError(f"{path}: the labels are {list(named.values())}; number the classes 0, 1, 2 ...")
    if len(named) < count:
        raise InputError(f"{path}: names {len(named)} classes, but {LABELS} has the Label {count - 1}; name them all")
    return tuple(sorted(named, key=lambda name: named[name]))


# what training asks of a stack besides


def require_subjects_of_every_class(stack: Stack, fewest: int) -> None:
    """Raises InputError unless every class has that many subjects: two are needed to have one in training and one in validation."""
    for label, name in enumerate(stack.class_names):
        subjects = {subject for subject, own in zip(stack.subjects, stack.labels, strict=True) if own == label}
        if len(subjects) < fewest:
            shown = f" ({next(iter(subjects))})" if len(subjects) == 1 else ""
            raise InputError(f"{stack.folder / LABELS}: the class {name} has {len(subjects)} subject{'' if len(subjects) == 1 else 's'}{shown}; "
                             f"{fewest} are needed to keep training and validation apart by subject; add some or leave the class out")  # fmt: skip


def require_disjoint(first: Stack, second: Stack) -> None:
    """Raises InputError if a subject is on both sides."""
    shared = sorted(set(first.subjects) & set(second.subjects))
    if not shared:
        return
    listed = ", ".join(shared[:SHOWN]) + (f" and {len(shared) - SHOWN} more" if len(shared) > SHOWN else "")
    one, other = (f"slice {stack.subjects.index(shared[0])} of {stack.folder}" for stack in (first, second))
    raise InputError(f"{first.folder} and {second.folder}: {len(shared)} subject(s) are on both sides: {listed} ({shared[0]} is {one} and {other}); "
                     "the result would be too good: keep each subject on one side")  # fmt: skip
