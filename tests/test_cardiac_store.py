"""Cardiac images in the slice store: what canvas they are put on, at which spacing, in whose millimetres, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dicom_writing import map_dataset, save, values
from test_cardiac_tree import SHAPE, circle, write_contours, write_map, write_patient

from medgen.cardiac.contours import polygon_area
from medgen.cardiac.rasterise import Grid
from medgen.data.maps import Canvas, Native, canvas_of, resample
from medgen.data.store import SliceStore, open_store
from medgen.dist import Ranks
from medgen.errors import InputError
from medgen.models.base import Phase
from medgen.models.sdm.config import Config
from medgen.spec_data import DataSpec
from medgen.training import Training


def native(shape: tuple[int, int] = (64, 48), spacing_mm: tuple[float, float] = (1.5, 1.5), heart: tuple[float, float, float, float] = (16, 44, 10, 38)) -> Native:
    return Native(shape, spacing_mm, 0, (0, 0), (0.0, 1.0), heart)


def spec(root: Path, **more: Any) -> DataSpec:
    return DataSpec.model_validate({"format": "cardiac", "root": root, "size": 64, "windows_ms": {"T1": [0, 4500], "T2": [0, 450]}, **more})


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four patients with T1 and T2 maps of three levels; each Contours.json has circles of 14 and 9 pixels around (24, 30)."""
    root = tmp_path_factory.mktemp("cohort")
    for number in range(1, 5):
        write_patient(root / f"Patient ({number})", PatientID=f"P{number}", SeriesDescription=f"MOCO {number}")
        for kind in ("T1", "T2"):
            for place, level in enumerate(("Apex", "Mid", "Base")):  # no image twice
                write_map(root / f"Patient ({number})" / f"{kind}_Mapping_" / f"{level}.dcm", kind, PatientID=f"P{number}", SmallestImagePixelValue=100 * number + place)
    return root


@pytest.fixture(scope="module")
def store(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> SliceStore:
    return open_store(spec(cohort, splits={"train": 0.5, "val": 0.25, "test": 0.25}), 1, tmp_path_factory.mktemp("cache"), lambda _: None)


def test_smaller_images_are_padded_around_and_larger_ones_cut_around_the_heart() -> None:
    padded = canvas_of(native(), (1.5, 1.5), 64)
    assert padded.inside == (0, 64, 8, 56) and padded.field_mm == (96.0, 72.0)
    assert padded.grid.origin_mm == (0.0, -12.0), "the first pixel of the canvas lies 8 columns before the image"
    assert padded.valid().sum() == 64 * 48 and padded.valid()[:, 8:56].all()
    cut = canvas_of(native(), (1.5, 1.5), 32)
    rows, columns = (cut.grid.origin_mm[axis] / 1.5 + np.array([0, 31]) for axis in (0, 1))
    assert cut.inside == (0, 32, 0, 32) and np.allclose([rows.mean(), columns.mean()], [30, 24], atol=0.5), "its middle is the heart's"
    at_the_edge = canvas_of(native(heart=(-0.5, 10, 30, 47)), (1.5, 1.5), 32)
    assert at_the_edge.grid.origin_mm == (0.0, 16 * 1.5), "a canvas does not leave the image"


@pytest.mark.parametrize("shift", [(-1.0, -1.0), (1.0, 1.0), (0.3, -0.7)])
def test_a_moved_canvas_keeps_the_heart(shift: tuple[float, float]) -> None:
    found = canvas_of(native((200, 200), heart=(90, 118, 80, 108)), (1.5, 1.5), 64, shift)
    for axis, (low, high) in enumerate(((90, 118), (80, 108))):
        first = found.grid.origin_mm[axis] / 1.5
        assert first <= low - 3 and high + 3 <= first + 63
    assert found != canvas_of(native((200, 200), heart=(90, 118, 80, 108)), (1.5, 1.5), 64)


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.31, 2.0])
def test_resampling_keeps_places_and_the_range_of_values(factor: float) -> None:
    grid = Grid((40, 30), (1.5, 1.2))
    rows, columns = np.meshgrid(np.arange(40) * 1.5, np.arange(30) * 1.2, indexing="ij")
    wanted = Grid((40, 30), (1.5, 1.2)).at_spacing((1.5 * factor, 1.2 * factor))
    canvas = Canvas(wanted, (0, wanted.shape[0], 0, wanted.shape[1]))
    found = resample(3 * rows - 2 * columns, grid, canvas)
    at = [wanted.origin_mm[axis] + np.arange(wanted.shape[axis]) * wanted.spacing_mm[axis] for axis in (0, 1)]
    inner = (slice(3, -3), slice(3, -3))  # at the edges the last pixels stand for what lies beyond
    shifted_pixels = 0.0 if factor in (0.7, 1.0, 2.0) else 0.08  # triangles of no whole width are a little lopsided on a lattice
    assert np.abs(found - (3 * at[0][:, None] - 2 * at[1][None]))[inner].max() <= shifted_pixels * (3 * 1.5 + 2 * 1.2) + 1e-9
    noise = np.random.default_rng(0).uniform(200, 900, (40, 30))
    assert resample(noise, grid, canvas).min() >= 200 and resample(noise, grid, canvas).max() <= 900
    assert np.allclose(resample(np.full((40, 30), 7.0), grid, canvas), 7)


