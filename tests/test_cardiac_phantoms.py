"""The drawn cardiac cohort: read back by the readers of real ones, its areas, times and spread, and the same bytes each time."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest

from medgen import csv_files
from medgen.cardiac.candidates import FOREIGN
from medgen.cardiac.contours import polygon_area
from medgen.cardiac.map_type import REGIONS
from medgen.cardiac.rasterise import LEFT_VENTRICLE, MYOCARDIUM
from medgen.cardiac.tree import Entry, Index, read_tree
from medgen.data.cardiac_anatomy import ENDO_DIAMETER_MM, LEVEL_SCALE, Person, draw_person, draw_slice
from medgen.data.cardiac_phantoms import TYPES, Parts, draw_grid, draw_map, write_cardiac_phantoms

Medgen = Callable[..., subprocess.CompletedProcess[str]]
Truth = dict[tuple[str, str, str, str], tuple[float, float]]  # (mean ms, mm2) by patient, type, region and tissue
PATIENTS, SEED = 5, 42


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "cohort"
    write_cardiac_phantoms(folder, PATIENTS, SEED)
    return folder


@pytest.fixture(scope="module")
def index(cohort: Path) -> Index:
    return read_tree(cohort)


@pytest.fixture(scope="module")
def truth(cohort: Path) -> Truth:
    rows = [row for _, row in csv_files.read_rows(cohort / "truth.csv")]
    return {(row["patient"], row["type"], row["region"], row["tissue"]): (float(row["mean_ms"]), float(row["area_mm2"])) for row in rows}


def of(truth: Truth, entry: Entry, tissue: str) -> tuple[float, float]:
    return truth[entry.patient, entry.header.type, str(entry.header.region), tissue]


def test_every_map_is_found_with_its_contours(cohort: Path, index: Index) -> None:
    wanted = {(f"Patient ({number})", kind, region) for number in range(1, PATIENTS + 1) for kind in ("T1", "T2") for region in REGIONS}
    assert {(entry.patient, entry.header.type, entry.header.region) for entry in index.entries} == wanted and len(index.entries) == len(wanted)
    assert [(skip.path.name, skip.reason) for skip in index.skipped] == [("truth.csv", FOREIGN)], "all but the truth is part of the cohort"
    assert not index.notes
    assert {entry.header.source.relative_to(cohort).parts[0] for entry in index.entries} == {"2022_11_22", "2023_07_09", "2023_08_15"}
    assert {entry.header.type_from for entry in index.entries} == {"ImageType"}
    assert all(entry.header.unit == "ms" and entry.header.scale == ({"T1": 1.0, "T2": 0.1}[entry.header.type], 0.0) for entry in index.entries)


def test_files_are_as_a_scanner_writes_them(index: Index) -> None:
    uids: dict[str, set[str]] = {}
    for entry in index.entries:
        dataset = pydicom.dcmread(entry.header.source)
        assert dataset.ImageType[2] == f"{entry.header.type} MAP" and dataset.PatientID == entry.patient.replace("(", "").replace(")", "")
        assert (dataset.BitsStored, dataset.PixelRepresentation) == (12, 0) and "RescaleSlope" not in dataset and dataset.pixel_array.max() < 4096
        assert dataset.SOPInstanceUID == dataset.file_meta.MediaStorageSOPInstanceUID
        for level in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
            assert dataset[level].value.is_valid
            uids.setdefault(level, set()).add(dataset[level].value)
    assert [len(uids[level]) for level in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")] == [PATIENTS, 2 * PATIENTS, 6 * PATIENTS]


def test_slices_stand_in_space_as_they_were_drawn(index: Index) -> None:
    """Planes 24 mm apart along their normal, and the contours of T1 and T2, of different pixels, are one curve in the patient."""
    for number in range(1, PATIENTS + 1):
        own = {(entry.header.type, entry.header.region): entry for entry in index.entries if entry.patient == f"Patient ({number})"}
        axes = np.array(own["T1", "mid"].header.orientation).reshape(2, 3)
        np.testing.assert_allclose(axes @ axes.T, np.eye(2), atol=1e-6)
        depth = {key: np.array(entry.header.position_mm) @ np.cross(*axes) for key, entry in own.items()}
        steps = [depth[kind, deep] - depth[kind, far] for kind in TYPES for deep, far in (("mid", "apex"), ("base", "mid"))]
        np.testing.assert_allclose(np.abs(steps), 24, atol=1e-3)
        assert len(set(np.sign(steps))) == 1
        for region in REGIONS:
            first, second = (in_patient(own[kind, region]) for kind in TYPES)
            np.testing.assert_allclose(first, second, atol=2e-3)


def in_patient(entry: Entry) -> np.ndarray:
    points = next(contour.points for contour in entry.contours if contour.kind == "epicardium")
    axes = np.array(entry.header.orientation).reshape(2, 3)
    return np.array(entry.header.position_mm) + points * [entry.header.spacing_mm[1], entry.header.spacing_mm[0]] @ axes


def test_contours_bound_the_areas_that_are_told(index: Index, truth: Truth) -> None:
    """The polygons as read, and the soft masks made of them at another spacing too; labels are whole pixels, so they agree on average."""
    by_labels = []
    for entry in index.entries:
        muscle, cavity = (of(truth, entry, tissue)[1] for tissue in ("myocardium", "left_ventricle"))
        polygons = {contour.kind: polygon_area(contour.points) * entry.grid().pixel_area_mm2 for contour in entry.contours}
        assert polygons["endocardium"] == pytest.approx(cavity, rel=1e-4)
        assert polygons["epicardium"] - polygons["endocardium"] == pytest.approx(muscle, rel=1e-4)
        assert all(60 <= len(contour.points) <= 100 for contour in entry.contours)
        for grid in (entry.grid(), entry.grid().at_spacing((2.2, 1.3))):
            sums = entry.anatomy().shares(grid).sum(axis=(1, 2)) * grid.pixel_area_mm2
            assert sums[[MYOCARDIUM, LEFT_VENTRICLE]] == pytest.approx([muscle, cavity], rel=5e-3)
        labels = entry.anatomy().labels(entry.grid())
        by_labels.append([(labels == label).sum() * entry.grid().pixel_area_mm2 / area - 1 for label, area in ((MYOCARDIUM, muscle), (LEFT_VENTRICLE, cavity))])
    assert np.abs(by_labels).max() < 0.04
    np.testing.assert_allclose(np.mean(by_labels, axis=0), 0, atol=5e-3)


def test_regions_have_the_times_that_are_told(index: Index, truth: Truth) -> None:
    """Within noise and texture where no pixel is shared; over all maps these even out."""
    off: dict[str, list[float]] = {"T1": [], "T2": []}
    for entry in index.entries:
        shares, pixels = entry.anatomy().shares(entry.grid()), entry.load().pixels
        cavity = shares[LEFT_VENTRICLE] > 0.999
        # the outer pixels of the cavity, which hold most of the trabeculae, are left out here, so it is a little brighter
        assert pixels[cavity].mean() == pytest.approx(of(truth, entry, "left_ventricle")[0], rel={"T1": 0.05, "T2": 0.12}[entry.header.type])
        if (entry.patient, entry.header.type, entry.header.region, "lesion") not in truth:
            wall = pixels[shares[MYOCARDIUM] > 0.999].mean()
            off[entry.header.type].append(wall / of(truth, entry, "myocardium")[0] - 1)
    for kind, limit in (("T1", 0.03), ("T2", 0.045)):
        assert np.abs(off[kind]).max() < limit and abs(np.mean(off[kind])) < limit / 3


def test_a_mixed_pixel_is_the_mean_of_its_tissues_by_area() -> None:
    """Without noise, all that is left beside it is the texture, of about 2 %."""
    person = replace(draw_person(3, 1), noise=0.0)
    drawn, grid = draw_slice(person, "mid"), draw_grid(person, "T1", "mid")
    parts = Parts.of(drawn)
    shares = parts.shares(grid)
    np.testing.assert_allclose(sum(shares.values()), 1, atol=1e-9)
    assert min(float(share.min()) for share in shares.values()) >= 0
    for tissue in ("blood", "trabeculae", "papillary", "right_blood", "right_wall"):
        assert shares[tissue].sum() * grid.pixel_area_mm2 == pytest.approx(parts.area_mm2([tissue]), rel=1e-9)
    image = draw_map(person, drawn, parts, "T1", grid).astype(float)
    expected = sum(share * drawn.times.get(tissue, (0.0, 0.0))[0] for tissue, share in shares.items())
    body = np.asarray(expected) > 50
    off = image[body] / np.asarray(expected)[body] - 1
    assert np.abs(off).max() < 0.12 and 0.01 < off.std() < 0.03 and abs(off.mean()) < 0.005
    assert (image[np.asarray(shares["air"]) > 1 - 1e-9] == 0).all()


def test_texture_is_shared_between_the_types() -> None:
    from medgen.data.cardiac_phantoms import _texture

    person = draw_person(3, 1)
    grid = draw_grid(person, "T1", "mid")
    one, other = (_texture(person, "mid", kind, grid).ravel() for kind in TYPES)
    apex = _texture(person, "apex", "T1", grid).ravel()
    assert 0.4 < np.corrcoef(one, other)[0, 1] < 0.85 and abs(np.corrcoef(one, apex)[0, 1]) < 0.3
    assert 0.014 < one.std() < 0.026


def test_the_verb_writes_the_same_bytes_each_time(tmp_path: Path, medgen: Medgen) -> None:
    for name, seed in (("one", 5), ("again", 5), ("other", 6)):
        said = medgen("phantoms", tmp_path / name, "--kind", "cardiac", "--patients", 3, "--seed", seed)
        assert "truth.csv" in said.stdout
    one, again, other = (digests(tmp_path / name) for name in ("one", "again", "other"))
    assert one == again and len(one) == 3 * 12 + 1
    assert set(one) == set(other) and all(one[path] != other[path] for path in one)
    assert "two cohorts must not mix" in medgen("phantoms", tmp_path / "one", "--kind", "cardiac", expect=2).stderr
    assert "'liver' is not one of" in medgen("phantoms", tmp_path / "new", "--kind", "liver", expect=2).stderr


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def people() -> list[Person]:
    return [draw_person(7, number) for number in range(200)]


def test_a_patient_does_not_depend_on_the_size_of_the_cohort(cohort: Path, tmp_path: Path) -> None:
    write_cardiac_phantoms(tmp_path, 1, SEED)
    path = Path("2022_11_22", "Patient (1)", "T2_Mapping_", "Base.dcm")
    assert (tmp_path / path).read_bytes() == (cohort / path).read_bytes()


def test_sizes_are_those_of_hearts(people: list[Person]) -> None:
    diameters: dict[str, list[float]] = {region: [] for region in REGIONS}
    walls, protocols = [], set()
    for person in people:
        for region in REGIONS:
            drawn = draw_slice(person, region)
            endo, epi = polygon_area(drawn.endocardium), polygon_area(drawn.epicardium)
            diameters[region].append(2 * np.sqrt(endo / np.pi))
            walls.append(np.sqrt(epi / np.pi) - np.sqrt(endo / np.pi))
        grids = [draw_grid(person, kind, "mid") for kind in TYPES]
        protocols |= {(max(grid.shape), round(grid.spacing_mm[0], 3)) for grid in grids}
    assert all(0.88 * ENDO_DIAMETER_MM[0] < diameter < 1.12 * ENDO_DIAMETER_MM[1] for diameter in diameters["mid"])
    assert 38 < np.mean(diameters["mid"]) < 44 and np.std(diameters["mid"]) > 3
    assert np.mean(diameters["apex"]) / np.mean(diameters["mid"]) == pytest.approx(LEVEL_SCALE["apex"], rel=0.03)
    assert min(walls) > 5.8 and max(walls) < 12.4 and 7.5 < np.mean(walls) < 9.5
    assert {(192, 1.875), (256, 1.406), (192, 1.562), (256, 1.562)} <= protocols, "a spacing does not tell the size"
    assert len({spacing for _, spacing in protocols}) >= 8


def test_times_spread_between_patients_as_in_a_cohort(people: list[Person]) -> None:
    """Cavity minus muscle of 3,500 maps: 371 +- 75 ms in T1, 75.8 +- 21.2 ms in T2."""
    found = []
    for person in people:
        drawn = draw_slice(person, "mid")
        muscle, lesion, total = np.array(drawn.times["myocardium"]), np.array(drawn.times["lesion"]), polygon_area(drawn.endocardium)
        inner = next(polygon_area(shape.points) for shape in drawn.shapes if shape.name == "inner")
        papillary = sum(polygon_area(shape.points) for shape in drawn.shapes if shape.tissue == "papillary")
        cavity = np.array(drawn.times["blood"]) * (inner - papillary) + muscle * papillary + np.array(drawn.times["trabeculae"]) * (total - inner)
        found.append([*muscle, *(cavity / total - muscle)])
        assert (lesion > muscle).all() == (person.lesion is not None and "mid" in person.lesion.regions)
    mean, spread = np.mean(found, axis=0), np.std(found, axis=0)
    assert 990 < mean[0] < 1040 and 25 < spread[0] < 50 and 48 < mean[1] < 53 and 2 < spread[1] < 5
    assert 350 < mean[2] < 400 and 65 < spread[2] < 85
    assert 70 < mean[3] < 86 and 17 < spread[3] < 26
    assert 20 < sum(person.lesion is not None for person in people) < 60
    assert all((np.array(person.times["blood"]) > np.array(person.times["myocardium"])).all() for person in people)


def test_a_lesion_changes_its_segment_alone() -> None:
    person = next(person for person in (draw_person(7, number) for number in range(200)) if person.lesion and "mid" in person.lesion.regions)
    assert person.lesion is not None
    drawn, grid = draw_slice(person, "mid"), draw_grid(person, "T1", "mid")
    parts = Parts.of(drawn)
    shares, image = parts.shares(grid), draw_map(person, drawn, parts, "T1", grid).astype(float)
    wall = polygon_area(drawn.epicardium) - polygon_area(drawn.endocardium)
    assert 0.03 < parts.area_mm2(["lesion"]) / wall < 0.4
    assert parts.area_mm2(["lesion", "myocardium"]) == pytest.approx(wall, rel=1e-9)
    gained = image[shares["lesion"] > 0.99].mean() - image[shares["myocardium"] > 0.99].mean()
    assert gained == pytest.approx(person.lesion.added_ms[0], abs=40)
