"""A drawn cohort of cardiac T1 and T2 maps with contours, laid out as a clinic delivers it; called by `medgen phantoms --kind cardiac` and tests.

What is drawn is known: truth.csv has the exact area and the mean of every region that contours bound."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from medgen import csv_files, files, rng
from medgen.cardiac.map_type import REGIONS, UNSCALED, Region
from medgen.cardiac.rasterise import Grid
from medgen.cardiac.regions import Arrangement, arrange, coverage
from medgen.cardiac.regions import Region as Area
from medgen.data.cardiac_anatomy import TISSUES, Person, Slice, draw_person, draw_slice
from medgen.data.phantoms import spline_basis

if TYPE_CHECKING:
    from pydicom.dataset import FileDataset

Type = Literal["T1", "T2"]
TYPES: tuple[Type, ...] = ("T1", "T2")
TRUTH, TRUTH_COLUMNS = "truth.csv", ("patient", "type", "region", "tissue", "mean_ms", "area_mm2")
DELIVERIES = ("2022_11_22", "2023_07_09", "2023_08_15")  # each patient is in one of them
MAP_NAME: dict[Region, str] = {"apex": "Apex.dcm", "mid": "Mid.dcm", "base": "Base.dcm"}
SERIES_NAME: dict[Region, str] = {"apex": "map_apex", "mid": "map_mid_", "base": "map_base"}  # the underscore is in real deliveries

# 360 mm over 192 or 256 pixels, 1.875 and 1.406 mm, as in most examinations; with the others a spacing does not tell the size: 1.5625 mm is 300 / 192 and 400 / 256
LONG_SIDES, LONG_SIDE_CHANCES = (192, 256), (0.58, 0.42)
FIELDS_MM, FIELD_CHANCES = (300.0, 320.0, 340.0, 360.0, 380.0, 400.0), (0.08, 0.1, 0.14, 0.46, 0.12, 0.1)
SHORT_SHARES, SHORT_CHANCES = (0.6875, 0.75, 0.8125, 0.875, 0.9375, 1.0), (0.06, 0.12, 0.16, 0.42, 0.09, 0.15)
ROWS_LONG = 0.6  # of examinations

THICKNESS_MM, BETWEEN_SLICES_MM = 8.0, 24.0  # between the middles of neighbouring slices
LARGEST_STORED = 2**12 - 1
FINE_MM, COARSE_MM, PADDED_MM = 7.0, 45.0, 330.0  # texture: distances between control points, and how far from the heart they reach
FINE_SHARE: dict[Type, float] = {"T1": 0.018, "T2": 0.03}  # standard deviation of the texture, relative to the value
COARSE_SHARE: dict[Type, float] = {"T1": 0.008, "T2": 0.012}
COMMON = 0.8  # weight of the texture that both types of a slice share; sqrt(1 - 0.8 ** 2) = 0.6 is left for their own


def write_cardiac_phantoms(root: Path, patients: int, seed: int) -> None:
    """Write `<root>/<delivery>/Patient (N)/T1_Mapping_/Apex.dcm, .../T1_map_apex/Contours.json` and so on, and `<root>/truth.csv`.

    12 files per patient: a map and its contours for two types at three levels. The same arguments give the same bytes."""
    rows: list[dict[str, object]] = []
    for number in range(1, patients + 1):
        delivery = DELIVERIES[(number - 1) * len(DELIVERIES) // patients]
        rows += _write_patient(root / delivery / f"Patient ({number})", draw_person(seed, number), delivery)
    csv_files.write_rows(root / TRUTH, TRUTH_COLUMNS, rows)


def _write_patient(folder: Path, person: Person, delivery: str) -> list[dict[str, object]]:
    rows = []
    plane = _plane(person)
    for region in REGIONS:
        drawn = draw_slice(person, region)
        parts = Parts.of(drawn)
        for kind in TYPES:
            grid = draw_grid(person, kind, region)
            dataset = _dataset(person, kind, region, grid, plane, draw_map(person, drawn, parts, kind, grid), delivery)
            files.write_bytes(folder / f"{kind}_Mapping_" / MAP_NAME[region], _bytes(dataset))
            files.write_json(folder / f"{kind}_{SERIES_NAME[region]}" / "Contours.json", _contours(drawn, grid))
            rows += [{"patient": folder.name, "type": kind, "region": region, **row} for row in _truth(drawn, parts, kind)]
    return rows


# geometry


def draw_grid(person: Person, kind: Type, region: Region) -> Grid:
    """The pixels of one map, in mm from the middle of the left ventricle. All levels of a type share size and spacing; each is placed anew."""
    dice = person.dice(f"protocol/{kind}")
    long_side, field = int(dice.choice(LONG_SIDES, p=LONG_SIDE_CHANCES)), float(dice.choice(FIELDS_MM, p=FIELD_CHANCES))
    short_side = 2 * round(long_side * float(dice.choice(SHORT_SHARES, p=SHORT_CHANCES)) / 2)
    spacing = round(field / long_side, 6)
    shape = (long_side, short_side) if dice.random() < ROWS_LONG else (short_side, long_side)
    middle = np.array([12.0, -18.0]) + dice.normal(0, 9, 2)  # (row, column): the heart lies above and right of the middle of the body
    middle += person.dice(f"placement/{kind}", REGIONS.index(region)).normal(0, 2.5, 2)
    origin = middle - (np.array(shape) - 1) / 2 * spacing
    return Grid(shape, (spacing, spacing), (round(float(origin[0]), 3), round(float(origin[1]), 3)))


@dataclass(frozen=True, eq=False)
class Plane:
    """Of the middle slice, in patient coordinates (left, back, up): the heart's middle in mm, and unit vectors along columns, rows and to the apex."""

    centre: np.ndarray
    across: np.ndarray
    down: np.ndarray
    to_apex: np.ndarray