def test_coarser_pixels_are_means_and_not_samples() -> None:
    stripes = np.tile([0.0, 1.0], (32, 16))
    canvas = canvas_of(native((32, 32), heart=(8, 24, 8, 24)), (3.0, 3.0), 16)
    assert np.abs(resample(stripes, Grid((32, 32), (1.5, 1.5)), canvas)[:, 1:-1] - 0.5).max() < 1e-9, "alternating columns would alias to 0 or 1"


def test_at_its_own_spacing_an_image_is_what_the_file_holds(store: SliceStore) -> None:
    assert store.maps is not None and store.size == 64 and len(store.rows) == 24
    for row in (0, 5, 23):
        placed = store.maps.place(row, store.maps.canvas(row))
        low, high = store.rows[["window_low_image", "window_high_image"]].iloc[row]
        file = store.maps.pixels(row)
        assert np.allclose(placed.image[:, 8:56], (file - low) / (high - low), atol=1e-6) and not placed.image[:, :8].any() and not placed.image[:, 56:].any()
        assert np.array_equal(placed.image, store.images("image", np.array([row]))[0]) and np.array_equal(placed.labels, store.masks(np.array([row]))[0])
    assert store.regions == ("myocardium", "left_ventricle") and store.classes == ("T1", "T2")
    assert np.array_equal(store.valid(np.array([0]))[0], store.maps.canvas(0).valid())
    # the file's spacing is 1.40625 between rows and 1.5 between columns
    assert np.allclose(store.sizes_mm(np.array([3])), [[[1.40625, 1.5], [64 * 1.40625, 48 * 1.5]]])


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4, 2.0])
def test_masks_have_the_area_of_their_contours_at_any_spacing(store: SliceStore, factor: float) -> None:
    assert store.maps is not None
    placed = store.maps.respaced(2, factor, (0.0, 0.0))
    pixel_mm2, own_mm2 = np.prod(placed.canvas.grid.spacing_mm), 1.40625 * 1.5
    wanted = [polygon_area(circle(radius)) * own_mm2 for radius in (14, 9)]
    assert (placed.labels > 0).sum() * pixel_mm2 == pytest.approx(wanted[0], rel=0.02) and (placed.labels == 2).sum() * pixel_mm2 == pytest.approx(wanted[1], rel=0.04)


def test_millimetres_are_those_of_the_file(store: SliceStore) -> None:
    """DICOM PS3.3 C.7.6.2.1.1: position + column * spacing * row cosines + row * spacing * column cosines, in LPS."""
    affine = store.affine(4)
    for row, column in ((0, 0), (10, 3), (63, 47)):
        lps = np.array([-120.5, -90.25, 33.0]) + column * 1.5 * np.array([1, 0, 0]) + row * 1.40625 * np.array([0, 0.8, -0.6])
        assert np.allclose(affine @ [row, column + 8, 0, 1], [-lps[0], -lps[1], lps[2], 1]), "8 columns of padding come first"
    assert np.linalg.norm(affine[:3, 2]) == pytest.approx(8)


