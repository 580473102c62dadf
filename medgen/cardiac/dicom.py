"""DICOM files to cardiac maps in their unit, with spacing, orientation and where every fact comes from; called by tree.py.

Stored values become ms by the first of these that the file or its user gives: the manifest's ms_per_value; a Real World Value Mapping;
RescaleSlope and RescaleIntercept; the rule of map_type.UNSCALED. What was used is in `unit_from`. pydicom is loaded by the functions.
What holds for any DICOM file, such as damage and compression, data/dicom_pictures.py uses too."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medgen.cardiac.map_type import UNIT, UNSCALED, MapType, Region, find_region, find_type
from medgen.errors import InputError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

IN_MS = {"ms": 1.0, "msec": 1.0, "s": 1000.0, "us": 0.001}  # UCUM codes of times
PACKAGE_FOR = {"JPEG 2000": "pylibjpeg-openjpeg", "JPEG-LS": "pylibjpeg-libjpeg", "JPEG": "pylibjpeg-libjpeg"}
MOST_FRAMES = 100_000
ROUNDED = 0.01  # how far directions may be from length 1 and a right angle
SQUARE = 0.01  # how far the two spacings that private tags give may differ, relatively


@dataclass(frozen=True)
class Told:
    """What the user says of a file and what its place says; None is for the file to say. `folders`: those below the root, the innermost first."""

    type: MapType | None = None
    ms_per_value: float | None = None
    region: Region | None = None
    folders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Header:
    """All about one frame but its pixels. Pairs are (row, column): spacing between rows first.

    `orientation` are the cosines of the directions in which the columns count up and then the rows (DICOM's order, patient LPS), `position_mm`
    the centre of the first pixel; None where the file has neither. `scale`: value in the unit = stored * slope + intercept."""

    source: Path
    frame: int  # from 0
    type: MapType
    type_from: str
    unit: str  # "ms", or "1" for cine
    unit_from: str
    scale: tuple[float, float]
    rows: int
    columns: int
    spacing_mm: tuple[float, float]
    spacing_from: str
    orientation: tuple[float, float, float, float, float, float] | None
    position_mm: tuple[float, float, float] | None
    slice_thickness_mm: float | None
    patient: str  # PatientID, "" where it was removed
    study_date: str  # YYYYMMDD, "" where it was removed
    series_description: str
    region: Region | None
    instance_uid: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Map(Header):
    """One frame with `pixels` [rows, columns] float32 in its unit."""

    pixels: np.ndarray = field(kw_only=True)


def read_headers(path: Path, told: Told = Told()) -> tuple[Header, ...]:
    """One per frame, without decoding pixels. Raises InputError naming what is missing or contradicts; UndecodableError for a compressed
    file that this installation cannot decode, so that it is known before training and not in it."""
    with damage_told(path):
        dataset = open_dataset(path, pixels=False)
        require_decoder(path, dataset)
        frames = frames_of(path, dataset)
        return tuple(_header(path, dataset, frame, frames, told) for frame in range(frames))


def read_map(header: Header) -> Map:
    """The frame of a header with its pixels. Raises InputError if the file cannot be decoded or has no grey values."""
    with damage_told(header.source):
        dataset = open_dataset(header.source, pixels=True)
        require_decoder(header.source, dataset)
        stored = _stored(header, dataset)
        return Map(**vars(header), pixels=_in_unit(header, dataset, stored))


class UndecodableError(InputError):
    """Compressed in a way that no installed package decodes."""


class SpacingError(InputError):
    """No usable distance between pixels."""


# files


@contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Whatever the bytes of a damaged file lead pydicom to raise, at once or when a value is looked at, is told of the file.

    Its warnings are of values that break the standard, such as UIDs of anonymised files; nothing here depends on them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:
        raise InputError(f"{path}: not a readable DICOM file ({type(error).__name__}: {error}); is it cut short? copy it again") from None


def open_dataset(path: Path, pixels: bool) -> Dataset:
    """A file that has an image, with or without its pixels, and with a transfer syntax. Raises InputError if it has none."""
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    try:
        dataset = dcmread(path, stop_before_pixels=not pixels)
    except InvalidDicomError:  # no preamble; a file that is no DICOM at all ends below, for it has no rows
        dataset = dcmread(path, stop_before_pixels=not pixels, force=True)
    if pixels and "Rows" not in dataset:  # there was an image when its header was read
        raise InputError(f"{path}: the file has changed or is cut short: its header can no longer be read; copy it again")
    if "Rows" not in dataset or "Columns" not in dataset:
        raise InputError(f"{path}: no DICOM image: Rows and Columns are missing; give image files only")
    if "TransferSyntaxUID" not in dataset.file_meta:
        from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

        implicit, little = dataset.original_encoding
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    return dataset


def require_decoder(path: Path, dataset: Dataset) -> None:
    """Raises UndecodableError unless an installed package can decode the pixels."""
    from pydicom.pixels import get_decoder

    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise UndecodableError(f"{path}: transfer syntax {syntax.name} ({syntax}) is unknown; save the file uncompressed (Explicit VR Little Endian)") from None
    if not decoder.is_available:
        raise UndecodableError(f"{path}: compressed with {syntax.name} ({syntax}), which no installed package decodes; "
                               f"pip install pylibjpeg {package_for(syntax.name)}, or save the file uncompressed")  # fmt: skip


def package_for(syntax: str) -> str:
    """Which package beside pylibjpeg decodes a transfer syntax of that name."""
    return next((package for word, package in PACKAGE_FOR.items() if word in syntax), "")


def frames_of(path: Path, dataset: Dataset) -> int:
    """How many there are. Raises InputError for a number that cannot be."""
    count = int(dataset.get("NumberOfFrames", 1) or 1)
    if not 1 <= count <= MOST_FRAMES:
        raise InputError(f"{path}: NumberOfFrames is {count}; allowed are 1 to {MOST_FRAMES}; is the file damaged?")
    own = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if count > 1 and own and len(own) != count:
        raise InputError(f"{path}: NumberOfFrames is {count}, but the functional groups are of {len(own)} frames; is the file damaged?")
    return count


# headers


def _header(path: Path, dataset: Dataset, frame: int, frames: int, told: Told) -> Header:
    where = f"{path}, frame {frame}" if frames > 1 else str(path)
    groups = _groups(dataset, frame)
    image_type = _texts(_first(groups, "FrameType")) or _texts(dataset.get("ImageType"))  # the file's, where its frames have none
    description = str(dataset.get("SeriesDescription") or "")
    found = find_type(where, told.type, image_type, description, told.folders)
    spacing, spacing_from = _spacing(where, dataset, groups)
    scale, unit_from = _scale(where, dataset, groups, found.type, told)
    _require_grey(where, dataset, found.type)
    notes = (f"taken as {found.type} by {found.by}, but {found.contradicted_by}",) if found.contradicted_by else ()
    return Header(
        source=path, frame=frame, type=found.type, type_from=found.by, unit=UNIT[found.type], unit_from=unit_from, scale=scale,
        rows=int(dataset.Rows), columns=int(dataset.Columns), spacing_mm=spacing, spacing_from=spacing_from,
        orientation=_orientation(where, groups), position_mm=_vector(where, groups, "ImagePositionPatient", 3),
        slice_thickness_mm=_above_zero(_number(_first(groups, "SliceThickness"))),
        patient=str(dataset.get("PatientID") or "").strip(), study_date=str(dataset.get("StudyDate") or "").strip(),
        series_description=description, region=told.region or find_region([path.stem, *told.folders, description]),
        instance_uid=str(dataset.get("SOPInstanceUID") or ""), notes=notes,
    )  # fmt: skip


def _groups(dataset: Dataset, frame: int) -> list[Dataset]:
    """Where a fact about a frame may stand, the most particular first: its own functional groups, those of all frames, the file itself."""
    own = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    return [*(own[frame : frame + 1]), *shared[:1], dataset]


def _first(groups: Sequence[Dataset], keyword: str) -> Any:
    """The value of a keyword in the first place that has it, directly or in one of its MACROS."""
    for group in groups:
        direct = group.get(keyword)
        if direct not in (None, ""):
            return direct
        for macro in MACROS:
            nested = group[macro].value[0].get(keyword) if group.get(macro) else None
            if nested not in (None, ""):
                return nested
    return None


# functional groups that hold the facts used here; others, such as Referenced Image, speak of other images
MACROS = ("PixelMeasuresSequence", "PlaneOrientationSequence", "PlanePositionSequence", "MRImageFrameTypeSequence", "PixelValueTransformationSequence", "ParametricMapFrameTypeSequence")


def _texts(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else [str(part) for part in value]


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None


def _vector(where: str, groups: Sequence[Dataset], keyword: str, count: int) -> Any:
    value = _first(groups, keyword)
    if value is None:
        return None
    numbers = [_number(part) for part in value]
    if len(numbers) != count or None in numbers:
        raise InputError(f"{where}: {keyword} is {list(value)}; it must be {count} numbers")
    return tuple(numbers)


def _above_zero(number: float | None) -> float | None:
    """What some files write for "unknown" is unknown."""
    return number if number is not None and number > 0 else None


def _orientation(where: str, groups: Sequence[Dataset]) -> Any:
    """Two directions at a right angle, each of length 1; what rounding has left is mended."""
    value = _vector(where, groups, "ImageOrientationPatient", 6)
    if value is None:
        return None
    first, second = np.array(value[:3]), np.array(value[3:])
    lengths = np.linalg.norm(first), np.linalg.norm(second)
    if not np.allclose(lengths, 1, atol=ROUNDED) or abs(first @ second) > ROUNDED:
        raise InputError(f"{where}: ImageOrientationPatient is {list(value)}; it must be two directions of length 1 at a right angle; export the file again")
    return tuple(float(part) for part in (*(first / lengths[0]), *(second / lengths[1])))


def _spacing(where: str, dataset: Dataset, groups: Sequence[Dataset]) -> tuple[tuple[float, float], str]:
    value = _first(groups, "PixelSpacing")
    if value is None:
        return _private_spacing(where, dataset), "Siemens private tags (0051,100C)"
    steps = [_number(part) for part in (value if not isinstance(value, str | float | int) else [value])]
    if len(steps) != 2 or not all(step is not None and 0 < step < 1e3 for step in steps):
        raise SpacingError(f"{where}: PixelSpacing is {value}; it must be two numbers of mm above 0, between rows and between columns")
    return (float(steps[0] or 0), float(steps[1] or 0)), "PixelSpacing"


def _private_spacing(where: str, dataset: Dataset) -> tuple[float, float]:
    """Of a Siemens file that lost PixelSpacing: the field of view, such as `FoV 315*360`, over rows and columns.

    Which of the two numbers goes along the rows is not written, so this is trusted only where one order makes the pixels square."""
    found = None
    if str(dataset.get((0x0051, 0x0010), _Nothing).value or "").startswith("SIEMENS"):
        found = re.search(r"(\d+(?:\.\d+)?)\s*\*\s*(\d+(?:\.\d+)?)", str(dataset.get((0x0051, 0x100C), _Nothing).value or ""))
    for sizes in ([(float(found[1]), float(found[2])), (float(found[2]), float(found[1]))] if found else []):
        row_mm, column_mm = sizes[0] / int(dataset.Rows), sizes[1] / int(dataset.Columns)
        if row_mm > 0 and abs(row_mm / column_mm - 1) <= SQUARE:
            return row_mm, column_mm
    tried = f"; the Siemens tag (0051,100C) says {found[0]}, which makes no square pixels of {dataset.Rows} x {dataset.Columns}" if found else ""
    raise SpacingError(f"{where}: no PixelSpacing (0028,0030), also not in functional groups{tried}; without it no contour has a size: export the file again with it")


class _Nothing:
    value = None


def _require_grey(where: str, dataset: Dataset, kind: MapType) -> None:
    """A palette colours a map's values for display and leaves them as they are; of a cine frame nothing says that they are brightness."""
    photometric = str(dataset.get("PhotometricInterpretation") or "MONOCHROME2")
    if int(dataset.get("SamplesPerPixel", 1) or 1) != 1 or not photometric.startswith(("MONOCHROME", "PALETTE")):
        raise InputError(f"{where}: a coloured picture ({photometric}): the {'values of the map' if kind != 'cine' else 'grey values'} are lost; export the image itself")
    if photometric.startswith("PALETTE") and kind == "cine":
        raise InputError(f"{where}: a cine frame with a palette: its values are numbers of colours; export it as grey values")


# values


def _scale(where: str, dataset: Dataset, groups: Sequence[Dataset], kind: MapType, told: Told) -> tuple[tuple[float, float], str]:
    """(slope, intercept) to the unit of the type, and what says so."""
    if told.ms_per_value is not None:
        if kind == "cine":
            raise InputError(f"{where}: ms_per_value is given for a cine frame, whose values are no times; remove it")
        return (told.ms_per_value, 0.0), "manifest"
    if kind == "cine":
        return (1.0, 0.0), "stored values"  # of no unit; a rescale of the display would not make them comparable
    mapped = _real_world(where, groups)
    if mapped is not None:
        return mapped, "Real World Value Mapping"
    slope, intercept = _number(_first(groups, "RescaleSlope")), _number(_first(groups, "RescaleIntercept"))
    given = str(_first(groups, "RescaleType") or "").strip().lower()
    named = "" if given == "us" else given  # DICOM's US is "unspecified" and no microsecond
    if slope is not None and slope <= 0:
        raise InputError(f"{where}: RescaleSlope is {slope:g}; it must be above 0; export the file again, or give ms_per_value in a manifest")
    if slope is not None and (named in IN_MS or (slope, intercept or 0.0) != (1.0, 0.0)):
        factor = IN_MS.get(named, 1.0)
        return (slope * factor, (intercept or 0.0) * factor), f"RescaleSlope, in {_named_unit(named)}"
    return (UNSCALED[kind], 0.0), f"the rule for {kind} without scale: {UNSCALED[kind]:g} ms per stored value"


def _named_unit(named: str) -> str:
    return named if named in IN_MS else f"ms, since {named} is no time" if named else "ms as no unit is named"


def _real_world(where: str, groups: Sequence[Dataset]) -> tuple[float, float] | None:
    """Of the first mapping to a time. A mapping to another quantity contradicts that this is a map of times, so it is refused."""
    items = next((group.RealWorldValueMappingSequence for group in groups if group.get("RealWorldValueMappingSequence")), None)
    if not items:
        return None
    units = []
    for item in items:
        codes = item.get("MeasurementUnitsCodeSequence") or []
        unit = str(codes[0].get("CodeValue", "")).strip() if codes else ""
        units.append(unit or "none")
        slope, intercept = _number(item.get("RealWorldValueSlope")), _number(item.get("RealWorldValueIntercept"))
        if unit.lower() in IN_MS and slope is not None and slope > 0:
            return slope * IN_MS[unit.lower()], (intercept or 0.0) * IN_MS[unit.lower()]
    raise InputError(f"{where}: its Real World Value Mapping has the unit {', '.join(units)} and no line to ms, s or us; give ms_per_value in a manifest")


def _stored(header: Header, dataset: Dataset) -> np.ndarray:
    from pydicom.pixels import pixel_array

    if not any(keyword in dataset for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise InputError(f"{header.source}: the file has no pixels; copy it again")
    try:
        stored = np.asarray(pixel_array(dataset, index=header.frame))
    except Exception as error:  # a damaged stream ends in whatever its decoder raises
        syntax = dataset.file_meta.TransferSyntaxUID
        install = f", or pip install pylibjpeg {package_for(syntax.name)} for {syntax.name}" if syntax.is_compressed else ""
        raise InputError(f"{header.source}: the pixels cannot be decoded ({error}); is the file cut short? copy it again{install}") from None
    if stored.shape != (header.rows, header.columns):
        raise InputError(f"{header.source}: the pixels have shape {stored.shape}, expected {header.rows} rows and {header.columns} columns")
    return stored


def _in_unit(header: Header, dataset: Dataset, stored: np.ndarray) -> np.ndarray:
    """Pixels that the file declares to be padding become 0. MONOCHROME1 only says how to show values: a map keeps them, while a cine frame,
    which is nothing but brightness, is turned so that more is brighter."""
    values = stored.astype(np.float64)
    padding = _number(dataset.get("PixelPaddingValue"))
    limit = _number(dataset.get("PixelPaddingRangeLimit"))
    if not np.isfinite(values).all():
        raise InputError(f"{header.source}: {int((~np.isfinite(values)).sum())} pixels are no numbers (NaN or infinite); export the file again")
    if header.type == "cine" and dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        bits = int(dataset.BitsStored)
        values = (2**bits - 1 if dataset.PixelRepresentation == 0 else -1) - values
    scaled = values * header.scale[0] + header.scale[1]
    if padding is not None:
        ends = sorted((padding, padding if limit is None else limit))
        scaled[(stored >= ends[0]) & (stored <= ends[1])] = 0
    return scaled.astype(np.float32)