def _plane(person: Person) -> Plane:
    """The long axis points left, forwards and down; image right is the free wall, image down is towards the feet."""
    dice = person.dice("plane")
    to_apex = _unit(np.array([0.65, -0.55, -0.5]) + dice.normal(0, 0.06, 3))
    across = np.array([0.6, 0.7, 0.0])
    across = _unit(across - (across @ to_apex) * to_apex)
    return Plane(np.array([35.0, -20.0, 10.0]) + dice.normal(0, 12, 3), across, np.cross(across, to_apex), to_apex)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def _contours(drawn: Slice, grid: Grid) -> dict[str, list[float]]:
    """In pixels: x is the column, y the row, the middle of the first pixel is (0, 0)."""
    found: dict[str, list[float]] = {}
    for name, points in (("epicardial", drawn.epicardium), ("endocardial", drawn.endocardium)):
        pixels = (points - (grid.origin_mm[1], grid.origin_mm[0])) / (grid.spacing_mm[1], grid.spacing_mm[0])
        found |= {f"{name}_contours_{axis}": [round(float(value), 4) for value in pixels[:, place]] for place, axis in enumerate("xy")}
    return found


# values


@dataclass(frozen=True, eq=False)
class Parts:
    """Where each tissue of a slice shows, as exact areas in mm; air is the rest."""

    areas: Mapping[str, Area]

    @classmethod
    def of(cls, drawn: Slice) -> Parts:
        names = {shape.name: position for position, shape in enumerate(drawn.shapes) if shape.name}
        arrangement = arrange([shape.points for shape in drawn.shapes])
        tissues = list(dict.fromkeys(shape.tissue for shape in drawn.shapes))
        tissue_of = np.array([tissues.index(shape.tissue) for shape in drawn.shapes])
        within = np.array([names[shape.within] if shape.within else position for position, shape in enumerate(drawn.shapes)])
        return cls({tissue: _where_on_top(arrangement, tissue_of == number, within) for number, tissue in enumerate(tissues)})

    def area_mm2(self, tissues: Sequence[str]) -> float:
        return sum(self.areas[tissue].area() for tissue in tissues if tissue in self.areas)

    def shares(self, grid: Grid) -> dict[str, np.ndarray]:
        """[rows, columns] per tissue, of air too: the share of each pixel; they add up to 1."""
        offset, factor = (grid.origin_mm[1], grid.origin_mm[0]), (1 / grid.spacing_mm[1], 1 / grid.spacing_mm[0])
        found = {tissue: coverage(area.moved(offset, factor), *grid.shape).clip(0, 1) for tissue, area in self.areas.items()}
        return found | {"air": np.clip(1 - sum(found.values()), 0, 1)}