def test_the_mean_of_each_region_is_that_of_its_pixels(store: SliceStore) -> None:
    assert store.maps is not None
    row = int(np.flatnonzero(store.rows["label"] == "T2")[0])
    pixels, labels = store.maps.pixels(row), store.maps.anatomy(row).labels(store.maps.natives[row].grid)
    assert store.rows["mean_myocardium"][row] == pytest.approx(pixels[labels == 1].mean(), rel=1e-6)
    assert store.rows["mean_left_ventricle"][row] == pytest.approx(pixels[labels == 2].mean(), rel=1e-6)
    assert store.rows["unit"][row] == "ms" and 90 < store.rows["mean_myocardium"][row] < 400, "T2 is stored in tenths of a ms"


def test_patients_are_in_one_split_with_all_their_images(store: SliceStore) -> None:
    assert store.rows.groupby("patient")["split"].nunique().eq(1).all() and dict(store.rows.groupby("split")["patient"].nunique()) == {"train": 2, "val": 1, "test": 1}


def test_another_contour_is_another_cache(cohort: Path, tmp_path: Path) -> None:
    root = tmp_path / "cohort"
    shutil.copytree(cohort, root)
    before = open_store(spec(root), 1, tmp_path / "cache", lambda _: None)
    write_contours(root / "Patient (2)/T2_map_base/Contours.json", epicardium=circle(15))
    after = open_store(spec(root), 1, tmp_path / "cache", lambda _: None)
    changed = np.flatnonzero(before.rows["mask_pixels"].to_numpy() != after.rows["mask_pixels"].to_numpy())
    assert before.fingerprint != after.fingerprint and list(after.rows["id"].to_numpy()[changed]) == ["Patient_2_T2_base"]


@pytest.mark.parametrize(("columns", "before", "after"), [
    ("type,ms_per_value", "T2,0.05", "T2,0.06"), ("type,first_pixel_centre", "T2,", "T2,0.5"), ("type,region", "T2,mid", "T2,apex"), ("type,contour_image", "T2,first", "T2,second"),
])  # fmt: skip
def test_what_a_manifest_says_is_part_of_the_data(tmp_path: Path, columns: str, before: str, after: str) -> None:
    """The files are the same, and the maps, their masks or their levels are not."""
    table = ["kind,column_px,row_px,image"]
    table += [f"{kind},{x + shift},{y},{name}" for name, shift in (("first", 0), ("second", 4)) for kind, radius in (("epicardium", 14), ("endocardium", 9)) for x, y in circle(radius)]
    (tmp_path / "curves.csv").write_text("\n".join(table))
    for number in range(3):
        write_map(tmp_path / f"{number}.dcm", "T2", SmallestImagePixelValue=number)
    stores = []
    for values_given in (before, after):
        image_of_file = "" if "contour_image" in columns else ",contour_image"
        lines = [f"{number}.dcm,p{number},curves.csv,{values_given}{',first' if image_of_file else ''}" for number in range(3)]
        (tmp_path / "manifest.csv").write_text("\n".join([f"image,patient,contours,{columns}{image_of_file}", *lines]))
        stores.append(open_store(spec(tmp_path / "manifest.csv"), 1, tmp_path / "cache", lambda _: None))
    assert stores[0].fingerprint != stores[1].fingerprint
    what = {"ms_per_value": "mean_myocardium", "region": "level"}.get(columns.partition(",")[2])
    if what is not None:
        assert (stores[0].rows[what] != stores[1].rows[what]).all()
    else:
        assert not np.array_equal(stores[0].masks(np.arange(3)), stores[1].masks(np.arange(3)))


def test_a_window_in_which_muscle_is_black_is_told(cohort: Path, tmp_path: Path) -> None:
    told: list[str] = []
    open_store(spec(cohort, windows_ms={"T1": [0, 4500], "T2": [0, 100_000]}), 1, tmp_path / "cache", told.append)
    (note,) = (line for line in told if "so wide" in line)
    assert note.startswith("the window of T2, 0 to 100000 ms, is so wide that its myocardium lies at 0.")


