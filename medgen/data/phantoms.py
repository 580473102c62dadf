"""Synthetic brain MRI with enhancing lesions, so that everything runs with no download; called by store.py and tests.

The anatomy is drawn in millimetres, so a patient is the same head at every array shape."""

from __future__ import annotations

import gzip
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medgen import files, rng
from medgen.data.splits import assign_splits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Volume = NDArray[np.float64]

PHANTOM_VERSION = 2  # part of the cache key: raise it when the drawing changes
FIELD_OF_VIEW_MM = (192.0, 192.0, 144.0)  # right-left, back-front, down-up; a head fits with a margin
DEFAULT_SHAPE = (96, 96, 48)  # 2 x 2 x 3 mm voxels
TABLE = "nii_paths.csv"
DEFAULT_FRACTIONS = {"train": 0.7, "val": 0.15, "test": 0.15}


@dataclass(frozen=True)
class Contrast:
    """Mean signal of each tissue relative to white matter, and of the parts of a lesion."""

    white: float
    grey: float
    deep_grey: float
    fluid: float
    oedema: float
    lesion: float
    core: float  # necrosis inside large lesions
    vessel: float
    noise: float  # standard deviation


CONTRASTS = {
    "t1_pre": Contrast(1.0, 0.70, 0.84, 0.22, 0.80, 0.60, 0.42, 0.75, 0.025),
    "t1_gd": Contrast(1.0, 0.74, 0.86, 0.22, 0.80, 1.45, 0.45, 1.55, 0.025),
    # BRAVO is a gradient-echo volume after contrast: sharper grey/white difference, thinner slices, so more noise
    "bravo": Contrast(1.0, 0.62, 0.80, 0.14, 0.76, 1.40, 0.38, 1.50, 0.035),
}


def write_phantoms(
    root: Path,
    patients: int,
    seed: int,
    shape: tuple[int, int, int] = DEFAULT_SHAPE,
    fractions: dict[str, float] | None = None,
) -> None:
    """Write `<root>/<split>/<patient>/{bravo,t1_pre,t1_gd,seg}.nii.gz`; the same arguments give the same bytes.

    Volumes are skull-stripped int16 in RAS order with background 0; `seg` is uint8 with lesions 1.
    `fractions`: share of patients per split, by default 0.7 train, 0.15 val, 0.15 test, at least one patient each."""
    names = patient_names(patients)
    splits = assign_splits(names, fractions or DEFAULT_FRACTIONS, seed)
    for number, name in enumerate(names):
        volumes, affine = draw_patient(seed, number, shape)
        for file_name, volume in volumes.items():
            write_volume(root / splits[name] / name / f"{file_name}.nii.gz", volume, affine)


def write_table(root: Path) -> None:
    """`<root>/nii_paths.csv` of the bravo volumes below: paths that count from it, whose they are, their splits."""
    volumes = sorted(root.glob("*/*/bravo.nii.gz"))
    lines = [f"{path.relative_to(root)},{path.parent.name},{path.parent.parent.name}" for path in volumes]
    files.write_text(root / TABLE, "\n".join(["nii_path,patient,split", *lines]) + "\n")


def patient_names(patients: int) -> list[str]:
    return [f"phantom_{number:03d}" for number in range(patients)]


def write_volume(path: Path, volume: np.ndarray, affine: np.ndarray) -> None:
    """Write a NIfTI volume whose bytes depend on nothing but its content (no time stamp in the gzip header)."""
    import nibabel

    image = nibabel.Nifti1Image(volume, affine)
    image.header.set_xyzt_units("mm")
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, compresslevel=4, mtime=0) as stream:
        stream.write(image.to_bytes())
    files.write_bytes(path, packed.getvalue())