def _where_on_top(arrangement: Arrangement, wanted: np.ndarray, within: np.ndarray) -> Area:
    """`wanted` [shapes]: whether a shape is of the tissue; `within` [shapes]: which other one it is cut to, or itself."""

    def rule(winding: np.ndarray) -> np.ndarray:
        inside = winding != 0
        shown = inside & inside[within]
        front = len(shown) - 1 - np.argmax(shown[::-1], axis=0)
        return shown.any(axis=0) & wanted[front]

    return arrangement.region(rule)


def draw_map(person: Person, drawn: Slice, parts: Parts, kind: Type, grid: Grid) -> np.ndarray:
    """[rows, columns] uint16 of at most 12 bits, as scanners store it: T1 in ms, T2 in tenths of a ms."""
    shares, which = parts.shares(grid), TYPES.index(kind)
    values = sum(share * drawn.times.get(tissue, (0.0, 0.0))[which] for tissue, share in shares.items())
    variance = sum(share * TISSUES[tissue].noise[which] ** 2 for tissue, share in shares.items())
    white = person.dice(f"noise/{kind}", REGIONS.index(drawn.region)).standard_normal(grid.shape)
    measured = values * (1 + _texture(person, drawn.region, kind, grid)) + np.sqrt(variance) * person.noise * _interpolated(white)
    return np.rint(measured / UNSCALED[kind]).clip(0, LARGEST_STORED).astype(np.uint16)


def _interpolated(white: np.ndarray) -> np.ndarray:
    """Noise of unit variance whose neighbours resemble each other a little, as where a scanner interpolates."""
    for axis in (0, 1):
        white = (0.2 * np.roll(white, 1, axis) + white + 0.2 * np.roll(white, -1, axis)) / np.sqrt(1 + 2 * 0.2**2)
    return white


def _texture(person: Person, region: Region, kind: Type, grid: Grid) -> np.ndarray:
    """Relative: smooth fields in mm, in part the same for T1 and T2, whatever their pixels."""
    fields = np.zeros(grid.shape)
    for share, step in ((FINE_SHARE[kind], FINE_MM), (COARSE_SHARE[kind], COARSE_MM)):
        for weight, stream in ((COMMON, "both"), (float(np.sqrt(1 - COMMON**2)), kind)):
            fields += share * weight * _smooth(person.dice(f"texture/{stream}/{step:g}", REGIONS.index(region)), step, grid)
    return fields


def _smooth(dice: np.random.Generator, step_mm: float, grid: Grid) -> np.ndarray:
    """Of unit variance; cubic B-splines over control points `step_mm` apart."""
    count = int(np.ceil(2 * PADDED_MM / step_mm)) + 4
    basis = []
    for size, spacing, origin in zip(grid.shape, grid.spacing_mm, grid.origin_mm, strict=True):
        at_mm: np.ndarray = origin + np.arange(size) * spacing
        basis.append(spline_basis((at_mm + PADDED_MM) / step_mm + 1, count))
    return basis[0] @ dice.standard_normal((count, count)) @ basis[1].T / 0.479  # the standard deviation for unit coefficients in 2-D