def test_the_second_of_two_contour_files_counts_too(sunnybrook: Path, tmp_path: Path) -> None:
    root = tmp_path / "scd"
    shutil.copytree(sunnybrook, root)
    before = open_store(spec(root), 1, tmp_path / "cache", lambda _: None)
    row = int(np.flatnonzero(before.rows["file_seg"].str.contains("icontour"))[0])
    outer = Path(str(before.rows["file_seg"][row]).replace("icontour", "ocontour").replace("i-contours", "o-contours"))
    outer.chmod(0o644)
    points = np.loadtxt(outer)
    np.savetxt(outer, points.mean(axis=0) + 1.02 * (points - points.mean(axis=0)))
    after = open_store(spec(root), 1, tmp_path / "cache", lambda _: None)
    assert before.fingerprint != after.fingerprint and after.rows["mask_pixels"][row] > before.rows["mask_pixels"][row]


def test_cine_frames_are_windowed_by_their_own_percentiles(sunnybrook: Path, tmp_path: Path) -> None:
    store = open_store(spec(sunnybrook, window={"percentiles": [1, 99]}), 1, tmp_path / "cache", lambda _: None)
    assert store.maps is not None and store.classes == ("cine",) and set(store.rows["unit"]) == {"1"}
    pixels = store.maps.pixels(7)
    assert store.rows[["window_low_image", "window_high_image"]].iloc[7].to_numpy() == pytest.approx(np.percentile(pixels[pixels != 0], [1, 99]))


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({"windows_ms": {"T2": [0, 50]}}, "(?s)12 images cannot be used; .*\\n  patient .*: the median T2 of the myocardium is .* ms .*, outside the window .*\\n  and 7 more"),
        ({"types": ["cine"]}, "no image of type cine with contours is left; the types there are: T1, T2"),
    ],
)
def test_what_cannot_be_is_told_with_the_file(cohort: Path, tmp_path: Path, more: dict[str, Any], wanted: str) -> None:
    with pytest.raises(InputError, match=wanted):
        open_store(spec(cohort, **more), 1, tmp_path / "cache", lambda _: None)


