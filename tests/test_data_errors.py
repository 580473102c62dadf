"""Bad data: every mistake stops with a message that names the patient or file, and leaves no cache behind."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medgen.data.phantoms import write_volume
from medgen.data.store import check_headers, open_store
from medgen.errors import InputError
from medgen.spec_data import DataSpec, SplitFractions

SHAPE = (12, 10, 4)
PATIENTS = ("train/a", "train/b", "val/c", "test/d")


def image_of(number: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(number).integers(1, 1000, shape).astype(np.int16)


def mask_of(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[4:8, 3:7, 1:3] = 2
    return mask


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, place in enumerate(PATIENTS):
        write_volume(tmp_path / "set" / place / "t1.nii.gz", image_of(number), np.eye(4))
        write_volume(tmp_path / "set" / place / "seg.nii.gz", mask_of(), np.eye(4))
    return tmp_path / "set"


def spec(root: Path, **changes: object) -> DataSpec:
    return DataSpec.model_validate({"root": root, "images": {"t1": "t1.nii.gz"}, "mask": "seg.nii.gz", "size": 16, **changes})


def refused(data: DataSpec, tmp_path: Path, pattern: str, by_headers: bool = False) -> str:
    """The message with which the store refuses the data; with `by_headers`, submit's quick look must find it too."""
    if by_headers:
        with pytest.raises(InputError, match=pattern):
            check_headers(data, 1)
    with pytest.raises(InputError, match=pattern) as caught:
        open_store(data, 1, tmp_path / "cache", lambda text: None)
    assert not list((tmp_path / "cache").glob("slices-*")) and not list((tmp_path / "cache").glob(".*.tmp"))
    return str(caught.value)


def test_good_data_pass(root: Path, tmp_path: Path) -> None:
    (root / "notes.txt").write_text("stray")
    (root / "train/.hidden").mkdir()
    (root / "train/readme.md").write_text("stray")
    (root / "train/a/other.nii.gz").write_text("stray")
    report = check_headers(spec(root), 1)
    assert report.patients == {"train": 2, "val": 1, "test": 1} and report.slices == 16 and report.shapes == [SHAPE]
    assert len(open_store(spec(root), 1, tmp_path / "cache", lambda text: None).rows) == 16


def test_missing_root(tmp_path: Path) -> None:
    refused(spec(tmp_path / "nowhere"), tmp_path, r"nowhere is missing", by_headers=True)
    (tmp_path / "empty").mkdir()
    refused(spec(tmp_path / "empty"), tmp_path, r"empty: no patient folders; expected", by_headers=True)


def test_missing_modality_names_the_patients(root: Path, tmp_path: Path) -> None:
    (root / "val/c/t1.nii.gz").unlink()
    refused(spec(root), tmp_path, r"1 file\(s\) are missing:\n  patient c, t1: .*val/c/t1.nii.gz", by_headers=True)
    for number in range(7):
        (root / f"train/x{number}").mkdir()
    message = refused(spec(root), tmp_path, r"15 file\(s\) are missing", by_headers=True)
    assert message.count("  patient") == 5 and "and 10 more" in message


def test_a_link_that_leads_nowhere_is_missing(root: Path, tmp_path: Path) -> None:
    (root / "val/c/t1.nii.gz").unlink()
    (root / "val/c/t1.nii.gz").symlink_to(tmp_path / "gone")
    refused(spec(root), tmp_path, "patient c, t1", by_headers=True)


def test_empty_split(root: Path, tmp_path: Path) -> None:
    shutil.rmtree(root / "val/c")
    refused(spec(root), tmp_path, r"set/val: the split val is empty", by_headers=True)
    shutil.rmtree(root / "train")
    (root / "val").rmdir()
    refused(spec(root), tmp_path, r"there is test but no folder train", by_headers=True)


def test_patient_in_two_splits(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "train/a", root / "test/a")
    refused(spec(root), tmp_path, r"patient a is in train and in test", by_headers=True)


def test_copied_image_in_two_splits(root: Path, tmp_path: Path) -> None:
    shutil.copy(root / "train/a/t1.nii.gz", root / "test/d/t1.nii.gz")
    refused(spec(root), tmp_path, r"patient d \(test\) and patient a \(train\) hold the same t1 image")


def break_shape(folder: Path) -> None:
    write_volume(folder / "seg.nii.gz", mask_of((12, 10, 5)), np.eye(4))


def break_affine(folder: Path) -> None:
    write_volume(folder / "seg.nii.gz", mask_of(), np.diag([1.0, 1, 1.2, 1]))