def _truth(drawn: Slice, parts: Parts, kind: Type) -> list[dict[str, object]]:
    """Of what contours bound: lesions are part of the myocardium, papillary muscles and trabeculae of the left ventricle. Lesions once more on their own."""
    groups = {
        "myocardium": ("myocardium", "lesion"), "left_ventricle": ("blood", "trabeculae", "papillary"),
        "right_ventricle": ("right_blood",), "lesion": ("lesion",),
    }  # fmt: skip
    rows: list[dict[str, object]] = []
    for name, tissues in groups.items():
        area = parts.area_mm2(tissues)
        if area > 0:
            total = sum(parts.area_mm2([tissue]) * drawn.times[tissue][TYPES.index(kind)] for tissue in tissues)
            rows.append({"tissue": name, "mean_ms": f"{total / area:.3f}", "area_mm2": f"{area:.3f}"})
    return rows


# DICOM


def _bytes(dataset: FileDataset) -> bytes:
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def _uid(person: Person, what: str, *index: int) -> str:
    """Below 2.25, the root of UIDs that nobody assigns; the same arguments give the same one."""
    high, low = (rng.derive_seed(person.seed, f"cardiac_phantom/uid/{what}/{half}", person.number, *index) for half in ("high", "low"))
    return f"2.25.{high << 63 | low}"


def _dataset(person: Person, kind: Type, region: Region, grid: Grid, plane: Plane, pixels: np.ndarray, delivery: str) -> FileDataset:
    """As a scanner of 1.5 T writes a map: 12 of 16 bits and no rescale."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage

    series, level = TYPES.index(kind), REGIONS.index(region)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, MRImageStorage
    meta.MediaStorageSOPInstanceUID = UID(_uid(person, "image", series, level))
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    first = plane.centre + (1 - level) * BETWEEN_SLICES_MM * plane.to_apex + grid.origin_mm[1] * plane.across + grid.origin_mm[0] * plane.down
    window = {"T1": 1300, "T2": 1000}[kind]  # stored values
    values: dict[str, object] = {
        "SpecificCharacterSet": "ISO_IR 100", "ImageType": ["DERIVED", "PRIMARY", f"{kind} MAP", "MOCO", kind, "DIS2D"],
        "SOPClassUID": MRImageStorage, "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "StudyDate": delivery.replace("_", ""), "StudyTime": "", "AccessionNumber": "", "Modality": "MR", "Manufacturer": "medgen phantom",
        "ReferringPhysicianName": "", "SeriesDescription": f"{kind}Map_SAXs_MOCO_{kind}", "DerivationDescription": "drawn by a computer; shows nobody",
        "PatientName": f"Patient {person.number}", "PatientID": f"Patient {person.number}", "PatientBirthDate": "", "PatientSex": "", "BodyPartExamined": "HEART",
        "ScanningSequence": "GR", "SequenceVariant": "SK", "ScanOptions": "", "MRAcquisitionType": "2D", "SliceThickness": f"{THICKNESS_MM:g}",
        "RepetitionTime": "", "EchoTime": "", "EchoTrainLength": "", "MagneticFieldStrength": "1.5", "SpacingBetweenSlices": f"{BETWEEN_SLICES_MM:g}",
        "PatientPosition": "HFS", "StudyInstanceUID": _uid(person, "study"), "SeriesInstanceUID": _uid(person, "series", series),
        "StudyID": "1", "SeriesNumber": str(series + 1), "InstanceNumber": str(level + 1), "ImagePositionPatient": [f"{value:.4f}" for value in first],
        "ImageOrientationPatient": [f"{value:.10f}" for value in (*plane.across, *plane.down)], "FrameOfReferenceUID": _uid(person, "frame"),
        "PositionReferenceIndicator": "", "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "Rows": grid.shape[0], "Columns": grid.shape[1],
        "PixelSpacing": [f"{value:g}" if value == round(value, 4) else f"{value:.6f}" for value in grid.spacing_mm],
        "BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0, "SmallestImagePixelValue": int(pixels.min()), "LargestImagePixelValue": int(pixels.max()),
        "WindowCenter": str(window), "WindowWidth": str(window), "PixelData": pixels.astype("<u2").tobytes(),
    }  # fmt: skip
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset
