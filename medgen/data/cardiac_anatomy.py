"""The anatomy of drawn hearts: outlines in mm and T1 and T2 in ms, by patient and slice level; called by cardiac_phantoms.py.

All outlines are polygons in the short-axis plane, so areas and contours are exact. x counts to the image's right, y down, from the middle of the
left ventricle at mid level. Values are of 1.5 T without contrast agent; their spread follows what cohorts of maps show."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from medgen import rng
from medgen.cardiac.map_type import REGIONS, Region

ENDO_DIAMETER_MM = (30.0, 50.0)  # allowed range at mid level
WALL_MM = (6.0, 12.0)
LEVEL_SCALE: dict[Region, float] = {"apex": 0.68, "mid": 1.0, "base": 1.07}  # of the cavity
LEVEL_WALL: dict[Region, float] = {"apex": 0.88, "mid": 1.0, "base": 1.04}
SHARE_WITH_LESION, SHARE_DIFFUSE = 0.2, 0.08  # of patients: a scar or an oedema; diffuse disease
TRABECULAR_SHARE: dict[Region, float] = {"apex": 0.38, "mid": 0.30, "base": 0.24}  # of muscle, in the rim of the cavity

Times = tuple[float, float]  # T1 and T2, ms


@dataclass(frozen=True)
class Tissue:
    """Mean times of all people, how much people differ, and the noise of a pixel: all in ms, T1 first."""

    mean: Times
    spread: Times
    noise: Times


# Blood and muscle: the differences between cavity and muscle (with what trabeculae take from the cavity) are those of a cohort of 3,500 maps, 371 +- 75 ms and 76 +- 21 ms.
# Lungs and air give hardly a signal, so what is fitted there is mostly noise.
# A tissue without times takes them from others in _times_of_slice.
TISSUES = {
    "air": Tissue((0, 0), (0, 0), (95, 6.0)),
    "fat": Tissue((345, 88), (18, 7), (22, 5.0)),
    "skeletal_muscle": Tissue((930, 38), (35, 2.5), (40, 3.0)),
    "lung": Tissue((300, 14), (60, 4), (185, 11.0)),
    "lung_vessel": Tissue((1350, 110), (80, 18), (110, 16.0)),
    "bone": Tissue((560, 62), (40, 6), (60, 7.0)),
    "spinal_fluid": Tissue((2700, 290), (120, 25), (150, 25.0)),
    "liver": Tissue((595, 46), (30, 3), (26, 3.0)),
    "spleen": Tissue((1050, 74), (60, 6), (40, 5.0)),
    "stomach": Tissue((1150, 105), (260, 30), (70, 9.0)),
    "blood": Tissue((1448, 143), (78, 24), (42, 7.0)),
    "aortic_blood": Tissue((0, 0), (0, 0), (48, 8.0)),  # that of the left ventricle; a name of its own, for areas are by name
    "right_blood": Tissue((0, 0), (0, 0), (48, 8.0)),  # follows that of the left ventricle
    "myocardium": Tissue((1010, 50), (29, 2.8), (28, 2.4)),
    "right_wall": Tissue((0, 0), (0, 0), (45, 4.0)),  # that of the left wall
    "trabeculae": Tissue((0, 0), (0, 0), (40, 6.0)),  # a mixture of blood and muscle
    "papillary": Tissue((0, 0), (0, 0), (30, 3.0)),  # muscle
    "lesion": Tissue((0, 0), (0, 0), (30, 3.0)),  # myocardium and what the disease adds
}


@dataclass(frozen=True)
class Lesion:
    """A segment of the wall from `angle` on, `extent` radians long, over the inner `depth` share of it, at some levels; adds ms to muscle."""

    angle: float
    extent: float
    depth: float
    regions: tuple[Region, ...]
    added_ms: Times


@dataclass(frozen=True, eq=False)
class Person:
    """One patient's numbers; lengths in mm. `times`: of every tissue; `harmonics`, `wall_harmonics` [k, 2]: cosine and sine of cavity and wall."""

    seed: int
    number: int
    endo_diameter_mm: float
    wall_mm: float
    harmonics: np.ndarray
    wall_harmonics: np.ndarray
    body_mm: tuple[float, float]  # half width, half height
    body_centre_mm: tuple[float, float]
    fat_mm: float
    chest_wall_mm: float
    turn: float  # of the body in the plane, radians
    times: dict[str, Times]
    lesion: Lesion | None
    noise: float  # factor of all noise

    def dice(self, stream: str, *index: int) -> np.random.Generator:
        return rng.numpy_generator(self.seed, f"cardiac_phantom/{stream}", self.number, *index)


@dataclass(frozen=True, eq=False)
class Shape:
    """An outline [N, 2] (x, y) in mm that covers those before it; `within`: it shows only inside the outline of that name."""

    tissue: str
    points: np.ndarray
    name: str = ""
    within: str = ""


@dataclass(frozen=True, eq=False)
class Slice:
    """`shapes` from back to front; `times` of every tissue at this level, ms."""

    region: Region
    shapes: tuple[Shape, ...]
    times: dict[str, Times]
    epicardium: np.ndarray
    endocardium: np.ndarray


def draw_person(seed: int, number: int) -> Person:
    dice = rng.numpy_generator(seed, "cardiac_phantom/person", number)
    height = float(np.clip(dice.normal(122, 8), 106, 140))
    width = float(np.clip(dice.normal(178, 13), 155, 210))
    return Person(
        seed, number,
        endo_diameter_mm=float(np.clip(dice.normal(41, 4.5), *ENDO_DIAMETER_MM)),
        wall_mm=float(np.clip(dice.normal(8.6, 1.3), *WALL_MM)),
        harmonics=dice.normal(size=(3, 2)) * [[0.035], [0.018], [0.010]],  # of the second order on: the first would only move the centre
        wall_harmonics=np.clip(dice.normal(size=(3, 2)) * [[0.07], [0.04], [0.03]], -0.12, 0.12),
        body_mm=(width, height),
        body_centre_mm=(float(dice.normal(-52, 7)), float(height - dice.uniform(84, 98))),
        fat_mm=float(np.clip(dice.gamma(5, 3.2), 6, 32)),
        chest_wall_mm=float(dice.uniform(13, 20)),
        turn=float(dice.normal(0, 0.12)),
        times=_times_of_person(dice),
        lesion=_lesion(dice),
        noise=float(np.exp(dice.normal(0, 0.2))),
    )  # fmt: skip


def _times_of_person(dice: np.random.Generator) -> dict[str, Times]:
    """T1 and T2 of a tissue go together in part, for both rise with its water."""
    times: dict[str, Times] = {}
    for name, tissue in TISSUES.items():
        common, own = dice.normal(), dice.normal(size=2)
        drawn = [mean + spread * np.clip(0.6 * common + 0.8 * part, -2.5, 2.5) for mean, spread, part in zip(tissue.mean, tissue.spread, own, strict=True)]
        times[name] = (float(drawn[0]), float(drawn[1]))
    if dice.random() < SHARE_DIFFUSE:
        times["myocardium"] = _sum(times["myocardium"], (float(dice.uniform(50, 110)), float(dice.uniform(1, 5))))
    return times


def _lesion(dice: np.random.Generator) -> Lesion | None:
    """A scar raises T1 above all, an oedema both."""
    there, fresh = dice.random() < SHARE_WITH_LESION, dice.random() < 0.4
    first = int(dice.integers(0, 3))
    regions = REGIONS[first : first + int(dice.integers(1, 3))]
    added = (float(dice.uniform(110, 210)), float(dice.uniform(14, 26))) if fresh else (float(dice.uniform(160, 320)), float(dice.uniform(2, 8)))
    found = Lesion(float(dice.uniform(0, 2 * np.pi)), float(dice.uniform(0.8, 1.9)), float(dice.uniform(0.45, 1.0)), regions, added)
    return found if there else None


def draw_slice(person: Person, region: Region) -> Slice:
    level = REGIONS.index(region)
    dice = person.dice("slice", level)
    centre = np.clip(dice.normal(0, 2.5, 2), -5, 5) * (region != "mid")
    endocardium, epicardium, inner = _ventricle(person, dice, region, centre)
    lesion = person.lesion if person.lesion and region in person.lesion.regions else None
    shapes = [
        *_chest(person, dice, region),
        *_heart_beside(dice, region, centre, epicardium),
        Shape("myocardium", epicardium, "epicardium"),
        *([Shape("lesion", _segment(lesion, endocardium, epicardium))] if lesion else []),
        Shape("trabeculae", endocardium, "endocardium"),
        Shape("blood", inner, "inner"),
        *_papillaries(dice, region, centre, inner),
    ]
    return Slice(region, tuple(shapes), _times_of_slice(person, dice, region, lesion), epicardium, endocardium)


def _times_of_slice(person: Person, dice: np.random.Generator, region: Region, lesion: Lesion | None) -> dict[str, Times]:
    times = {name: _sum(value, _scaled(TISSUES[name].spread, 0.3 * float(dice.normal()))) for name, value in person.times.items()}
    blood, muscle, share = times["blood"], times["myocardium"], TRABECULAR_SHARE[region]
    times["right_blood"] = (blood[0] - 18, blood[1] * 0.92)  # venous blood holds less oxygen
    times["aortic_blood"] = blood
    times["right_wall"] = times["papillary"] = muscle
    times["trabeculae"] = _sum(_scaled(blood, 1 - share), _scaled(muscle, share))
    times["lesion"] = _sum(muscle, lesion.added_ms if lesion else (0.0, 0.0))
    return times


def _sum(first: Times, second: Times) -> Times:
    return first[0] + second[0], first[1] + second[1]


def _scaled(times: Times, factor: float) -> Times:
    return times[0] * factor, times[1] * factor


# outlines


def _angles(count: int, start: float = 0.0) -> np.ndarray:
    return start + np.arange(count) * (2 * np.pi / count)


def _series(coefficients: np.ndarray, angles: np.ndarray, first_order: int) -> np.ndarray:
    orders = first_order + np.arange(len(coefficients))[:, None]
    return (coefficients[:, :1] * np.cos(orders * angles) + coefficients[:, 1:] * np.sin(orders * angles)).sum(axis=0)


def _polar(centre: np.ndarray, radius: np.ndarray, angles: np.ndarray) -> np.ndarray:
    return centre + np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _oval(centre: tuple[float, float], half_axes: tuple[float, float], turn: float = 0.0, count: int = 72, squareness: float = 2.0) -> np.ndarray:
    """A superellipse; `squareness` 2 is an ellipse, more is boxier. `turn`: about the middle of the heart, in radians."""
    angles = _angles(count)
    x, y = (np.sign(part) * np.abs(part) ** (2 / squareness) for part in (np.cos(angles), np.sin(angles)))
    return _turned(np.stack([centre[0] + half_axes[0] * x, centre[1] + half_axes[1] * y], axis=1), turn)


def _turned(points: np.ndarray, turn: float) -> np.ndarray:
    cosine, sine = math.cos(turn), math.sin(turn)
    return points @ np.array([[cosine, sine], [-sine, cosine]])