def draw_patient(seed: int, number: int, shape: tuple[int, int, int]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """One head: ({bravo, t1_pre, t1_gd: int16, seg: uint8}, affine), all of `shape`."""
    grid = Grid.of(shape)
    tissue = draw_anatomy(seed, number, grid)
    lesions = draw_lesions(seed, number, grid, tissue)
    volumes: dict[str, np.ndarray] = {}
    for name, contrast in CONTRASTS.items():
        volumes[name] = render(seed, number, grid, tissue, lesions, name, contrast)
    volumes["seg"] = (lesions.tumour > 0.5).astype(np.uint8)
    return volumes, grid.affine


@dataclass(frozen=True)
class Grid:
    """Voxel centres in mm from the middle of the head; `axes` are three vectors that broadcast to the array shape."""

    axes: tuple[Volume, Volume, Volume]
    spacing_mm: tuple[float, float, float]

    @classmethod
    def of(cls, shape: tuple[int, int, int]) -> Grid:
        spacing = tuple(field / count for field, count in zip(FIELD_OF_VIEW_MM, shape, strict=True))
        lines = [(np.arange(count) - (count - 1) / 2) * step for count, step in zip(shape, spacing, strict=True)]
        x, y, z = np.ix_(*lines)
        return cls((x, y, z), spacing)  # type: ignore[arg-type]

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(axis.size for axis in self.axes)  # type: ignore[return-value]

    @property
    def affine(self) -> np.ndarray:
        affine = np.diag([*self.spacing_mm, 1.0])
        affine[:3, 3] = [axis.flat[0] for axis in self.axes]
        return affine


class Fields:
    """Smooth random fields of one patient: cubic B-splines over control points `spacing_mm` apart, unit variance."""

    def __init__(self, seed: int, number: int, grid: Grid):
        self.seed, self.number, self.grid = seed, number, grid

    def control(self, name: str, spacing_mm: float) -> Volume:
        counts = [int(np.ceil(field / spacing_mm)) + 4 for field in FIELD_OF_VIEW_MM]
        return rng.numpy_generator(self.seed, f"phantom/{name}", self.number).standard_normal(counts)

    def smooth(self, name: str, spacing_mm: float) -> Volume:
        """A field on the whole grid."""
        values = self.control(name, spacing_mm)
        for axis, field in zip(self.grid.axes, FIELD_OF_VIEW_MM, strict=True):
            basis = spline_basis((axis.ravel() + field / 2) / spacing_mm + 1, values.shape[0])
            values = np.tensordot(values, basis, axes=(0, 1))  # the axes rotate: after three turns they are in order
        return values / 0.33  # a cubic B-spline of unit coefficients has a standard deviation of about 0.33 in 3-D

    def at(self, name: str, spacing_mm: float, points_mm: Volume) -> Volume:
        """The field at points [3, n] inside the field of view."""
        from scipy import ndimage

        half = np.array(FIELD_OF_VIEW_MM)[:, None] / 2
        index = (points_mm + half) / spacing_mm + 1
        return ndimage.map_coordinates(self.control(name, spacing_mm), index, order=3, prefilter=False) / 0.33


def spline_basis(position: Volume, count: int) -> Volume:
    """Cubic B-spline weights [len(position), count] of `count` control points at 0, 1, 2, ..."""
    distance = np.abs(position[:, None] - np.arange(count))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.maximum(2 - distance, 0) ** 3 / 6
    return np.where(distance < 1, near, far)


def step_at(value_mm: Volume, width_mm: float) -> Volume:
    """0 for negative, 1 for positive distances, with a soft edge `width_mm` wide: the partial volume of a voxel."""
    return np.clip(value_mm / width_mm + 0.5, 0, 1)


def ellipsoid(points: list[Volume], centre: tuple[float, float, float], semi_axes: tuple[float, float, float]) -> Volume:
    """Depth in mm below the surface of an ellipsoid, negative outside (exact on the surface, approximate elsewhere)."""
    scaled = [(point - middle) / half for point, middle, half in zip(points, centre, semi_axes, strict=True)]
    radius = np.sqrt(sum(part**2 for part in scaled))
    return (1 - radius) * float(np.cbrt(np.prod(semi_axes)))


@dataclass(frozen=True)
class Tissue:
    """Partial volumes in [0, 1]; `brain` is the skull-stripped outline, `depth_mm` the distance below it."""

    brain: Volume
    depth_mm: Volume
    white: Volume
    grey: Volume
    deep_grey: Volume
    fluid: Volume
    vessel: Volume


def draw_anatomy(seed: int, number: int, grid: Grid) -> Tissue:
    fields = Fields(seed, number, grid)
    dice = rng.numpy_generator(seed, "phantom/anatomy", number)
    edge = float(np.cbrt(np.prod(grid.spacing_mm)))
    x, y, z = warped_points(fields, dice)
    cerebrum = ellipsoid([x, y, z], (0, 0, 8), (66, 84, 58)) - 6 * np.maximum(0, (-22 - z) / 20)
    cerebellum = ellipsoid([x, y, z], (0, -46, -40), (46, 30, 22))
    stem = ellipsoid([x, y, z], (0, -18, -50), (13, 13, 34))
    depth = np.maximum(np.maximum(cerebrum, cerebellum), stem)
    brain = step_at(depth, edge)
    sulcus = sulcus_distance(fields, [x, y, z], depth, cerebellum > cerebrum)
    # the two hemispheres touch only where white matter crosses between them
    fissure = np.hypot(np.abs(x), np.maximum(0, 26 - (z + 0.35 * np.abs(y)))) + 40 * (cerebellum > cerebrum)
    sulcus = np.minimum(sulcus, np.minimum(fissure, np.maximum(depth, 0) + 0.4))
    ventricles = draw_ventricles([x, y, z], float(dice.uniform(0.8, 1.7)))
    deep = draw_deep_grey([x, y, z])
    fluid = np.maximum(step_at(1.1 - sulcus, edge), step_at(ventricles, edge)) * brain
    deep_grey = step_at(deep, edge) * (1 - fluid)
    ribbon_mm = 4.6 + 0.6 * fields.smooth("ribbon", 24)
    grey = step_at(ribbon_mm - sulcus, edge) * (1 - fluid) * (1 - deep_grey)
    white = np.maximum(0, 1 - fluid - deep_grey - grey)
    sinus = ellipsoid([x, y, z], (0, -4, 8), (3.0, 86, 60)) * (np.abs(depth) < 4) * (np.abs(x) < 3) * (z > 0)
    vessel = step_at(np.minimum(sinus, 3.0), edge) * brain * (sinus > 0)
    return Tissue(brain, depth, white, grey, deep_grey, fluid, vessel)


def warped_points(fields: Fields, dice: np.random.Generator) -> list[Volume]:
    """Grid points in the frame of an average head: this patient's size, tilt and shape undone."""
    x, y, z = np.broadcast_arrays(*fields.grid.axes)
    turn = np.deg2rad(dice.uniform(-6, 6))
    x, y = np.cos(turn) * x - np.sin(turn) * y, np.sin(turn) * x + np.cos(turn) * y
    scale = dice.uniform(0.90, 1.02, size=3)  # the largest head, moved and bent, still ends inside the field of view
    moved = [x / scale[0], y / scale[1] + dice.uniform(-3, 3), z / scale[2] + dice.uniform(-3, 3)]
    return [
        point + 3.0 * fields.smooth(f"bend{axis}", 48) + 1.0 * fields.smooth(f"ripple{axis}", 16)
        for axis, point in enumerate(moved)
    ]


def sulcus_distance(fields: Fields, points: list[Volume], depth: Volume, is_cerebellum: np.ndarray) -> Volume:
    """Roughly the distance in mm to the nearest sulcus: zero sheets of a field that hardly changes with depth.

    The sheets stand upright on the surface, as sulci do; they end some 13 to 23 mm below it."""
    result = np.full(depth.shape, 99.0)
    shell = (depth > -3) & (depth < 32)
    near = np.stack([point[shell] for point in points])
    middle = np.array([[0.0], [0.0], [6.0]])
    direction = near - middle
    radius = np.linalg.norm(direction, axis=0)
    flat = middle + direction / np.maximum(radius, 1) * (46 + 0.18 * radius)
    cerebrum_mm = 7.5 * np.abs(fields.at("sulci", 6, flat))
    reach = 18 + 5 * fields.at("reach", 30, flat)
    cerebrum_mm = cerebrum_mm + np.maximum(0, depth[shell] - reach) * 0.8
    # folia of the cerebellum: thin sheets that follow its surface
    folia_mm = 3.4 + 2.6 * np.sin(near[2] * 0.9 + 0.1 * near[1] + 0.5 * fields.at("folia", 12, near))
    result[shell] = np.where(is_cerebellum[shell], folia_mm, cerebrum_mm)
    return result


def draw_ventricles(points: list[Volume], size: float) -> Volume:
    """Depth inside the lateral and third ventricles; `size` 1 is average."""
    x, y, z = points
    side = np.abs(x)
    bent = side - 0.010 * (y + 2) ** 2 - 4
    body = ellipsoid([bent, y, z], (5.0, -2, 14), (4.6 * size, 27, 8.0 * size))
    horn = ellipsoid([side, y, z], (24, -28, 2), (4.5 * size, 11, 10 * size))
    third = ellipsoid([x, y, z], (0, -4, -2), (1.8 * size, 11, 10))
    fourth = ellipsoid([x, y, z], (0, -32, -34), (6 * size, 4, 8))
    return np.maximum(np.maximum(body, horn), np.maximum(third, fourth))


def draw_deep_grey(points: list[Volume]) -> Volume:
    """Depth inside thalamus, caudate and putamen of both sides."""
    x, y, z = points
    side = np.abs(x)
    thalamus = ellipsoid([side, y, z], (10, -10, 1), (8, 13, 9))
    caudate = ellipsoid([side, y, z], (13.5, 14, 9), (4.5, 11, 9))
    putamen = ellipsoid([side - 0.12 * np.abs(y), y, z], (24, 4, 1), (5, 16, 9))
    return np.maximum(np.maximum(thalamus, caudate), putamen)


@dataclass(frozen=True)
class Lesions:
    """Partial volumes: `tumour` is what the mask holds, `core` its necrotic part, `oedema` the swelling around it."""

    tumour: Volume
    core: Volume
    oedema: Volume


def draw_lesions(seed: int, number: int, grid: Grid, tissue: Tissue) -> Lesions:
    """1 to 4 blobs; the first is at least 9 mm in radius, so that every patient has a mask at 32 pixels too."""
    fields = Fields(seed, number, grid)
    dice = rng.numpy_generator(seed, "phantom/lesions", number)
    edge = float(np.cbrt(np.prod(grid.spacing_mm)))
    tumour, core, oedema = (np.zeros(grid.shape) for _ in range(3))
    bumps = fields.smooth("bumps", 9)
    for lesion in range(int(dice.integers(1, 5))):
        radius = float(dice.uniform(9, 17) if lesion == 0 else np.exp(dice.uniform(np.log(3.5), np.log(12))))
        centre = lesion_centre(dice, grid, tissue, radius)
        stretch = dice.uniform(0.8, 1.25, size=3)
        distance = np.sqrt(
            sum(((axis - middle) / part) ** 2 for axis, middle, part in zip(grid.axes, centre, stretch, strict=True))
        )
        inside = radius * (1 + 0.16 * bumps) - distance
        tumour = np.maximum(tumour, step_at(inside, edge))
        oedema = np.maximum(oedema, step_at(inside + radius * float(dice.uniform(0.2, 0.9)) * (1 + 0.3 * bumps), 3 * edge))
        if radius > 7 and dice.random() < 0.7:
            wall = float(dice.uniform(2.5, 4.5))
            core = np.maximum(core, step_at(inside - wall * (1 + 0.25 * bumps), edge))
    tumour = tumour * (tissue.brain > 0.5)
    return Lesions(tumour, core * tumour, oedema * (1 - tumour) * tissue.white)


def lesion_centre(
    dice: np.random.Generator, grid: Grid, tissue: Tissue, radius_mm: float
) -> tuple[float, float, float]:
    """A point inside the head, deep enough for most of the lesion and above the skull base."""
    while True:
        point = [float(dice.uniform(-0.36, 0.36)) * field for field in FIELD_OF_VIEW_MM]
        index = tuple(int(np.argmin(np.abs(axis.ravel() - value))) for axis, value in zip(grid.axes, point, strict=True))
        if tissue.depth_mm[index] > 0.7 * radius_mm + 2 and point[2] > -30 and abs(point[0]) > 8:
            return point[0], point[1], point[2]


def render(
    seed: int, number: int, grid: Grid, tissue: Tissue, lesions: Lesions, name: str, contrast: Contrast
) -> np.ndarray:
    """The int16 volume of one sequence: tissue signals, coil shading, Rician noise, zero outside the brain."""
    fields = Fields(seed, number, grid)
    dice = rng.numpy_generator(seed, f"phantom/scan/{name}", number)
    signal = (
        contrast.white * tissue.white * (1 + 0.02 * fields.smooth("texture", 10))
        + contrast.grey * tissue.grey
        + contrast.deep_grey * tissue.deep_grey
        + contrast.fluid * tissue.fluid
    )
    signal = signal + tissue.vessel * (contrast.vessel - signal)
    signal = signal + lesions.oedema * (contrast.oedema - signal) * 0.9
    uneven = 1 + 0.07 * fields.smooth("uptake", 7)
    signal = signal + lesions.tumour * (contrast.lesion * uneven - signal)
    signal = signal + lesions.core * (contrast.core - signal)
    shading = np.exp(0.06 * fields.smooth(f"coil/{name}", 90))
    noise = dice.standard_normal((2, *grid.shape)) * contrast.noise
    magnitude = np.hypot(signal * shading + noise[0], noise[1])
    scanner_scale = float(dice.uniform(500, 1100))
    volume = np.rint(magnitude * scanner_scale).clip(1, 32767) * (tissue.brain > 0.5)
    return volume.astype(np.int16)
