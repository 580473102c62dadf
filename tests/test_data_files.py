"""Single slices in files, resizing, and the geometry between them and the patient."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medgen.data.image_files import FLAT_AFFINE, read_slice, write_slice
from medgen.data.phantoms import write_phantoms, write_volume
from medgen.data.resize import resize_images, resize_masks
from medgen.data.splits import assign_splits
from medgen.data.volumes import display_slices, read_header, read_volume, slice_affine
from medgen.errors import InputError, MedgenError

FRACTIONS = {"train": 0.7, "val": 0.15, "test": 0.15}
SUFFIXES = (".nii.gz", ".png", ".npy")


def blob(height: int, width: int, row: float, column: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return (np.hypot(rows - row, columns - column) <= radius).astype(np.uint8)


def centroid(picture: np.ndarray) -> np.ndarray:
    rows, columns = np.mgrid[: picture.shape[0], : picture.shape[1]]
    return np.array([(rows * picture).sum(), (columns * picture).sum()]) / picture.sum()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_image_round_trip_is_precise(tmp_path: Path, suffix: str) -> None:
    image = np.random.default_rng(0).random((20, 16), dtype=np.float32)
    image[0, 0], image[0, 1] = 0, 1
    write_slice(tmp_path / f"a{suffix}", image, "image", FLAT_AFFINE)
    back = read_slice(tmp_path / f"a{suffix}").array
    assert back.dtype == np.float32 and back.shape == image.shape
    assert np.abs(back - image).max() < 1e-4
    assert back[0, 0] == 0 and back[0, 1] == 1 and back.max() <= 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_mask_round_trip_is_exact(tmp_path: Path, suffix: str) -> None:
    mask = blob(20, 16, 8, 9, 4)
    write_slice(tmp_path / f"a{suffix}", mask, "mask", FLAT_AFFINE)
    back = read_slice(tmp_path / f"a{suffix}").array
    assert back.dtype == np.uint8 and np.array_equal(back, mask)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", ["image", "mask"])
def test_equal_content_is_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, kind: str) -> None:
    array = blob(20, 16, 8, 9, 4)
    write_slice(tmp_path / f"a{suffix}", array, kind, FLAT_AFFINE)  # type: ignore[arg-type]
    monkeypatch.setattr("time.time", lambda: 1e9)  # a gzip header would hold it
    write_slice(tmp_path / f"other_name{suffix}", array, kind, FLAT_AFFINE)  # type: ignore[arg-type]
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"other_name{suffix}").read_bytes()


def test_nifti_slice_opens_in_other_tools_with_its_spacing(tmp_path: Path) -> None:
    affine = np.array([[0, -2.0, 0, 10], [-3.0, 0, 0, 20], [0, 0, 5.0, 30], [0, 0, 0, 1]])
    image = np.linspace(0, 1, 12, dtype=np.float32).reshape(4, 3)
    write_slice(tmp_path / "a.nii.gz", image, "image", affine)
    loaded = nibabel.load(tmp_path / "a.nii.gz")
    assert loaded.shape == (4, 3, 1)
    assert np.allclose(loaded.get_fdata()[:, :, 0], image, atol=1e-4)
    assert np.allclose(loaded.affine, affine) and loaded.header.get_data_dtype() == np.uint16
    assert np.allclose(loaded.header.get_zooms(), (3, 2, 5))
    assert read_slice(tmp_path / "a.nii.gz").spacing_mm == (3, 2)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_cut_and_missing_files_are_told(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    with pytest.raises(InputError, match="no such file"):
        read_slice(path)
    write_slice(path, np.random.default_rng(0).random((32, 32)), "image", FLAT_AFFINE)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=r"a\..*cannot be read.*cut short"):
        read_slice(path)


def test_values_that_would_change_on_disk_are_refused(tmp_path: Path) -> None:
    for bad in (np.full((4, 4), 1.5), np.full((4, 4), -0.1), np.full((4, 4), np.nan)):
        with pytest.raises(MedgenError, match=r"\[0, 1\]"):
            write_slice(tmp_path / "a.png", bad, "image", FLAT_AFFINE)
    with pytest.raises(MedgenError, match="0 and 1 only"):
        write_slice(tmp_path / "a.png", np.full((4, 4), 2), "mask", FLAT_AFFINE)
    with pytest.raises(InputError, match="unknown image format"):
        write_slice(tmp_path / "a.jpg", np.zeros((4, 4)), "image", FLAT_AFFINE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("height", "width"), [(60, 60), (60, 40), (33, 61)])
@pytest.mark.parametrize("size", [16, 24, 60, 100])
def test_images_and_masks_share_pixel_centres(height: int, width: int, size: int) -> None:
    mask = blob(height, width, 0.6 * height, 0.35 * width, 9)
    small_image = resize_images(mask[None].astype(np.float32), size)[0]
    small_mask = resize_masks(mask[None], size)[0]
    assert small_image.shape == small_mask.shape == (size, size)
    assert np.abs(centroid(small_image) - centroid(small_mask)).max() < 0.5
    side = max(height, width)
    padding = np.array([(side - height) // 2, (side - width) // 2])
    expected = (centroid(mask) + padding + 0.5) * size / side - 0.5
    assert np.abs(centroid(small_image) - expected).max() < 0.1


def test_resizing_is_antialiased_and_keeps_range_and_labels() -> None:
    stripes = np.zeros((1, 64, 64), np.float32)
    stripes[:, :, ::2] = 1
    small = resize_images(stripes, 16)
    assert np.abs(small[:, :, 1:-1] - 0.5).max() < 0.1  # without antialiasing the stripes would be 0 or 1
    assert small.min() >= 0 and small.max() <= 1
    labels = (np.arange(50 * 50) % 5).reshape(1, 50, 50).astype(np.uint8)
    assert set(np.unique(resize_masks(labels, 33))) <= {0, 1, 2, 3, 4}


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SPR", "AIL"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_slice_lands_where_its_voxels_were(tmp_path: Path, codes: str, axis: int) -> None:
    """Paint one block of voxels, find it in the resized slice, and compare millimetres: for every stored order."""
    from nibabel import orientations

    canonical = np.zeros((22, 30, 26), np.int16)
    canonical[12:16, 6:10, 14:18] = 100
    affine = np.diag([1.5, 2.0, 2.5, 1])
    affine[:3, 3] = [-7, 11, 3]
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(codes))
    stored = orientations.apply_orientation(canonical, turn)
    stored_affine = affine @ orientations.inv_ornt_aff(turn, canonical.shape)
    path = tmp_path / "a.nii.gz"
    write_volume(path, stored, stored_affine)
    expected_mm = (affine @ [13.5, 7.5, 15.5, 1])[:3]

    header = read_header(path)
    number = [13, 7, 15][axis]
    picture = resize_images(display_slices(read_volume(path), axis)[number : number + 1].astype(np.float32), 40)[0]
    row, column = centroid(picture)
    found_mm = (slice_affine(header, axis, number, 40) @ [row, column, 0.5, 1])[:3]
    # interpolation moves the centroid a little; half a pixel would be 0.5 mm or more
    assert np.abs(found_mm - expected_mm).max() < 0.1


def test_display_is_upright(tmp_path: Path) -> None:
    """Axial: anterior on top, the patient's left on the right; coronal and sagittal: superior on top."""
    volume = np.zeros((4, 5, 6), np.int16)
    volume[0, 4, 5] = 9  # left, anterior, superior corner of a RAS volume
    write_volume(tmp_path / "a.nii.gz", volume, np.eye(4))
    read = read_volume(tmp_path / "a.nii.gz")
    assert display_slices(read, 2)[5][0, -1] == 9
    assert display_slices(read, 1)[4][0, -1] == 9
    assert display_slices(read, 0)[0][0, 0] == 9  # sagittal: the nose points to the left of the picture


