"""Folders of labelled slices at many sizes: ours, the reference system's as they are, and everything that can be wrong with one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medgen.data import stacks
from medgen.errors import InputError

LABELS = (0, 0, 1, 1, 0)
SUBJECTS = ("S_1", "S_2", "S_3", "S_4", "S_1")


def images_of(size: int, channels: int = 1, count: int = 5) -> np.ndarray:
    """[W, H, C, N] with another value everywhere."""
    return np.random.default_rng(size).uniform(-1, 1, (size, size, channels, count)).astype(np.float32)


def save(path: Path, array: np.ndarray) -> None:
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)


def write_folder(folder: Path, sizes: tuple[int, ...] = (4, 8, 16), channels: int = 1) -> Path:
    """As the reference system writes them: the largest in float64, identity affine."""
    folder.mkdir(parents=True)
    for size in sizes:
        array = images_of(size, channels)
        save(folder / f"Real{size}x{size}.nii.gz", array.astype(np.float64) if size == max(sizes) else array)
    write_labels(folder, [f"{number},{label},{subject}" for number, (label, subject) in enumerate(zip(LABELS, SUBJECTS, strict=True))])
    return folder


def write_labels(folder: Path, lines: list[str], header: str = "ID,Label,Subject_ID") -> None:
    (folder / "labels.csv").write_text("\n".join([header, *lines]) + "\n")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_the_reference_opens_as_it_is(tmp_path: Path, channels: int) -> None:
    stack = stacks.open_stack(write_folder(tmp_path / "ADNI_train", channels=channels))
    assert stack.sizes == (4, 8, 16) and stack.channels == channels
    assert stack.labels.tolist() == list(LABELS) and stack.subjects == SUBJECTS and stack.class_names == ("0", "1")
    for size in stack.sizes:
        stored, images = images_of(size, channels), stack.images(size)
        assert images.shape == (5, channels, size, size) and images.dtype == np.float32
        for n, c, h, w in ((0, 0, 1, 2), (4, channels - 1, size - 1, 0), (2, 0, 0, size - 1)):
            assert images[n, c, h, w] == stored[w, h, c, n]


def test_three_axes_and_uncompressed_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", sizes=(4, 8))
    save(folder / "Real8x8.nii.gz", images_of(8)[:, :, 0])
    (folder / "Real4x4.nii.gz").unlink()
    save(folder / "Real4x4.nii", images_of(4))
    (folder / "notes.txt").write_text("stray")
    images = stacks.open_stack(folder).images(8)
    assert images.shape == (5, 1, 8, 8) and images[3, 0, 2, 5] == images_of(8)[5, 2, 0, 3]


def test_class_names_and_a_class_that_is_not_on_this_side(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a")
    (folder / "classes.json").write_text(json.dumps({"AD": 1, "CN": 0, "MCI": 2}))
    assert stacks.open_stack(folder).class_names == ("CN", "AD", "MCI")
    for content, pattern in (("[1]", "not a JSON object"), ('{"a": 0, "b": 2}', "number the classes 0, 1, 2"), ('{"a": 0}', "names 1 classes, but labels.csv has the Label 1"),
                             ('{"a": 0.0, "b": 1}', "number the classes"), ("{", "not a JSON object")):  # fmt: skip
        (folder / "classes.json").write_text(content)
        with pytest.raises(InputError, match=rf"classes.json: .*{pattern}"):
            stacks.open_stack(folder)


GOOD = ["0,0,S_1", "1,0,S_2", "2,1,S_3", "3,1,S_4", "4,0,S_1"]


@pytest.mark.parametrize(
    ("lines", "pattern"),
    [
        ([*GOOD[:3], "3,,S_4", GOOD[4]], r"labels.csv:5: Label is empty; write a whole number from 0 on"),
        ([*GOOD[:3], "3,1.0,S_4", GOOD[4]], r"labels.csv:5: Label is '1.0'; write a whole number from 0 on, without a point"),
        ([*GOOD[:3], "3,AD,S_4", GOOD[4]], r"labels.csv:5: Label is 'AD'"),
        ([*GOOD[:3], "3,-1,S_4", GOOD[4]], r"labels.csv:5: Label is '-1'"),
        ([*GOOD[:3], "3,1,", GOOD[4]], r"labels.csv:5: Subject_ID is empty"),
        ([*GOOD[:3], "2,1,S_4", GOOD[4]], r"labels.csv:5: ID 2 stands in line 4 already"),
        ([*GOOD[:3], GOOD[4], GOOD[3]], r"labels.csv:5: ID is 4, expected 3: rows are taken by position"),
        ([f"{number + 1},0,a" for number in range(5)], r"labels.csv:2: ID is 1, expected 0"),
        (GOOD[:4], r"labels.csv: has 4 rows for the 5 slices of Real16x16.nii.gz; every slice needs one row"),
        ([*GOOD[:4], "4,3,S_1"], r"labels.csv: no slice has the Label 2, but there is a Label 3; number the classes"),
        ([*GOOD[:4], "4,900000000,S_1"], r"no slice has the Label 2"),
        ([*GOOD[:4], "4,0"], r"labels.csv:6: this line does not have the 3 columns"),
    ],
)
def test_bad_labels_are_named(tmp_path: Path, lines: list[str], pattern: str) -> None:
    folder = write_folder(tmp_path / "a")
    write_labels(folder, lines)
    with pytest.raises(InputError, match=pattern):
        stacks.open_stack(folder)


def test_a_column_that_is_missing(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a")
    write_labels(folder, ["0,0"] * 5, header="ID,Label")
    with pytest.raises(InputError, match=r"labels.csv: no column 'Subject_ID' \(for the subject\); the columns are: ID, Label"):
        stacks.open_stack(folder)
    (folder / "labels.csv").unlink()
    with pytest.raises(InputError, match=r"labels.csv: no such file"):
        stacks.open_stack(folder)


def refused(folder: Path, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern):
        stacks.open_stack(folder)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    refused(tmp_path / "none", r"none: no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"empty: no file Real4x4.nii.gz")
    refused(write_folder(tmp_path / "gap", sizes=(4, 16)), r"gap: the sizes there are 4, 16; .*add Real8x8.nii.gz")
    refused(write_folder(tmp_path / "start", sizes=(8, 16)), r"add Real4x4.nii.gz")
    refused(write_folder(tmp_path / "odd", sizes=(4, 8, 10)), r"remove Real10x10.nii.gz")
    folder = write_folder(tmp_path / "a")
    save(folder / "Real8x8.nii.gz", images_of(8, count=4))
    refused(folder, r"Real8x8.nii.gz: holds 4 slices, but Real16x16.nii.gz holds 5")
    save(folder / "Real8x8.nii.gz", images_of(8, channels=3))
    refused(folder, r"Real8x8.nii.gz: has 3 channels, but Real16x16.nii.gz has 1")
    save(folder / "Real8x8.nii.gz", images_of(16))
    refused(folder, r"Real8x8.nii.gz: holds slices of 16 x 16 px; its name says 8 x 8")
    save(folder / "Real8x8.nii.gz", images_of(8)[:, :, 0, 0])
    refused(folder, r"Real8x8.nii.gz: has shape \(8, 8\); expected \[W, H, channels, slices\] or \[W, H, slices\]")
    save(folder / "Real8x8.nii.gz", images_of(8).astype(np.complex64))
    refused(folder, r"Real8x8.nii.gz: expected one number per voxel, got complex64")
    (folder / "Real8x8.nii.gz").write_bytes(b"no picture")
    refused(folder, r"Real8x8.nii.gz: not a readable NIfTI file")
    save(folder / "Real8x8.nii.gz", images_of(8))
    save(folder / "Real8x8.nii", images_of(8))
    refused(folder, r"Real8x8.nii.gz: Real8x8.nii is there as well")
    (folder / "Real8x8.nii").unlink()
    save(folder / "Real8x4.nii.gz", images_of(8))
    refused(folder, r"Real8x4.nii.gz: slices must be square")
    refused(write_folder(tmp_path / "two", channels=2), r"has 2 channels; allowed are 1 \(grey\) and 3 \(colour\)")


@pytest.mark.parametrize("bad", [1.01, -1.5, np.nan, np.inf])
def test_values_out_of_range_name_the_slice(tmp_path: Path, bad: float) -> None:
    folder = write_folder(tmp_path / "a")
    array = images_of(8)
    array[2, 3, 0, 3] = bad
    save(folder / "Real8x8.nii.gz", array)
    stack = stacks.open_stack(folder)
    assert stack.images(16).shape == (5, 1, 16, 16)
    with pytest.raises(InputError, match=r"Real8x8.nii.gz: slice 3 \(subject S_4\) holds values from .*allowed is -1 to 1: scale each slice"):
        stack.images(8)
    with pytest.raises(InputError, match=r"no slices of 32 px; the sizes there are: 4, 8, 16"):
        stack.images(32)


def test_a_file_cut_short(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a")
    path = folder / "Real16x16.nii.gz"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match=r"Real16x16.nii.gz: the voxels cannot be read .*copy it again"):
        stacks.open_stack(folder).images(16)


def test_what_training_asks_of_the_sides(tmp_path: Path) -> None:
    train, test = (stacks.open_stack(write_folder(tmp_path / side)) for side in ("train", "test"))
    stacks.require_subjects_of_every_class(train, 2)
    with pytest.raises(InputError, match=r"labels.csv: the class 0 has 2 subjects; 3 are needed"):
        stacks.require_subjects_of_every_class(train, 3)
    write_labels(tmp_path / "test", ["0,0,S_9", "1,0,S_8", "2,1,S_7", "3,1,S_7", "4,0,S_9"])
    other = stacks.open_stack(tmp_path / "test")
    stacks.require_disjoint(train, other)
    with pytest.raises(InputError, match=r"the class 1 has 1 subject \(S_7\); 2 are needed to keep training and validation apart"):
        stacks.require_subjects_of_every_class(other, 2)
    with pytest.raises(InputError, match=r"train and .*test: 4 subject\(s\) are on both sides: S_1, S_2, S_3, S_4 \(S_1 is slice 0 of"):
        stacks.require_disjoint(train, test)


def test_reading_needs_no_torch_and_no_pandas(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a")
    code = ("import sys; from pathlib import Path; from medgen.data import stacks\n"
            f"stacks.open_stack(Path({str(folder)!r})).images(8)\n"
            "assert not {'torch', 'pandas', 'skimage', 'sklearn'} & set(sys.modules)")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)