def break_dimensions(folder: Path) -> None:
    write_volume(folder / "t1.nii.gz", image_of(0, (12, 10, 4, 2)), np.eye(4))


def break_orientation(folder: Path) -> None:
    content = bytearray(gzip.decompress((folder / "t1.nii.gz").read_bytes()))
    content[280:296] = bytes(16)  # srow_x of the header: all voxels at one place
    (folder / "t1.nii.gz").write_bytes(gzip.compress(bytes(content)))


def break_header(folder: Path) -> None:
    (folder / "t1.nii.gz").write_bytes(b"this is not an image")


def break_to_nothing(folder: Path) -> None:
    (folder / "t1.nii.gz").write_bytes(b"")


def break_colour(folder: Path) -> None:
    colour = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.Nifti1Image(colour, np.eye(4)).to_filename(folder / "t1.nii.gz")


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (break_shape, r"patient b: .*seg.nii.gz has shape \(12, 10, 5\), but .*t1.nii.gz has \(12, 10, 4\)"),
        (break_affine, r"patient b: .*seg.nii.gz and .*t1.nii.gz have different affines \(up to 0.2 mm\)"),
        (break_dimensions, r"b/t1.nii.gz: expected a 3-D volume or a single slice, got shape \(12, 10, 4, 2\)"),
        (break_orientation, r"b/t1.nii.gz: the affine in the header is not usable"),
        (break_header, r"b/t1.nii.gz: not a readable NIfTI file"),
        (break_to_nothing, r"b/t1.nii.gz: not a readable NIfTI file"),
        (break_colour, r"b/t1.nii.gz: expected one number per voxel"),
    ],
)
def test_headers_that_cannot_be_used(root: Path, tmp_path: Path, damage: Callable[[Path], None], pattern: str) -> None:
    damage(root / "train/b")
    refused(spec(root), tmp_path, pattern, by_headers=True)


def poison_nan(folder: Path) -> None:
    voxels = image_of(0).astype(np.float32)
    voxels[0, 0, 0], voxels[1, 1, 1] = np.nan, np.inf
    write_volume(folder / "t1.nii.gz", voxels, np.eye(4))


def poison_constant(folder: Path) -> None:
    write_volume(folder / "t1.nii.gz", np.full(SHAPE, 7, np.int16), np.eye(4))


def poison_two_values(folder: Path) -> None:
    write_volume(folder / "t1.nii.gz", mask_of().astype(np.int16), np.eye(4))


def poison_cut(folder: Path) -> None:
    for name, voxels in (("t1", image_of(0, (40, 40, 40))), ("seg", mask_of((40, 40, 40)))):
        write_volume(folder / f"{name}.nii.gz", voxels, np.eye(4))
    content = (folder / "t1.nii.gz").read_bytes()
    (folder / "t1.nii.gz").write_bytes(content[: len(content) * 2 // 3])


def poison_soft_mask(folder: Path) -> None:
    write_volume(folder / "seg.nii.gz", mask_of().astype(np.float32) * 0.37, np.eye(4))


@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (poison_nan, r"b/t1.nii.gz: 2 of 480 voxels are NaN or infinite"),
        (poison_constant, r"patient b: .*t1.nii.gz holds the single value 7"),
        (poison_two_values, r"patient b: .*non-zero voxels are both 2; is it a mask"),
        (poison_cut, r"b/t1.nii.gz: the voxels cannot be read .*cut short"),
        (poison_soft_mask, r"patient b: the mask .*seg.nii.gz holds fractions such as 0.74"),
    ],
)
def test_voxels_that_cannot_be_used(root: Path, tmp_path: Path, damage: Callable[[Path], None], pattern: str) -> None:
    damage(root / "train/b")
    refused(spec(root), tmp_path, pattern)


def test_filters_that_leave_nothing(root: Path, tmp_path: Path) -> None:
    write_volume(root / "test/d/seg.nii.gz", np.zeros(SHAPE, np.uint8), np.eye(4))
    refused(spec(root, positive_only=True), tmp_path, r"no slice is left of 4 in the split test with .*positive_only: true")
    refused(spec(root, mask_labels=[5]), tmp_path, r"none of \[5\] is in any mask; the labels there are: 0, 2")
    refused(spec(root, window={"fixed": (5000, 6000)}), tmp_path, r"patient a: .*outside the window fixed: \[5000, 6000\]")


def test_too_few_patients_to_split(root: Path, tmp_path: Path) -> None:
    refused(spec(root / "train"), tmp_path, r"2 patients cannot be split", by_headers=True)


# CSV


