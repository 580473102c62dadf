"""The slice cache: what it holds, when it is built again, and several processes at once."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from medgen import files
from medgen.data import array_files
from medgen.data.image_files import write_slice
from medgen.data.phantoms import write_volume
from medgen.data.store import SliceStore, check_headers, open_store
from medgen.data.summary import contact_sheet, histogram, print_summary, summarise
from medgen.data.volumes import read_volume
from medgen.errors import InputError, MedgenError
from medgen.spec_data import DataSpec

REPOSITORY = Path(__file__).parent.parent
SHAPE = (20, 14, 6)


def make_patient(folder: Path, number: int, shape: tuple[int, int, int] = SHAPE, affine: np.ndarray | None = None) -> None:
    """A noisy box with background around it; the mask (labels 1 and 4) is in slices 2 and 3; slice 0 is empty."""
    generator = np.random.default_rng(number)
    image = np.zeros(shape, np.int16)
    image[4:16, 3:11, 1:] = generator.integers(100, 1000, (12, 8, shape[2] - 1))
    mask = np.zeros(shape, np.uint8)
    mask[6:10, 5:9, 2:4] = 1
    mask[6:8, 5:9, 3] = 4
    affine = np.diag([1.0, 1.0, 3.0, 1]) if affine is None else affine
    write_volume(folder / "t1.nii.gz", image, affine)
    write_volume(folder / "t2.nii.gz", (1000 - image) * (image > 0), affine)
    write_volume(folder / "seg.nii.gz", mask, affine)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, place in enumerate(("train/a", "train/b", "val/c", "test/d")):
        make_patient(tmp_path / "set" / place, number)
    return tmp_path / "set"


def spec(root: Path, **changes: object) -> DataSpec:
    return DataSpec.model_validate({"root": root, "images": {"t1": "t1.nii.gz"}, "mask": "seg.nii.gz", "size": 16, **changes})


def opened(data: DataSpec, cache: Path, seed: int = 1) -> tuple[SliceStore, list[str]]:
    said: list[str] = []
    return open_store(data, seed, cache, said.append), said


def test_rows_images_masks_and_windows(root: Path, tmp_path: Path) -> None:
    store, _ = opened(spec(root, images={"t1": "t1.nii.gz", "t2": "t2.nii.gz"}), tmp_path / "cache")
    assert store.channels == ["t1", "t2"] and store.size == 16
    assert len(store.rows) == 4 * 5 and store.rows["id"].is_unique  # slice 0 is empty
    train = store.select("train")
    assert list(store.rows["patient"].iloc[train].unique()) == ["a", "b"]
    images, masks = store.images("t1", train), store.masks(train)
    assert images.shape == masks.shape == (10, 16, 16) and images.dtype == np.float32 and masks.dtype == np.uint8
    assert images.min() == 0 and 0.5 < images.max() <= 1 and set(np.unique(masks)) == {0, 1}
    positive = store.select("train", positive_only=True)
    assert list(store.rows["slice"].iloc[positive]) == [2, 3, 2, 3]
    assert (store.masks(positive).sum((1, 2)) == store.rows["mask_pixels"].iloc[positive]).all()
    first = store.rows.iloc[0]
    voxels = read_volume(root / "train/a/t1.nii.gz")
    assert first["window_low_t1"] == voxels[voxels > 0].min()
    assert first["window_high_t1"] == pytest.approx(np.percentile(voxels[voxels > 0], 99.5))
    assert first["content"] == pytest.approx((voxels[:, :, 1] > first["window_low_t1"]).mean() , abs=0.02)
    assert first["spacing_x_mm"] == pytest.approx(20 / 16) and first["thickness_mm"] == pytest.approx(3)
    assert first["file_t1"] == str(root / "train/a/t1.nii.gz")
    assert first["sha256_t1"] == files.sha256_file(root / "train/a/t1.nii.gz")
    assert first["label"] is None and first["caption"] is None


TWO = {"t1": "t1.nii.gz", "gd": "gd.nii.gz"}


def with_contrast(root: Path, factor: float = 1.5) -> Path:
    """Beside every t1 a gd that is so many times as bright everywhere, and in the mask again as much."""
    import nibabel

    for path in root.glob("*/*/t1.nii.gz"):
        image, mask = nibabel.load(path), nibabel.load(path.with_name("seg.nii.gz"))
        brighter = np.asarray(image.dataobj) * factor * np.where(np.asarray(mask.dataobj) > 0, factor, 1)
        write_volume(path.with_name("gd.nii.gz"), brighter.astype(np.float32), image.affine)
    return root


def test_joint_channels_keep_what_one_is_brighter_than_the_other(root: Path, tmp_path: Path) -> None:
    """The slices have the voxels of the files (20 px), so the window can be undone and the factors must come back."""
    with_contrast(root)
    ratios = {}
    for joint in (None, ["t1", "gd"]):
        store, _ = opened(spec(root, images=TWO, size=20, window={"percentiles": [0, 99.5], "joint": joint}), tmp_path / "cache")
        every = np.arange(len(store.rows))
        t1, gd, masks = store.images("t1", every), store.images("gd", every), store.masks(every)
        inside = (t1 > 0.05) & (t1 < 1) & (gd > 0) & (gd < 1)
        low, high = (store.rows[f"window_{end}_t1"].to_numpy()[:, None, None] if joint else np.float64(end == "high") for end in ("low", "high"))
        before, after = t1 * (high - low) + low, gd * (high - low) + low
        ratios[bool(joint)] = [after[where] / before[where] for where in (inside & (masks == 0), inside & (masks == 1))]
        assert min(map(len, ratios[bool(joint)])) > 20
        if joint:
            for end in ("low", "high"):
                assert (store.rows[f"window_{end}_t1"] == store.rows[f"window_{end}_gd"]).all()
            per_patient = store.rows.drop_duplicates("patient")
            assert per_patient["window_high_t1"].is_unique, "each patient has a window of its own"
            voxels = [read_volume(root / "train/a" / name) for name in TWO.values()]
            assert per_patient["window_high_t1"].iloc[0] == pytest.approx(max(np.percentile(volume[volume > 0], 99.5) for volume in voxels))
            assert per_patient["window_low_t1"].iloc[0] == min(volume[volume > 0].min() for volume in voxels)
    np.testing.assert_allclose(ratios[True][0], 1.5, rtol=1e-4)
    np.testing.assert_allclose(ratios[True][1], 2.25, rtol=1e-4)
    assert np.median(ratios[False][0]) < 1.1, "each by its own percentiles, both look alike"


def test_a_joint_window_is_another_cache_and_the_old_ones_stay_valid(root: Path, tmp_path: Path) -> None:
    with_contrast(root)
    apart, _ = opened(spec(root, images=TWO), tmp_path / "cache")
    joint, said = opened(spec(root, images=TWO, window={"percentiles": [0, 99.5], "joint": ["t1", "gd"]}), tmp_path / "cache")
    assert joint.fingerprint != apart.fingerprint and any("building" in line for line in said)
    # as caches were named before a window could be joint
    how = {"size": 16, "window": {"percentiles": [0.0, 99.5], "fixed": None}, "mask_labels": None, "axis": 2, "content": 0.05, "positive_only": False, "every": 1}
    what = [
        [name, name, split, None, None, {role: files.sha256_file(root / split / name / file) for role, file in {**TWO, "seg": "seg.nii.gz"}.items()}]
        for name, split in (("a", "train"), ("b", "train"), ("c", "val"), ("d", "test"))
    ]
    assert apart.fingerprint == files.sha256_json([1, ["t1", "gd"], how, what])


def test_volumes_of_other_units_share_no_window(root: Path, tmp_path: Path) -> None:
    with_contrast(root, factor=25.0)
    with pytest.raises(InputError, match=r"patient a: window.joint: t1 would fill less than 10% .*t1 102 to 995.605, gd 2550 to 563125.; these volumes are in other units: remove joint"):
        opened(spec(root, images=TWO, window={"percentiles": [0, 99.5], "joint": ["t1", "gd"]}), tmp_path / "cache")


@pytest.mark.parametrize(("window", "told"), [
    ({"fixed": [0, 1], "joint": ["t1", "gd"]}, "joint has no effect with fixed"),
    ({"percentiles": [0, 99], "joint": ["t1"]}, r"joint names two or more different channels .* got \['t1'\]"),
    ({"percentiles": [0, 99], "joint": ["t1", "t1"]}, "two or more different channels"),
    ({"percentiles": [0, 99], "joint": ["t1", "flair"]}, "window.joint: there is no image 'flair'; the images are: t1, gd"),
    ({"percentiles": [0, 99], "joint": ["t1", "seg"]}, "window.joint: there is no image 'seg'"),
    ({"joint": ["t1", "gd"]}, "give percentiles"),
])  # fmt: skip
def test_a_joint_window_without_effect_is_refused(tmp_path: Path, window: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        spec(tmp_path, images=TWO, window=window)
    with pytest.raises(ValueError, match="window"):
        DataSpec.model_validate({"format": "stack", "root": tmp_path, "window": window})


def test_filters(root: Path, tmp_path: Path) -> None:
    def slices(**changes: object) -> list[int]:
        store, _ = opened(spec(root, **changes), tmp_path / "cache")
        return list(store.rows["slice"][store.rows["patient"] == "a"])

    assert slices(content=0) == [0, 1, 2, 3, 4, 5]
    assert slices(every=2) == [2, 4]
    assert slices(positive_only=True) == [2, 3]
    assert slices(positive_only=True, mask_labels=[4]) == [3]
    assert len(slices(axis=0)) == 12 and len(slices(axis=1)) == 8


def test_masks_alone_and_images_alone(root: Path, tmp_path: Path) -> None:
    masks, _ = opened(spec(root, images={}), tmp_path / "cache")
    assert masks.channels == [] and len(masks.rows) == 24 and masks.masks(masks.select("train", True)).any()
    images, _ = opened(spec(root, mask=None), tmp_path / "cache")
    with pytest.raises(InputError, match="no masks"):
        images.masks(images.select("train"))
    with pytest.raises(InputError, match="no masks"):
        images.select("train", positive_only=True)
    with pytest.raises(InputError, match=r"no channel 'flair'.*t1"):
        images.images("flair", images.select("train"))
    with pytest.raises(InputError, match=r"split 'holdout' has no slices.*train: 10"):
        images.select("holdout")


def test_built_once_and_again_only_when_content_changes(root: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, said = opened(spec(root), cache)
    assert any("building" in line for line in said)
    again, said = opened(spec(root), cache)
    assert said == [] and again.fingerprint == first.fingerprint
    os.utime(root / "train/a/t1.nii.gz")  # touched, not changed
    touched, said = opened(spec(root), cache)
    assert touched.fingerprint == first.fingerprint and not any("building" in line for line in said)
    make_patient(root / "train/a", 99)
    changed, said = opened(spec(root), cache)
    assert changed.fingerprint != first.fingerprint and any("building" in line for line in said)
    other_size, _ = opened(spec(root, size=24), cache)
    assert other_size.fingerprint != changed.fingerprint


def test_a_moved_data_set_is_the_same_data(root: Path, tmp_path: Path) -> None:
    first, _ = opened(spec(root), tmp_path / "cache")
    moved = root.rename(tmp_path / "elsewhere")
    store, said = opened(spec(moved), tmp_path / "cache")
    assert store.fingerprint == first.fingerprint and not any("building" in line for line in said)
    assert store.rows["file_t1"].iloc[0].startswith(str(moved))


def test_the_split_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    for number in range(6):
        make_patient(tmp_path / "flat" / f"p{number}", number)
    prints, trains = set(), set()
    for seed in (1, 1, 2):
        store, said = opened(spec(tmp_path / "flat"), tmp_path / "cache", seed)
        assert any("split by data.splits" in line for line in said)
        prints.add(store.fingerprint)
        trains.add(tuple(store.rows["patient"].iloc[store.select("train")].unique()))
        assert store.rows.groupby("patient")["split"].nunique().max() == 1
    assert len(prints) == len(trains) == 2


OPEN_IN_PROCESS = """
import sys
from pathlib import Path
from medgen.data.store import open_store
from medgen.spec_data import DataSpec
data = DataSpec(root=Path(sys.argv[1]), images={"t1": "t1.nii.gz"}, mask="seg.nii.gz", size=16)
store = open_store(data, 1, Path(sys.argv[2]), print)
print(len(store.rows), store.images("t1", store.select("train")).sum())
"""


def test_processes_that_start_together_build_once(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", OPEN_IN_PROCESS, str(root), str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert sum("building" in output for output in outputs) == 1
    assert len({output.splitlines()[-1] for output in outputs}) == 1


def test_a_full_disk_is_told_and_leaves_nothing(root: Path, tmp_path: Path) -> None:
    """The limit on file size makes the kernel refuse the write in the middle of an array, as a full disk does."""
    cache = tmp_path / "cache"
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    opened(spec(root), cache)  # imports and hashes done: only the cache arrays are written below the limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(MedgenError, match=r"cache.*cannot be written.*free space") as caught:
            opened(spec(root, size=64), cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert caught.value.exit_code == 2
    assert len(list(cache.glob("slices-*"))) == 1 and not list(cache.glob(".*.tmp"))
    store, _ = opened(spec(root, size=64), cache)
    assert len(store.rows) == 20


def test_an_unusable_cache_folder_is_told(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MedgenError, match="cannot be written"):
        opened(spec(root), tmp_path / "file" / "cache")


def test_a_damaged_cache_is_told(root: Path, tmp_path: Path) -> None:
    store, _ = opened(spec(root), tmp_path / "cache")
    array = store.folder / "t1.npy"
    array.write_bytes(array.read_bytes()[:1000])
    with pytest.raises(MedgenError, match=r"damaged.*delete"):
        store.images("t1", np.array([0]))


def test_arrays_are_mapped_and_reading_is_fast(root: Path, tmp_path: Path) -> None:
    """The cache must beat the volumes at least 20 times, or it is not worth its disk space."""
    make_patient(root / "train/a", 5, shape=(128, 128, 40))
    store, _ = opened(spec(root, size=128, content=0), tmp_path / "cache")
    assert isinstance(array_files.mapped(store.folder, "t1"), np.memmap)
    rows = np.flatnonzero(store.rows["patient"] == "a")
    assert len(rows) == 40 and store.images("t1", rows).any()
    started = time.perf_counter()
    store.images("t1", rows)
    cached = time.perf_counter() - started
    started = time.perf_counter()
    for _ in rows:  # what a loader without a cache does for every slice
        read_volume(root / "train/a/t1.nii.gz")
    assert time.perf_counter() - started > 20 * cached


def test_what_we_generate_can_be_read_as_data(root: Path, tmp_path: Path) -> None:
    """2-D NIfTI files written by write_slice and named in a CSV give the same pictures and affines."""
    store, _ = opened(spec(root), tmp_path / "cache")
    lines = ["id,patient,split,image,mask,label,caption"]
    for row in range(len(store.rows)):
        record, one = store.rows.iloc[row], np.array([row])
        for kind, picture in (("image", store.images("t1", one)[0]), ("mask", store.masks(one)[0])):
            write_slice(tmp_path / "out" / f"{row}_{kind}.nii.gz", picture, kind, store.affine(row))  # type: ignore[arg-type]
        lines.append(f"{record['id']},{record['patient']},{record['split']},{row}_image.nii.gz,{row}_mask.nii.gz,7,\"a, b\"")
    (tmp_path / "out/index.csv").write_text("\n".join(lines) + "\n")
    data = DataSpec(format="csv", root=tmp_path / "out/index.csv", images={"t1": "image"}, mask="mask", size=16, window={"fixed": (0, 1)})
    again, _ = opened(data, tmp_path / "cache")
    every = np.arange(len(store.rows))
    assert list(again.rows["id"]) == list(store.rows["id"])
    assert list(again.rows["label"].unique()) == ["7"] and list(again.rows["caption"].unique()) == ["a, b"]
    assert np.abs(again.images("t1", every) - store.images("t1", every)).max() < 1e-4
    assert np.array_equal(again.masks(every), store.masks(every))
    assert all(np.allclose(again.affine(row), store.affine(row), atol=1e-3) for row in every)


def test_phantom_format_and_pictures(tmp_path: Path) -> None:
    from rich.console import Console

    data = DataSpec(format="phantom", patients=3, size=32, every=4, window={"percentiles": (0, 99.5), "joint": ("t1_pre", "t1_gd")})
    report = check_headers(data, 1)
    store, _ = opened(data, tmp_path / "cache")
    assert report.patients == {"train": 1, "val": 1, "test": 1} and "3 patients" in report.text()
    assert store.channels == ["bravo", "t1_pre", "t1_gd"]
    _, said = opened(data, tmp_path / "cache")
    assert said == []
    summary = summarise(store)
    assert summary["splits"]["train"]["patients"] == 1 and summary["splits"]["train"]["positive_slices"] > 0
    console = Console(record=True, width=100)
    print_summary(store, console)
    printed = console.export_text()
    assert "t1_gd" in printed and "the same window in each patient: t1_pre, t1_gd" in printed and summary["joint_windows"] == [["t1_pre", "t1_gd"]]
    high = [float(store.rows["window_high_bravo"].min()), float(store.rows["window_high_bravo"].max())]
    assert summary["windows"]["bravo"]["high"] == high and f"{high[0]:.5g} to {high[1]:.5g}" in printed
    contact_sheet(store, tmp_path / "sheet.png")
    histogram(store, tmp_path / "histogram.png")
    first = (tmp_path / "sheet.png").read_bytes()
    contact_sheet(store, tmp_path / "sheet.png")
    assert first == (tmp_path / "sheet.png").read_bytes() and first.startswith(b"\x89PNG") and len(first) > 5000


def test_imports_stay_light() -> None:
    code = "import sys, medgen.data.store; assert not {'torch', 'monai', 'nibabel', 'pandas', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})


def test_real_glioma_volumes(tmp_path: Path, glioma: Path) -> None:
    data = DataSpec(root=glioma, images={"bravo": "t1_gd.nii.gz"}, mask="seg.nii.gz", size=64, every=10)
    report = check_headers(data, 1)
    assert report.shapes == [(240, 240, 155)] and report.patients == {"train": 6, "val": 1, "test": 1}
    store, _ = opened(data, tmp_path / "cache")
    train = store.select("train", positive_only=True)
    images, masks = store.images("bravo", train), store.masks(train)
    assert 0.1 < images[images > 0].mean() < 0.7
    assert images[masks > 0].mean() > 0.1  # the tumour lies inside the brain, not beside it


def test_the_uptake_of_contrast_survives_in_real_volumes(tmp_path: Path, glioma: Path) -> None:
    """Brightness after contrast over before, outside the tumour: as in the files with a joint window, lost with one each."""
    for patient in ("train/TCIA01_201_1", "val/TCIA02_606_1", "test/TCIA03_265_1"):
        (tmp_path / "set" / patient).parent.mkdir(parents=True)
        (tmp_path / "set" / patient).symlink_to(glioma / patient)
    shared = {"root": tmp_path / "set", "images": {"t1_pre": "t1_pre.nii.gz", "t1_gd": "t1_gd.nii.gz"}, "mask": "seg.nii.gz", "size": 64, "every": 15}
    found = {}
    for joint in (None, ["t1_pre", "t1_gd"]):
        store, _ = opened(DataSpec.model_validate({**shared, "window": {"percentiles": [0, 99.5], "joint": joint}}), tmp_path / "cache")
        for patient, rows in store.rows.groupby("patient").groups.items():
            pre, gd = (store.images(channel, np.asarray(rows)) for channel in shared["images"])
            healthy = (pre > 0.05) & (gd > 0.05) & (store.masks(np.asarray(rows)) == 0)
            found[patient, bool(joint)] = gd[healthy].mean() / pre[healthy].mean()
    for folder in sorted(tmp_path.glob("set/*/*")):
        pre, gd, seg = (read_volume(folder / f"{name}.nii.gz")[:, :, ::15] for name in ("t1_pre", "t1_gd", "seg"))
        healthy = (pre > 0) & (gd > 0) & (seg == 0)
        raw = gd[healthy].mean() / pre[healthy].mean()
        assert found[folder.name, True] == pytest.approx(raw, rel=0.05)
        assert not 0.8 < found[folder.name, False] / raw < 1.2
