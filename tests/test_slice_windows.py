"""Slices that depend on nothing but themselves: their window, which of them are made, whose they are."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from test_data_store import make_patient, opened

from medgen.data.phantoms import write_volume
from medgen.data.resize import resize_images
from medgen.data.store import check_headers
from medgen.data.volumes import display_slices
from medgen.errors import InputError
from medgen.spec_data import DataSpec

PERCENTILES = {"percentiles": [2, 98], "per": "slice"}


def table(folder: Path, volumes: dict[str, np.ndarray], header: str = "nii_path,split") -> Path:
    """A CSV file of NIfTI volumes whose paths count from it; the first half is trained on."""
    lines = [header]
    for number, (name, volume) in enumerate(volumes.items()):
        write_volume(folder / "volumes" / name, volume, np.eye(4))
        lines.append(f"volumes/{name},{'train' if number < (len(volumes) + 1) // 2 else 'test'}")
    path = folder / "nii_paths.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def spec(root: Path, **changes: object) -> DataSpec:
    return DataSpec.model_validate({"format": "csv", "root": root, "images": {"t1": "nii_path"}, "size": 16, "window": PERCENTILES, **changes})


def test_each_slice_has_the_window_of_all_its_own_pixels(tmp_path: Path) -> None:
    """Numbers of the published preprocessing: in slice 65 of this volume the percentiles are 0 and 997.19268799."""
    x, y, z = np.meshgrid(np.arange(91), np.arange(109), np.arange(91), indexing="ij")
    volume = np.where((x - 45) ** 2 + (y - 54) ** 2 < 1600, 500 * (1 + np.sin(0.05 * x + 0.07 * y + 0.03 * z)), 0).astype(np.float32)
    data = spec(table(tmp_path, {"a.nii.gz": volume, "b.nii.gz": volume * 2}), slices=[40, 89], size=32)
    store, _ = opened(data, tmp_path / "cache")
    assert check_headers(data, 1).slices == len(store.rows) == 100 and list(store.rows["slice"][:50]) == list(range(40, 90))
    row = store.rows[(store.rows["patient"] == "a") & (store.rows["slice"] == 65)].iloc[0]
    assert row["window_low_t1"] == 0 and row["window_high_t1"] == pytest.approx(997.19268799, abs=1e-4)
    plane = display_slices(volume, 2)[65]
    expected = resize_images(np.clip(plane / 997.19268799, 0, 1)[None], 32)[0]
    assert store.images("t1", np.array([row.name]))[0] == pytest.approx(expected, abs=1e-5)
    first, second = (store.images("t1", store.select(split)) for split in ("train", "test"))
    assert first == pytest.approx(second, abs=1e-5), "a scanner's gain does not matter"


def test_a_slice_does_not_depend_on_the_others_of_its_volume(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    volume = generator.uniform(1, 100, (20, 20, 6)).astype(np.float32)
    brighter = volume.copy()
    brighter[:, :, 5] *= 50
    images = []
    for name, content in (("one", volume), ("other", brighter)):
        (tmp_path / name).mkdir()
        store, _ = opened(spec(table(tmp_path / name, {"a.nii.gz": content, "b.nii.gz": volume + 1})), tmp_path / "cache")
        images.append(store.images("t1", store.select("train")))
    assert np.array_equal(images[0][:5], images[1][:5])
    by_volume, _ = opened(spec(tmp_path / "other" / "nii_paths.csv", window={"percentiles": [2, 98]}), tmp_path / "cache")
    assert not np.allclose(by_volume.images("t1", by_volume.select("train"))[:5], images[0][:5], atol=0.1)


def test_empty_slices_are_left_out_or_told(tmp_path: Path) -> None:
    volume = np.zeros((20, 20, 6), np.float32)
    volume[4:16, 4:16, 2:5] = np.arange(1, 145).reshape(12, 12, 1)
    volume[0, 0, 0] = 7  # a single bright pixel is no content
    root = table(tmp_path, {"a.nii.gz": volume, "b.nii.gz": volume + (volume > 0)})
    store, _ = opened(spec(root), tmp_path / "cache")
    assert list(store.rows["slice"]) == [2, 3, 4] * 2 and np.isfinite(store.rows["window_high_t1"]).all()
    with pytest.raises(InputError, match=r"patient a: .*a\.nii\.gz: slice 0 has a single value .*\(3 of 6 slices have\); write content: 0\.05"):
        opened(spec(root, content=0.0), tmp_path / "cache")
    assert len(opened(spec(root, content=0.0, slices=[2, 4]), tmp_path / "cache")[0].rows) == 6


def test_a_volume_that_gives_no_slice_is_told(tmp_path: Path) -> None:
    """Each time the cache is opened, not only when it is built."""
    generator = np.random.default_rng(2)
    full = [generator.uniform(1, 9, (18, 18, 3)).astype(np.float32) for _ in range(2)]
    root = table(tmp_path, {"a.nii.gz": full[0], "flat.nii.gz": np.full((18, 18, 3), 4, np.float32), "c.nii.gz": full[1]})
    for _ in range(2):
        store, said = opened(spec(root), tmp_path / "cache")
        assert sorted(set(store.rows["patient"])) == ["a", "c"] and said[-1] == store.notes[-1]
        assert re.fullmatch(r"1 of 3 volumes gave no slice, since none of theirs has data\.content: 0\.05 of its pixels above .*: flat \(.*flat\.nii\.gz\)", said[-1])


def test_patients_are_read_from_file_names(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    names = ["sub-01_run-1.nii.gz", "sub-01_run-2.nii.gz", "sub-02_run-1.nii.gz", "sub-03_run-1.nii.gz"]
    volumes = {name: generator.uniform(1, 9, (18, 18, 3)).astype(np.float32) for name in names}
    root = table(tmp_path, volumes)
    store, _ = opened(spec(root, patient_pattern="(sub-[0-9]+)"), tmp_path / "cache")
    assert dict(store.rows.groupby("patient").size()) == {"sub-01": 6, "sub-02": 3, "sub-03": 3}
    with pytest.raises(InputError, match=r"nii_paths\.csv:2: data\.patient_pattern '\(PAT\\\\d\+\)' finds no patient in 'volumes/sub-01_run-1\.nii\.gz'"):
        check_headers(spec(root, patient_pattern=r"(PAT\d+)"), 1)
    folders = table(tmp_path / "folders", {f"{name[:6]}/{name[7:]}": volume for name, volume in volumes.items()})
    store, _ = opened(spec(folders, patient_pattern="(sub-[0-9]+)"), tmp_path / "cache")
    assert dict(store.rows.groupby("patient").size()) == {"sub-01": 6, "sub-02": 3, "sub-03": 3}, "from the folders, where the names have none"
    with pytest.raises(InputError, match=r"nii_paths\.csv:4: volumes/sub-02/run-1\.nii\.gz and volumes/sub-01/run-1\.nii\.gz in line 2 have one name.*a column patient, or write data\.patient_pattern"):
        check_headers(spec(folders), 1)
    (tmp_path / "named").mkdir()
    named = table(tmp_path / "named", volumes, header="nii_path,split")
    named.write_text("\n".join(line + (",patient" if number == 0 else f",p{number}") for number, line in enumerate(named.read_text().split())) + "\n")
    with pytest.raises(InputError, match=r"patient_pattern has no effect: .* has a column patient"):
        check_headers(spec(named, patient_pattern="(sub-[0-9]+)"), 1)


@pytest.mark.parametrize(("changes", "told"), [
    ({"window": {"fixed": [0, 1], "per": "slice"}}, "per: slice has no effect with fixed"),
    ({"images": {"a": "x", "b": "y"}, "window": {**PERCENTILES, "joint": ["a", "b"]}}, "per: slice and joint contradict each other"),
    ({"slices": [9, 4]}, "slices: the first, 9, is above the last, 4"),
    ({"patient_pattern": "sub-[0-9]+"}, "has 0 groups; put parentheses around the patient"),
    ({"patient_pattern": "(sub"}, "patient_pattern: not a regular expression"),
    ({"format": "nifti", "patient_pattern": "(a)"}, "patient_pattern has no effect with format: nifti"),
])  # fmt: skip
def test_what_has_no_effect_is_refused(tmp_path: Path, changes: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told.replace("(", r"\(").replace("[", r"\[")):
        spec(tmp_path / "x.csv", **changes)


def test_a_range_that_a_volume_has_not_is_told_before_anything_is_queued(tmp_path: Path) -> None:
    make_patient(tmp_path / "set/train/a", 1)
    data = DataSpec.model_validate({"root": tmp_path / "set", "images": {"t1": "t1.nii.gz"}, "size": 16, "slices": [2, 6]})
    with pytest.raises(InputError, match=r"patient a: data\.slices: \[2, 6\], but .*t1\.nii\.gz has 6 slices, 0 to 5"):
        check_headers(data, 1)


def test_a_range_of_slices_is_another_cache(tmp_path: Path) -> None:
    make_patient(tmp_path / "set/train/a", 1)
    make_patient(tmp_path / "set/test/b", 2)
    data = DataSpec.model_validate({"root": tmp_path / "set", "images": {"t1": "t1.nii.gz"}, "size": 16})
    plain, _ = opened(data, tmp_path / "cache")
    again, said = opened(data.model_copy(update={"slices": (1, 5)}), tmp_path / "cache")
    assert plain.folder != again.folder and any("building" in line for line in said)