def table(root: Path, header: str, *lines: str) -> DataSpec:
    (root / "index.csv").write_text("\n".join([header, *lines]) + "\n")
    return spec(root / "index.csv", format="csv", images={"t1": "image"}, mask="mask")


def line(place: str) -> str:
    return f"{place}/t1.nii.gz,{place}/seg.nii.gz"


def test_csv_with_and_without_columns(root: Path, tmp_path: Path) -> None:
    full = table(root, "patient,split,image,mask,label", *(f"{p[-1]},{p.partition('/')[0]},{line(p)},x" for p in PATIENTS))
    store = open_store(full, 1, tmp_path / "cache", lambda text: None)
    assert check_headers(full, 1).patients == {"train": 2, "val": 1, "test": 1} and not check_headers(full, 1).notes
    other = full.model_copy(update={"splits": SplitFractions(train=0.5, val=0.25, test=0.25)})
    assert check_headers(other, 1).notes == [f"{root / 'index.csv'} has a column split: that decides the splits, and data.splits is not used"]
    assert check_headers(spec(root, splits={"train": 0.5, "val": 0.25, "test": 0.25}), 1).notes == [f"{root} has the folders train, val, test: that decides the splits, and data.splits is not used"]
    assert set(store.rows["patient"]) == {"a", "b", "c", "d"} and set(store.rows["label"]) == {"x"}
    for place in PATIENTS:
        shutil.copy(root / place / "t1.nii.gz", root / f"{place[-1]}.t1.nii.gz")
    bare = table(root, "image,mask", *(f"{place[-1]}.t1.nii.gz,{place}/seg.nii.gz" for place in PATIENTS))
    said: list[str] = []
    store = open_store(bare, 1, tmp_path / "cache", said.append)
    assert set(store.rows["patient"]) == {"a.t1", "b.t1", "c.t1", "d.t1"}
    assert any("no column patient" in text for text in said) and any("no column split" in text for text in said)


def test_csv_missing_or_unreadable(root: Path, tmp_path: Path) -> None:
    data = spec(root / "none.csv", format="csv", images={"t1": "image"})
    refused(data, tmp_path, r"none.csv is missing; format: csv needs", by_headers=True)
    refused(table(root, "patient,image,mask"), tmp_path, r"index.csv: the file has no rows", by_headers=True)
    refused(table(root, "patient;image;mask", "a;b;c"), tmp_path, r"not separated by commas", by_headers=True)
    (root / "index.csv").write_bytes(b"image,mask\n\xff\xfe,x\n")
    refused(spec(root / "index.csv", format="csv", images={"t1": "image"}), tmp_path, "not a readable CSV", by_headers=True)


def test_csv_without_the_column_lists_the_columns(root: Path, tmp_path: Path) -> None:
    data = table(root, "patient,bravo,mask", f"a,{line('train/a')}")
    refused(data, tmp_path, r"no column 'image' \(for t1\); the columns are: patient, bravo, mask", by_headers=True)


@pytest.mark.parametrize(
    ("second", "pattern"),
    [
        (f"a,train,{line('train/a')}", r"index.csv:3: .*t1.nii.gz stands in line 2 already"),
        (f"a,test,{line('test/d')}", r"patient a is in train and in test"),
        (f"b,training,{line('train/b')}", r"index.csv:3: split is 'training'; write one of train, val, test"),
        (f",train,{line('train/b')}", r"index.csv:3: the patient is empty"),
        ("b,train,,x", r"index.csv:3: image is empty"),
        ("b,train,train/b/t1.nii.gz", r"index.csv:3: this line does not have the 4 columns"),
        ("b,train,x,y,z", r"index.csv:3: this line does not have the 4 columns"),
        ("b,train,gone.nii.gz,gone.nii.gz", r"2 file\(s\) are missing:\n  patient b, t1"),
    ],
)
def test_csv_lines(root: Path, tmp_path: Path, second: str, pattern: str) -> None:
    data = table(root, "patient,split,image,mask", f"a,train,{line('train/a')}", second)
    refused(data, tmp_path, pattern, by_headers=True)


def test_csv_duplicated_ids(root: Path, tmp_path: Path) -> None:
    data = table(root, "id,patient,split,image,mask", f"one,a,train,{line('train/a')}", f"one,b,train,{line('train/b')}")
    refused(data, tmp_path, r"index.csv:3: the id one stands in line 2 already", by_headers=True)


def test_csv_without_train(root: Path, tmp_path: Path) -> None:
    data = table(root, "patient,split,image,mask", f"a,test,{line('train/a')}")
    refused(data, tmp_path, r"no line has split train; the splits there are: test", by_headers=True)