def _ventricle(person: Person, dice: np.random.Generator, region: Region, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Endocardium, epicardium and the free blood inside trabeculae, each of its own number of points, as people draw them."""
    radius = person.endo_diameter_mm / 2 * LEVEL_SCALE[region] * float(np.clip(dice.normal(1, 0.04), 0.9, 1.1))
    wall = float(np.clip(person.wall_mm * LEVEL_WALL[region] * np.clip(dice.normal(1, 0.05), 0.85, 1.15), *WALL_MM))
    own = person.harmonics + dice.normal(size=(3, 2)) * [[0.012], [0.008], [0.005]]
    rim = 0.17 + 0.04 * _series(dice.normal(size=(4, 2)), _angles(80), 2).clip(-2, 2)
    counts = dice.integers(60, 101, 2)

    def cavity(angles: np.ndarray) -> np.ndarray:
        return radius * (1 + _series(own, angles, 2).clip(-0.2, 0.2))

    inside, outside, middle = _angles(int(counts[0]), dice.uniform(0, 6)), _angles(int(counts[1]), dice.uniform(0, 6)), _angles(80)
    thick = wall * (1 + _series(person.wall_harmonics, outside, 1).clip(-0.25, 0.3))
    return _polar(centre, cavity(inside), inside), _polar(centre, cavity(outside) + thick, outside), _polar(centre, cavity(middle) * (1 - rim), middle)


def _radius_at(points: np.ndarray, centre: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """How far a star-shaped outline is from its centre in these directions."""
    offsets = points - centre
    own = np.arctan2(offsets[:, 1], offsets[:, 0])
    order = np.argsort(own)
    return np.interp(angles, own[order], np.hypot(*offsets.T)[order], period=2 * np.pi)


def _segment(lesion: Lesion, endocardium: np.ndarray, epicardium: np.ndarray) -> np.ndarray:
    """From within the cavity, which covers it, to its depth in the wall; it thins out towards both ends."""
    centre = endocardium.mean(axis=0)
    angles = lesion.angle + np.linspace(0, lesion.extent, 40)
    inner, outer = _radius_at(endocardium, centre, angles), _radius_at(epicardium, centre, angles)
    depth = lesion.depth * np.sin(np.linspace(0.15, np.pi - 0.15, 40)) ** 0.4 * 0.97
    return np.concatenate([_polar(centre, inner + depth * (outer - inner), angles), _polar(centre, inner - 1.0, angles)[::-1]])


def _papillaries(dice: np.random.Generator, region: Region, centre: np.ndarray, inner: np.ndarray) -> list[Shape]:
    """Two muscles at mid level, smaller ones in half the apices, none at the base."""
    size = {"apex": 0.12 * float(dice.random() < 0.5), "mid": 0.17, "base": 0.0}[region]
    shapes = []
    for angle in (0.9 + dice.normal(0, 0.15), 2.6 + dice.normal(0, 0.15)):  # inferolateral and inferoseptal of the free wall
        free = float(_radius_at(inner, centre, np.array([angle]))[0])
        radius = free * size * float(dice.uniform(0.8, 1.2))
        away = centre + (free - 1.15 * radius) * np.array([math.cos(angle), math.sin(angle)])
        if radius > 0:
            shapes.append(Shape("papillary", _turned(_oval((0, 0), (radius * 1.2, radius), count=32), angle) + away, within="inner"))
    return shapes


def _heart_beside(dice: np.random.Generator, region: Region, centre: np.ndarray, epicardium: np.ndarray) -> list[Shape]:
    """Fat, and the right ventricle as an oval of which the left one covers a part: a crescent is left."""
    radius = float(np.hypot(*(epicardium - centre).T).mean())
    reach = {"apex": 0.72, "mid": 1.0, "base": 1.15}[region] * float(dice.uniform(0.9, 1.1))
    angle = np.pi + 0.3 + dice.normal(0, 0.08)
    middle = centre + radius * (0.52 + 0.26 * reach) * np.array([math.cos(angle), math.sin(angle)])
    half = (radius * 0.80 * reach, radius * 1.24 * reach)
    lean = 0.35 + float(dice.normal(0, 0.08))
    bumps = 1 + 0.022 * _series(dice.normal(size=(2, 2)), _angles(72), 3).clip(-2, 2)[:, None]

    def oval(margin_mm: float) -> np.ndarray:
        return _turned(_oval((0, 0), (half[0] + margin_mm, half[1] + margin_mm)) * bumps, lean) + middle

    fat = float(dice.uniform(3, 8))
    around = centre + (epicardium - centre) * (1 + (1.5 + 0.5 * fat) / radius)
    return [
        Shape("fat", oval(3 + fat), within="chest"), Shape("fat", around, within="chest"),
        Shape("right_wall", oval(3.0), "right_outer"), Shape("right_blood", oval(0.0), "right_cavity"),
    ]  # fmt: skip


def _chest(person: Person, dice: np.random.Generator, region: Region) -> list[Shape]:
    (x, y), (width, height), turn = person.body_centre_mm, person.body_mm, person.turn
    fat, wall = person.fat_mm, person.fat_mm + person.chest_wall_mm

    def layer(margin: float, squareness: float) -> np.ndarray:
        return _oval((x, y), (width - margin * 1.1, height - margin), turn, 90, squareness)

    spine = (x + float(dice.normal(0, 2)), y + height - wall - 14)
    return [
        Shape("fat", layer(0, 2.4)), Shape("skeletal_muscle", layer(fat, 2.4)), Shape("lung", layer(wall, 2.2), "chest"),
        *_vessels(person, dice),
        Shape("fat", _oval((x + 26, y - height + wall + 4), (60, 26), turn, 60), within="chest"),  # in front of the heart
        *_below_the_diaphragm(person, dice, region),
        Shape("skeletal_muscle", _oval((spine[0], spine[1] + 4), (46, 30), turn, 60), within="chest"),
        Shape("fat", _oval((spine[0] + 6, spine[1] - 26), (30, 17), turn, 48), within="chest"),
        Shape("bone", _oval(spine, (19, 16), turn, 48)), Shape("spinal_fluid", _oval((spine[0], spine[1] + 26), (9, 7), turn, 32)),
        Shape("bone", _oval((x + 6, y - height + fat + 0.5 * person.chest_wall_mm), (17, 4.5), turn, 40)),  # the breastbone
        Shape("aortic_blood", _oval((spine[0] + 24, spine[1] - 22), (11.5, 11.5), turn, 48)),
        *_ribs(person, dice),
    ]  # fmt: skip


def _below_the_diaphragm(person: Person, dice: np.random.Generator, region: Region) -> list[Shape]:
    """Liver on the image's left, stomach and spleen on its right; the plane meets less of them towards the base."""
    low = {"apex": 0.0, "mid": 7.0, "base": 20.0}[region] + float(dice.normal(0, 3))
    top, turn = 21 + 0.15 * person.endo_diameter_mm + low, person.turn
    stomach = (26 * float(dice.uniform(0.8, 1.1)), 18 * float(dice.uniform(0.8, 1.1)))
    return [
        Shape("fat", _oval((58, top + 66), (66, 60), turn + 0.2, 72), within="chest"),
        Shape("spleen", _oval((88, top + 62), (20, 38), turn + 0.5, 60), within="chest"),
        Shape("stomach", _oval((46, top + 42), stomach, turn + float(dice.uniform(-0.3, 0.4)), 60), within="chest"),
        Shape("liver", _oval((-78, top + 72), (130, 74), turn + 0.08, 90, 2.2), within="chest"),
    ]


def _vessels(person: Person, dice: np.random.Generator) -> list[Shape]:
    (x, y), (width, height) = person.body_centre_mm, person.body_mm
    shapes = []
    for _ in range(26):
        radius = float(np.exp(dice.uniform(np.log(1.0), np.log(3.6))))
        place = (x + float(dice.uniform(-0.75, 0.75)) * width, y + float(dice.uniform(-0.7, 0.6)) * height)
        oval = _turned(_oval((0, 0), (radius * float(dice.uniform(1, 2.6)), radius), count=10), float(dice.uniform(0, np.pi)))
        shapes.append(Shape("lung_vessel", oval + place, within="chest"))
    return shapes


def _ribs(person: Person, dice: np.random.Generator) -> list[Shape]:
    """Cut obliquely, so they are flat ovals along the chest wall."""
    (x, y), (width, height) = person.body_centre_mm, person.body_mm
    margin = person.fat_mm + 0.6 * person.chest_wall_mm
    shapes = []
    for angle in [*np.arange(-0.95, 0.96, 0.38), *(np.pi + np.arange(-0.95, 0.96, 0.38))]:
        at = float(angle + dice.normal(0, 0.06))
        track = _oval((x, y), (width - 1.1 * margin, height - margin), 0, 360, 2.4)
        step = round(at / (2 * np.pi) * 360)
        way = track[(step + 1) % 360] - track[(step - 1) % 360]
        oval = _turned(_oval((0, 0), (float(dice.uniform(7, 13)), 3.6), count=16), math.atan2(way[1], way[0])) + track[step % 360]
        shapes.append(Shape("bone", _turned(oval, person.turn)))
    return shapes