def test_a_unit_that_no_heart_has_is_refused_with_the_file(cohort: Path, tmp_path: Path) -> None:
    root = tmp_path / "cohort"
    shutil.copytree(cohort, root)
    odd = root / "Patient (3)" / "T2_Mapping_" / "Mid.dcm"
    save(odd, map_dataset(values(*SHAPE) // 20, ("DERIVED", "PRIMARY", "T2 MAP"), PatientID="P3"))  # as if tenths of a ms had been rounded to ms
    with pytest.raises(InputError, match=r"T2_Mapping_/Mid.dcm: the median T2 of the myocardium is .* and no heart has less than 15 .* ms_per_value into a manifest"):
        open_store(spec(root), 1, tmp_path / "cache", lambda _: None)


def test_hearts_that_are_cut_and_contours_beside_the_heart_are_told(cohort: Path, tmp_path: Path) -> None:
    told: list[str] = []
    open_store(spec(cohort, size=24), 1, tmp_path / "cache", told.append)
    assert any("24 of 24 hearts are larger than data.size: 24 pixels, and are cut; data.size: 48 holds them all" in note for note in told)
    told.clear()
    open_store(spec(cohort, size=48), 1, tmp_path / "cache", told.append)
    assert not any("larger" in note for note in told)
    # rows get brighter downwards in these images, so a cavity at the upper edge of its wall is darker than the muscle
    root = tmp_path / "moved"
    shutil.copytree(cohort, root)
    write_contours(root / "Patient (1)" / "T1_map_apex" / "Contours.json", endocardium=circle(9, (24, 26)))
    open_store(spec(root), 1, tmp_path / "cache", told.append)
    assert any(note.startswith("in 1 images blood is no brighter than muscle (Patient_1_T1_apex)") for note in told)


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({"axis": 1}, "axis has no effect with format: cardiac"),
        ({"mask": "seg.nii.gz"}, "mask has no effect with format: cardiac"),
        ({"positive_only": True}, "positive_only has no effect"),
        ({"window": {"fixed": [0, 1]}}, "windows_ms says it"),
        ({"windows_ms": {"T1": [900, 100]}}, "windows_ms.T1: two numbers of ms that rise"),
        ({"windows_ms": {"cine": [0, 1]}}, "cine frames have no ms"),
        ({"types": ["T1", "T1"]}, "at most once"),
        ({"format": "nifti", "images": {"t1": "a.nii"}, "windows_ms": {}, "types": ["T1"]}, "types has no effect with format: nifti"),
        ({"format": "nifti", "images": {"valid": "a.nii"}, "windows_ms": {}}, "the name 'valid' is kept"),
    ],
)
def test_keys_without_effect_are_refused(tmp_path: Path, more: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        spec(tmp_path, **more)


def test_the_resolved_form_reads_back(tmp_path: Path) -> None:
    found = spec(tmp_path, windows_ms={"T2": [0, 150]})
    assert DataSpec.model_validate(found.model_dump(mode="json")) == found and found.windows_ms == {"T1": (0, 2500), "T2": (0, 150)}


def training_on(store: SliceStore, rank: int = 0, world_size: int = 1) -> Training:
    """As the loop has it, of a family that brings half of its images to other spacings."""
    config = Config.model_validate({"respacing": {"factors": [0.8, 1.6], "share": 0.5}, "batch_size": 24, "channels": 8, "head_channels": 8})
    ranks = Ranks(rank, world_size, rank, torch.device("cpu"))
    work: Any = SimpleNamespace(plan=SimpleNamespace(seed=7), stage=SimpleNamespace(name="train"))
    nothing: Any = None
    return Training(work, ranks, config, {store.size: store}, store.select("train"), np.array([], dtype=int), nothing, nothing, [Phase("main", 10, 24, store.size)], nothing)


def test_half_of_the_training_images_come_at_another_spacing_with_their_sizes_told(store: SliceStore) -> None:
    training, changed, factors = training_on(store), 0, []
    whole_mm2 = polygon_area(circle(14)) * 1.40625 * 1.5
    for step in range(4):
        batch = training.batch_of_step(step)
        assert batch.sizes is not None and batch.labels is not None
        inside = batch.channels["valid"]
        for place in range(len(batch)):
            row_mm, column_mm = batch.sizes.spacing_mm[place].tolist()
            factors.append(row_mm / 1.40625)
            changed += abs(factors[-1] - 1) > 1e-6
            assert column_mm / row_mm == pytest.approx(1.5 / 1.40625, rel=1e-5)
            rows, columns = inside[place, 0].any(dim=1).sum(), inside[place, 0].any(dim=0).sum()
            assert batch.sizes.field_mm[place].tolist() == pytest.approx([float(rows) * row_mm, float(columns) * column_mm], rel=1e-5)
            area_mm2 = float((batch.channels["seg"][place] > 0).sum()) * row_mm * column_mm
            assert area_mm2 == pytest.approx(whole_mm2, rel=0.05), "the whole heart is there, and as large as ever"
            assert not batch.channels["image"][place][inside[place] == 0].any()
    assert 0.35 < changed / 96 < 0.65 and 0.8 <= min(factors) < 0.9 and 1.4 < max(factors) <= 1.6


def test_what_is_respaced_and_how_depends_on_the_place_in_the_training_alone(store: SliceStore) -> None:
    whole, again = training_on(store).batch_of_step(3), training_on(store).batch_of_step(3)
    parts = [training_on(store, rank, 2).batch_of_step(3) for rank in (0, 1)]
    for name, channel in whole.channels.items():
        assert torch.equal(channel, again.channels[name]) and torch.equal(channel, torch.cat([part.channels[name] for part in parts]))
    assert whole.sizes is not None
    assert torch.equal(whole.sizes.spacing_mm, torch.cat([part.sizes.spacing_mm for part in parts if part.sizes is not None]))
    assert not torch.equal(whole.sizes.spacing_mm, training_on(store).batch_of_step(4).sizes.spacing_mm)  # type: ignore[union-attr]


def test_validation_sees_images_as_they_were_acquired(store: SliceStore) -> None:
    batch = training_on(store).batch(store.select("val"), list(range(len(store.select("val")))), "val")
    assert batch.sizes is not None and torch.equal(batch.sizes.spacing_mm, torch.tensor([[1.40625, 1.5]]).expand(len(batch), 2))