def test_phantoms_are_the_same_bytes_and_look_like_contrast_mri(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_phantoms(tmp_path / name, patients=4, seed=5, shape=(32, 32, 16))
    write_phantoms(tmp_path / "other", patients=4, seed=6, shape=(32, 32, 16))
    paths = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.nii.gz"))
    assert len(paths) == 16 and {path.parts[0] for path in paths} == {"train", "val", "test"}
    assert all((tmp_path / "first" / path).read_bytes() == (tmp_path / "second" / path).read_bytes() for path in paths)
    assert any(
        not (tmp_path / "other" / path).exists()
        or (tmp_path / "first" / path).read_bytes() != (tmp_path / "other" / path).read_bytes()
        for path in paths
    )
    for folder in sorted({path.parent for path in paths}):
        volumes = {name: read_volume(tmp_path / "first" / folder / f"{name}.nii.gz") for name in ("t1_pre", "t1_gd", "bravo", "seg")}
        seg, brain = volumes["seg"] > 0, volumes["t1_pre"] > 0
        assert 0.15 < brain.mean() < 0.6 and not brain[0].any() and not brain[:, -1].any()
        assert seg.any() and set(np.unique(volumes["seg"])) == {0, 1} and not (seg & ~brain).any()
        rest = brain & ~seg
        # enhancement: the brightest part of a lesion beats the tissue after contrast and not before
        for name, brighter in (("t1_gd", True), ("bravo", True), ("t1_pre", False)):
            ratio = np.percentile(volumes[name][seg], 90) / np.percentile(volumes[name][rest], 75)
            assert (ratio > 1.05) == brighter, (folder, name, ratio)
    first = gzip.decompress((tmp_path / "first" / paths[0]).read_bytes())
    assert nibabel.Nifti1Header.from_fileobj(__import__("io").BytesIO(first)).get_zooms() == (6, 6, 9)


def test_a_phantom_is_the_same_head_at_every_shape() -> None:
    from medgen.data.phantoms import draw_patient

    large, _ = draw_patient(3, 0, (48, 48, 24))
    small, _ = draw_patient(3, 0, (24, 24, 12))
    shrunk = (large["t1_pre"] > 0).reshape(24, 2, 24, 2, 12, 2).mean(axis=(1, 3, 5)) > 0.5
    overlap = 2 * (shrunk & (small["t1_pre"] > 0)).sum() / (shrunk.sum() + (small["t1_pre"] > 0).sum())
    assert overlap > 0.93


def test_splits_are_by_patient_seeded_and_never_empty() -> None:
    names = [f"p{number}" for number in range(20)]
    first = assign_splits(names, FRACTIONS, 1)
    assert first == assign_splits(names[::-1], FRACTIONS, 1) != assign_splits(names, FRACTIONS, 2)
    assert [list(first.values()).count(split) for split in ("train", "val", "test")] == [14, 3, 3]
    assert set(assign_splits(["a", "b", "c"], FRACTIONS, 1).values()) == {"train", "val", "test"}
    assert set(assign_splits(["a", "b"], {"train": 0.5, "val": 0, "test": 0.5}, 1).values()) == {"train", "test"}
    with pytest.raises(InputError, match=r"2 patients cannot be split.*at least 3"):
        assign_splits(["a", "b"], FRACTIONS, 1)
