"""Images with captions and masks from JSONL files: what is read, what is refused and how it is told, masks by shares, captions in words."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import yaml
from conftest import REPOSITORY, TINY_NET
from dicom_writing import map_dataset, save
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from medgen import checks
from medgen.captions import naming_sides, sides_named, vocabulary, words_of
from medgen.data.index import check_headers
from medgen.data.jsonl_lines import KEYS, parse_line
from medgen.data.resize import shares_of
from medgen.data.store import SliceStore, open_store
from medgen.data.summary import summarise
from medgen.errors import InputError
from medgen.launch import submit
from medgen.spec import load
from medgen.spec_data import DataSpec

COLOURS = {"red": 0, "green": 1, "blue": 2}
Cli = Callable[..., subprocess.CompletedProcess[str]]


def picture(path: Path, pixels: np.ndarray) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path.name


def noise(seed: int, height: int = 12, width: int = 20, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def box(top: int, bottom: int, left: int, right: int, height: int = 12, width: int = 20) -> np.ndarray:
    """A mask of 0 and 255."""
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 255
    return mask


def lines_of(folder: Path, count: int = 6, **more: Any) -> list[dict[str, Any]]:
    """Coloured pictures of 20 x 12 pixels in `folder`, and their lines."""
    splits = ["train", "train", "train", "train", "val", "test"]
    return [{"image_path": picture(folder / f"{number}.png", noise(number)), "caption": f"a picture of number {number}", "split": splits[number % 6], **more} for number in range(count)]


def write(path: Path, lines: Sequence[dict[str, Any] | str]) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def spec(root: Path, **changes: Any) -> DataSpec:
    return DataSpec.model_validate({"format": "jsonl", "root": root, "size": 20, "images": COLOURS, **changes})


def opened(data: DataSpec, tmp_path: Path) -> SliceStore:
    return open_store(data, 1, tmp_path / "cache", lambda text: None)


def refused(data: DataSpec, tmp_path: Path) -> str:
    """The one message of submit, and of whoever opens the data; nothing is left of a cache."""
    there = set((tmp_path / "cache").glob("slices-*"))
    with pytest.raises(InputError) as by_headers:
        check_headers(data, 1)
    with pytest.raises(InputError):
        opened(data, tmp_path)
    assert set((tmp_path / "cache").glob("slices-*")) == there
    return str(by_headers.value)


# what is read


def test_images_captions_and_masks_come_as_they_are_written(tmp_path: Path) -> None:
    lines = lines_of(tmp_path)
    lines[0] |= {"mask_path": picture(tmp_path / "m0.png", box(2, 5, 3, 9)), "label": 2, "id": "first", "patient": 7, "caption": "  two\twords "}
    lines[1] |= {"mask_path": picture(tmp_path / "m1.png", box(0, 0, 0, 0))}
    store = opened(spec(write(tmp_path / "all.jsonl", lines)), tmp_path)
    assert store.channels == ["red", "green", "blue"] and store.regions == ("foreground",) and store.has_masks
    assert store.rows["caption"].tolist()[:2] == ["two words", "a picture of number 1"] and store.rows["id"].tolist()[:2] == ["first", "1"]
    assert store.rows[["patient", "label", "line"]].iloc[0].tolist() == ["7", "2", "all.jsonl:1"] and store.rows["label"].iloc[1] is None
    assert store.rows["masked"].tolist() == [True, True, False, False, False, False] and store.rows["mask_pixels"].tolist() == [18, 0, 0, 0, 0, 0]
    assert store.rows["split"].tolist() == ["train"] * 4 + ["val", "test"]
    # 12 x 20 pixels stand in the middle of 20 x 20, the rest is black and no mask
    for place, channel in enumerate(COLOURS):
        image = store.images(channel, np.array([3]))[0]
        np.testing.assert_allclose(image[4:16], noise(3)[..., place] / 255, atol=1e-6)
        assert not image[:4].any() and not image[16:].any()
    expected = np.zeros((20, 20), np.uint8)
    expected[6:9, 3:9] = 1
    assert np.array_equal(store.masks(np.array([0]))[0], expected) and not store.masks(np.array([1])).any()
    assert any("5 of 6 lines" in note for note in store.notes) and any("4 of 6 images have no mask" in note for note in store.notes)


def test_coloured_pictures_become_gray_and_sixteen_bits_stay(tmp_path: Path) -> None:
    deep = (noise(1, channels=1).astype(np.uint16) * 257 + 3).clip(0, 65535).astype(np.uint16)
    lines = [
        {"image_path": picture(tmp_path / "rgb.bmp", noise(0)), "caption": "a"}, {"image_path": picture(tmp_path / "deep.png", deep), "caption": "b"},
        {"image_path": picture(tmp_path / "deep.tif", deep[::-1].copy()), "caption": "c"}, {"image_path": picture(tmp_path / "flat.jpg", noise(2, channels=1) // 64 * 0 + np.arange(20, dtype=np.uint8) * 9), "caption": "d"},
    ]  # fmt: skip
    data = DataSpec.model_validate({"format": "jsonl", "root": write(tmp_path / "a.jsonl", lines), "size": 20, "splits": {"train": 0.5, "val": 0.25, "test": 0.25}})
    store = opened(data, tmp_path)
    rows = {name: row for row, name in enumerate(Path(file).name for file in store.rows["file_image"])}
    inside = {name: store.images("image", np.array([row]))[0][4:16] for name, row in rows.items()}
    np.testing.assert_allclose(inside["rgb.bmp"], noise(0) @ [0.299, 0.587, 0.114] / 255, atol=1e-5)
    np.testing.assert_allclose(inside["deep.png"], deep / 65535, atol=1e-6)
    np.testing.assert_allclose(inside["deep.tif"], deep[::-1] / 65535, atol=1e-6)
    np.testing.assert_allclose(inside["flat.jpg"][0], np.arange(20) * 9 / 255, atol=3 / 255)
    assert not store.has_masks and store.rows["window_high_image"].iloc[rows["deep.png"]] == 65535
    with pytest.raises(InputError, match="the data have no masks"):
        store.masks(np.array([0]))


def test_nifti_and_dicom_take_the_window(tmp_path: Path) -> None:
    values = np.random.default_rng(0).uniform(-1000, 1000, (20, 12, 1)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([-0.5, -0.5, 4, 1])), tmp_path / "a.nii.gz")
    stored = np.arange(240, dtype=np.uint16).reshape(12, 20) * 17
    save(tmp_path / "b.dcm", map_dataset(stored, RescaleSlope="2", RescaleIntercept="-1000", RescaleType="HU"))
    save(tmp_path / "c.dcm", map_dataset(stored, PhotometricInterpretation="MONOCHROME1", BitsStored=12))
    coloured = map_dataset(stored[:, :, None].repeat(3, axis=2).astype(np.uint8), PhotometricInterpretation="RGB", SamplesPerPixel=3, PlanarConfiguration=0, BitsAllocated=8, BitsStored=8, HighBit=7)
    coloured.Rows, coloured.Columns, coloured.PixelData = 12, 20, noise(5).tobytes()
    save(tmp_path / "d.dcm", coloured)
    lines = [{"image_path": name, "caption": name, "split": "train"} for name in ("a.nii.gz", "b.dcm", "c.dcm", "d.dcm")]
    data = spec(write(tmp_path / "a.jsonl", lines), images={"image": 0}, window={"fixed": [-1000, 1000]})
    store = opened(data, tmp_path)
    images = store.images("image", np.arange(4))[:, 4:16]
    np.testing.assert_allclose(images[0], (values[:, :, 0].T + 1000) / 2000, atol=1e-5)
    np.testing.assert_allclose(images[1], np.clip(stored * 2 / 2000.0, 0, 1), atol=1e-5)
    np.testing.assert_allclose(images[2], np.clip((4095 - stored.astype(float) + 1000) / 2000, 0, 1), atol=1e-5)
    np.testing.assert_allclose(images[3], noise(5) @ [0.299, 0.587, 0.114] / 255, atol=1e-5)
    assert store.rows["spacing_x_mm"].iloc[0] == pytest.approx(0.5) and store.rows["window_low_image"].tolist() == [-1000, -1000, -1000, 0]


def test_a_folder_of_files_decides_the_splits(tmp_path: Path) -> None:
    lines = lines_of(tmp_path)
    for line in lines:
        del line["split"]
    write(tmp_path / "train.jsonl", lines[:4]), write(tmp_path / "test.jsonl", lines[4:])
    store = opened(spec(tmp_path), tmp_path)
    assert store.rows["split"].tolist() == ["train"] * 4 + ["test"] * 2
    assert check_headers(spec(tmp_path), 1).patients == {"train": 4, "test": 2}
    write(tmp_path / "test.jsonl", [lines[4] | {"split": "val"}])
    assert f"{tmp_path}/test.jsonl:1: split is 'val', and the file's name says test" in refused(spec(tmp_path), tmp_path)
    (tmp_path / "train.jsonl").rename(tmp_path / "training.jsonl")
    assert "has no train.jsonl, only test.jsonl, training.jsonl" in refused(spec(tmp_path), tmp_path)
    assert "nowhere is missing; give the JSONL file" in refused(spec(tmp_path / "nowhere"), tmp_path)


def test_splits_are_drawn_by_patient_where_no_line_names_one(tmp_path: Path) -> None:
    lines = [{key: value for key, value in line.items() if key != "split"} | {"patient": number // 3} for number, line in enumerate(lines_of(tmp_path, 18))]
    store = opened(spec(write(tmp_path / "a.jsonl", lines)), tmp_path)
    assert store.rows.groupby("patient")["split"].nunique().max() == 1 and set(store.rows["split"]) == {"train", "val", "test"}
    assert any("patients were split by data.splits" in note for note in store.notes)


def test_images_of_one_name_in_several_folders_are_kept_apart(tmp_path: Path) -> None:
    lines = [{"image_path": f"{split}/1.png", "caption": "x", "split": split} for split in ("train", "test")]
    for number, split in enumerate(("train", "test")):
        picture(tmp_path / split / "1.png", noise(number))
    store = opened(spec(write(tmp_path / "a.jsonl", lines)), tmp_path)
    assert store.rows["id"].tolist() == ["line_1_1", "line_2_1"] and store.rows["patient"].nunique() == 2


def test_labels_give_captions(tmp_path: Path) -> None:
    lines = [{"image_path": line["image_path"], "label": number % 2, "split": line["split"]} for number, line in enumerate(lines_of(tmp_path))]
    lines[3]["caption"] = "its own"
    path = write(tmp_path / "a.jsonl", lines)
    store = opened(spec(path, label_texts={0: "no retinopathy", "1": "mild  retinopathy"}), tmp_path)
    assert store.rows["caption"].tolist() == ["no retinopathy", "mild retinopathy", "no retinopathy", "its own", "no retinopathy", "mild retinopathy"]
    assert store.classes == ("0", "1")
    told = refused(spec(path, label_texts={0: "none"}), tmp_path)
    assert f'{path}:2: no caption for the label "1"; write one, or a label of data.label_texts (0)' in told


# masks


def coverage(mask: np.ndarray, size: int) -> np.ndarray:
    """By brute force: every new pixel is cut into as many parts as there are pixels, so that each part lies in one of them."""
    side = max(mask.shape)
    square = np.zeros((side, side))
    top, left = ((side - count) // 2 for count in mask.shape)
    square[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    fine = np.kron(square, np.ones((size, size)))  # side * size, a multiple of both
    return np.asarray(fine.reshape(size, side, size, side).mean(axis=(1, 3)))


@pytest.mark.parametrize(("shape", "size"), [((12, 20), 20), ((12, 20), 10), ((20, 13), 7), ((9, 16), 12), ((5, 3), 8), ((1, 1), 4)])
def test_shares_are_areas(shape: tuple[int, int], size: int) -> None:
    mask = np.random.default_rng(size).random(shape) < 0.4
    np.testing.assert_allclose(shares_of(mask, size), coverage(mask, size), atol=1e-12)


def test_a_class_owns_the_pixels_of_which_it_covers_its_share(tmp_path: Path) -> None:
    """20 px become 5, so a pixel is 4 x 4; four rows of black lie above: a box of 2 x 2 covers a quarter, one of 2 x 4 a half."""
    masks = {"small": box(0, 2, 0, 2), "half": box(4, 6, 4, 8), "dot": box(8, 9, 8, 9)}
    names = {name: picture(tmp_path / f"{name}.png", mask) for name, mask in masks.items()}
    lines = lines_of(tmp_path)
    lines[0]["mask_path"] = names
    path = write(tmp_path / "a.jsonl", lines)
    found = {}
    for share in (0.5, 0.25, 1 / 16, 0.51):
        store = opened(spec(path, size=5, regions=list(masks), mask_share=share), tmp_path)
        found[share] = {(int(row), int(column)): int(store.masks(np.array([0]))[0, row, column]) for row, column in np.argwhere(store.masks(np.array([0]))[0])}
        lost = [name for name in masks if any(f"1 of 1 masks of {name} have no pixel left at 5 x 5" in note for note in store.notes)]
        assert lost == [name for name, area in (("small", 4 / 16), ("half", 8 / 16), ("dot", 1 / 16)) if area < share]
    assert found == {0.5: {(2, 1): 2}, 0.25: {(1, 0): 1, (2, 1): 2}, 1 / 16: {(1, 0): 1, (2, 1): 2, (3, 2): 3}, 0.51: {}}


def test_the_later_class_wins_and_it_is_noted(tmp_path: Path) -> None:
    masks = {"a": picture(tmp_path / "a.png", box(2, 8, 2, 10)), "b": picture(tmp_path / "b.png", box(4, 10, 6, 14))}
    lines = lines_of(tmp_path)
    lines[0]["mask_path"] = masks
    lines[1]["mask_path"] = {"a": None, "b": None}
    path = write(tmp_path / "all.jsonl", lines)
    for regions in (["a", "b"], ["b", "a"]):
        store = opened(spec(path, regions=regions), tmp_path)
        mask = store.masks(np.array([0]))[0]
        assert store.regions == tuple(regions) and store.rows["masked"].tolist()[:2] == [True, False]
        assert int((mask == 1).sum()) == 48 - 16 and int((mask == 2).sum()) == 48
        assert any("in 1 images classes overlap: 16 pixels belong to the later one" in note for note in store.notes)


def test_a_mask_may_be_black_and_one_colour(tmp_path: Path) -> None:
    mask = np.zeros((12, 20, 3), np.uint8)
    mask[2:4, 3:7] = (255, 0, 0)
    one, two = lines_of(tmp_path, 2)
    write(tmp_path / "a.jsonl", [one | {"mask_path": picture(tmp_path / "m.png", mask)}, two])
    store = opened(spec(tmp_path / "a.jsonl"), tmp_path)
    assert store.rows["mask_pixels"].tolist() == [8, 0]


# what is refused


BAD = [
    ("{", 'not JSON (Expecting property name'), ("[1]", "[1] is no object"), ('"x"', "is no object"), ('{"image_path": "0.png", "caption": "a", "caption": "b"}', 'the key "caption" stands twice'),
    ({"caption": "x"}, "no image_path"), ({"image_path": "1.png", "captoin": "x", "caption": "y"}, "unknown key \"captoin\"; did you mean 'caption'?"),
    ({"image_path": "1.png"}, "no caption; write one"), ({"image_path": "1.png", "caption": "  "}, 'caption is "  "; write a text that is not empty'),
    ({"image_path": "1.png", "caption": 3}, "caption is 3; write a text"), ({"image_path": 4, "caption": "x"}, "image_path is 4; write a text"),
    ({"image_path": "1.png", "caption": "half \ud800"}, "holds characters that are no text"), ({"image_path": "1\x00.png", "caption": "x"}, "holds characters that are no text"),
    ({"image_path": "1.png", "caption": "x", "patient": True}, "patient is true; write a text or a whole number, or leave it out"),
    ({"image_path": "1.png", "caption": "x", "split": "dev"}, "split is \"dev\"; write one of train, val, test"),
    ({"image_path": "none.png", "caption": "x", "split": "train"}, "none.png is missing; paths count from the folder of a.jsonl"),
    ({"image_path": "a" * 300, "caption": "x", "split": "train"}, "is not readable (File name too long)"),
    ({"image_path": ".", "caption": "x", "split": "train"}, "is not a file"),
    ({"image_path": "0.png", "caption": "x", "split": "train"}, "stands in line 1 already; keep one of them"),
    ({"image_path": "./../{folder}/0.png", "caption": "x", "split": "train"}, "stands in line 1 already; keep one of them"),
    ({"image_path": "1.png", "caption": "x"}, "no split, but line 1 has one"),
    ({"image_path": "1.png", "caption": "x", "split": "test", "patient": "p"}, "patient p is in test here and in train in line 1"),
    ({"image_path": "1.png", "caption": "x", "split": "train", "id": "i"}, "the id i stands in line 1 already"),
    ({"image_path": "1.png", "caption": "x", "split": "train", "mask_path": 3}, "mask_path is 3; write null (nothing known)"),
    ({"image_path": "1.png", "caption": "x", "split": "train", "mask_path": {}}, "mask_path is {}; write null"),
    ({"image_path": "1.png", "caption": "x", "split": "train", "mask_path": {"drusen": "m.png"}}, 'mask_path has the class "drusen"; data.regions names no classes'),
    ({"image_path": "1.png", "caption": "x", "split": "train", "mask_path": "none.png"}, "the mask of foreground"),
    ({"image_path": "1.png", "caption": "x", "split": "train", "mask_path": "small.png"}, "small.png: a mask of 10 x 6 pixels, and its image"),
    ({"image_path": "1.png", "caption": "x", "split": "train", "mask_path": "turned.png"}, "turned.png: a mask of 12 x 20 pixels, and its image"),
    ({"image_path": "1.png", "caption": "x", "split": "train", "mask_path": "coded.png"}, "coded.png: a mask in 4 colours; a mask is of one class: black, and one other colour"),
    ({"image_path": "1.png", "caption": "x", "split": "train", "mask_path": "soft.jpg"}, "soft.jpg: a JPEG has no sharp edges"),
    ({"image_path": "text.png", "caption": "x", "split": "train"}, "text.png: not a readable picture"),
    ({"image_path": "page.gif", "caption": "x", "split": "train"}, "page.gif: unknown image format; known are: .png, .jpg"),
    ({"image_path": "volume.nii", "caption": "x", "split": "train"}, "volume.nii: a volume of 3 slices; save one slice a file"),
    ({"image_path": "gray.png", "caption": "x", "split": "train"}, "gray.png: a gray image, and data.images names red, green, blue; write {image: 0}"),
    ({"image_path": "clear.png", "caption": "x", "split": "train"}, "clear.png: a RGBA picture"),
    ({"image_path": "huge.png", "caption": "x", "split": "train"}, "huge.png: not a readable picture (Image size (400000000 pixels) exceeds limit"),
    ({"image_path": "huge.nii", "caption": "x", "split": "train"}, "huge.nii: 20000 x 20000 pixels; at most 178,956,970 are decoded"),
]  # fmt: skip


def awkward_files(folder: Path) -> None:
    picture(folder / "small.png", box(1, 2, 1, 2, 6, 10)), picture(folder / "turned.png", box(1, 2, 1, 2, 20, 12)), picture(folder / "soft.jpg", box(2, 5, 3, 9))
    coded = np.zeros((12, 20, 3), np.uint8)
    coded[0, 0], coded[3, 3], coded[4, 4] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    picture(folder / "coded.png", coded), picture(folder / "gray.png", noise(7, channels=1)), picture(folder / "clear.png", noise(8, channels=4))
    (folder / "text.png").write_text("no picture"), (folder / "page.gif").write_text("x")
    nibabel.save(nibabel.Nifti1Image(np.ones((20, 12, 3), np.float32), np.eye(4)), folder / "volume.nii")
    header = nibabel.Nifti1Image(np.ones((20, 12, 1), np.uint8), np.eye(4)).header
    header.set_data_shape((20000, 20000, 1))
    header["magic"], header["vox_offset"] = b"n+1", 352
    (folder / "huge.nii").write_bytes(header.binaryblock + b"\0" * 4)
    # the header of 20,000 x 20,000 pixels, and none of them
    small = (folder / "0.png").read_bytes()
    (folder / "huge.png").write_bytes(_with_size(small, 20000))


def _with_size(png: bytes, side: int) -> bytes:
    import struct
    import zlib

    chunk = b"IHDR" + struct.pack(">II", side, side) + png[24:29]
    return png[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]


@pytest.mark.parametrize(("line", "told"), BAD, ids=[told[:40] for _, told in BAD])
def test_a_bad_line_is_told_with_its_number(line: dict[str, Any] | str, told: str, tmp_path: Path) -> None:
    (good, _) = lines_of(tmp_path, 2)
    awkward_files(tmp_path)
    if isinstance(line, dict) and isinstance(line.get("image_path"), str):
        line = {**line, "image_path": line["image_path"].replace("{folder}", tmp_path.name)}
    path = write(tmp_path / "a.jsonl", [good | {"patient": "p", "id": "i"}, "", line])
    message = refused(spec(path), tmp_path)
    assert f"{path}:3: " in message and told in message, message
    assert f"{path}:1:" not in message


def test_bytes_that_are_no_text_are_told(tmp_path: Path) -> None:
    lines_of(tmp_path, 1)
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"image_path": "0.png", "caption": "x"}\r\n\r\n{"image_path": "\xff"}\n' + b"[" * 100_000 + b"\n")
    message = refused(spec(tmp_path / "a.jsonl"), tmp_path)
    assert "2 problems" in message and "a.jsonl:3: not UTF-8" in message and "a.jsonl:4: not JSON" in message
    (tmp_path / "a.jsonl").write_text("\n\n")
    assert "a.jsonl: no lines; write one JSON object per line" in refused(spec(tmp_path / "a.jsonl"), tmp_path)


def test_all_problems_are_told_together(tmp_path: Path) -> None:
    lines: list[Any] = lines_of(tmp_path, 14)
    awkward_files(tmp_path)
    lines[1]["mask_path"] = "small.png"
    lines[2] = "{"
    for number in range(3, 14):
        lines[number]["image_path"] = f"gone{number}.png"
    path = write(tmp_path / "a.jsonl", lines)
    message = refused(spec(path), tmp_path)
    assert message.startswith("13 problems in lines of the data") and message.endswith("\n  and 3 more")
    assert [int(number) for number in re.findall(r"a\.jsonl:(\d+): ", message)] == list(range(2, 12))


def test_masks_and_images_that_only_pixels_tell_are_refused_when_they_are_read(tmp_path: Path) -> None:
    lines = lines_of(tmp_path)
    graded = box(2, 5, 3, 9)
    graded[3] //= 2
    lines[0]["mask_path"] = picture(tmp_path / "graded.png", graded)
    lines[1]["image_path"] = picture(tmp_path / "black.png", noise(0) * 0)
    path = write(tmp_path / "a.jsonl", lines)
    with pytest.raises(InputError) as caught:
        opened(spec(path), tmp_path)
    message = str(caught.value)
    assert f"2 problems in lines of the data; mend them, or remove the lines:\n  {path}:1: " in message and f"{path}:2: " in message
    assert "graded.png: no mask of one class: 2 values beside 0, such as 127, 255" in message and "black.png: every pixel is 0" in message
    assert not list((tmp_path / "cache").glob("slices-*"))


def test_the_same_content_in_two_splits_is_refused(tmp_path: Path) -> None:
    lines = lines_of(tmp_path)
    (tmp_path / "5.png").write_bytes((tmp_path / "0.png").read_bytes())
    path = write(tmp_path / "a.jsonl", lines)
    with pytest.raises(InputError) as caught:
        opened(spec(path), tmp_path)
    assert str(caught.value) == f"{path}:6: {tmp_path}/5.png in test is the same image as {tmp_path}/0.png in train ({path}:1); remove one of them, or the test result is too good"


@pytest.mark.parametrize(("changes", "told"), [
    ({"mask": "m"}, "mask has no effect with format: jsonl, where mask_path of each line says it"), ({"every": 2}, "every has no effect with format: jsonl"), ({"content": 0.1}, "content has no effect"),
    ({"images": {"a": 1}}, "images names the channels of images by their places"), ({"images": {"a": 0, "b": 1}}, "by their places"), ({"regions": []}, "regions names 1 to 255 different classes"),
    ({"regions": ["a", "a"]}, "regions names 1 to 255 different classes"), ({"regions": ["a/b"]}, "channel names are"), ({"regions": ["background"]}, "the name 'background' is kept"), ({"mask_share": 0}, "greater than 0"),
    ({"label_texts": {0: " "}}, "the caption of '0' is empty"), ({"window": {"percentiles": [0, 99], "per": "slice"}}, "per has no effect with format: jsonl"), ({"root": None}, "format: jsonl needs root: the JSONL file"),
    ({"format": "csv", "images": {"a": "a"}, "regions": ["x"]}, "regions has no effect with format: csv; it is of images with captions, format: jsonl"),
    ({"format": "csv", "images": {"a": "a"}, "mask_share": 0.1}, "mask_share has no effect"), ({"patient_pattern": "(x)"}, "patient_pattern has no effect with format: jsonl"),
])  # fmt: skip
def test_settings_without_effect_are_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=re.escape(told)):
        DataSpec.model_validate({"format": "jsonl", "root": tmp_path / "a.jsonl", "images": COLOURS, **changes})


def test_the_resolved_settings_are_read_again(tmp_path: Path) -> None:
    data = spec(tmp_path / "a.jsonl", regions=["a", "b"], mask_share=0.16, label_texts={0: "none"})
    assert DataSpec.model_validate(json.loads(json.dumps(data.model_dump(mode="json")))) == data and data.has_regions
    assert not spec(tmp_path / "a.jsonl", regions=["a"]).has_regions


values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=4)
records = st.dictionaries(st.sampled_from([*KEYS, "other"]), values | st.sampled_from(["a.png", "train", "0"]), max_size=7)


@settings(deadline=None, max_examples=120)
@given(st.one_of(st.binary(max_size=60), records.map(lambda record: json.dumps(record).encode()), values.map(lambda value: json.dumps(value).encode())))
def test_any_line_is_read_or_told(row: bytes) -> None:
    """Never both, never neither; and what is read are texts that files can hold."""
    line, problems = parse_line(Path("/data/a.jsonl"), 3, row, DataSpec.model_validate({"format": "jsonl", "root": "/data/a.jsonl", "label_texts": {0: "none"}}))
    assert (line is None) == bool(problems) and all(problem.encode() for problem in problems)
    if line is not None:
        record = json.loads(row)
        assert line.image == Path("/data") / record["image_path"] and line.caption == " ".join(line.caption.split()) != ""
        assert set(record) <= set(KEYS) and json.dumps([line.caption, line.label, line.patient, line.id, line.split], ensure_ascii=False).encode()
        assert line.masks is None or set(line.masks) == {"foreground"}


# what a cache is known by


def test_the_fingerprint_covers_everything_that_is_seen(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, label="1")
    lines[0]["mask_path"] = {"a": picture(tmp_path / "m.png", box(2, 5, 3, 9))}
    path, usual = tmp_path / "a.jsonl", {"regions": ["a", "b"]}

    def fingerprint(changed: list[dict[str, Any]] = lines, **changes: Any) -> str:
        return opened(spec(write(path, changed), **{**usual, **changes}), tmp_path).fingerprint

    first = fingerprint()
    assert fingerprint() == first and fingerprint(label_texts={"7": "unused"}) == first
    others = [
        fingerprint([{**lines[0], "caption": "another"}, *lines[1:]]), fingerprint([{**lines[0], "label": "2"}, *lines[1:]]), fingerprint([{**lines[0], "mask_path": None}, *lines[1:]]),
        fingerprint([{**lines[0], "mask_path": {"b": "m.png"}}, *lines[1:]]), fingerprint([{**lines[0], "patient": "p"}, *lines[1:]]), fingerprint(lines[:5]),
        fingerprint(regions=["a"]), fingerprint(regions=["b", "a"]), fingerprint(mask_share=0.4), fingerprint(size=16), fingerprint(images={"image": 0}),
    ]  # fmt: skip
    picture(tmp_path / "m.png", box(2, 6, 3, 9))
    others.append(fingerprint())
    picture(tmp_path / "1.png", noise(77))
    others.append(fingerprint())
    assert len({first, *others}) == 1 + len(others)


# captions


def test_sides_are_whole_words() -> None:
    assert sides_named("Left-sided effusion, UPPER lobe; leftmost rib") == ("left", "upper")
    assert sides_named("a bright, temporally stable lesion_right") == ("right",) and sides_named("superiorly brighter") == ()
    assert naming_sides(["the left eye", None, "nasal to the disc", "upright", "rightward shift"]) == [0, 4]
    assert naming_sides(["nasal to the disc", "the left eye"], ("nasal", "temporal")) == [0]
    assert words_of("A 1.5 T left-sided T1-weighted image, isn't it?") == ["a", "1.5", "t", "left-sided", "t1-weighted", "image", "isn't", "it"]
    assert vocabulary(["A b", "b, B"]) == {"a": 1, "b": 3}


# from the command line


def test_data_shows_captions_and_masks(tmp_path: Path, write_spec: Callable[[dict[str, Any]], Path], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, what `medgen data` calls: loading everything once more takes longer than all of the rest."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    lines = lines_of(tmp_path)
    lines[0] |= {"mask_path": {"spot": picture(tmp_path / "m.png", box(2, 5, 3, 9))}, "caption": "bleeding in the left eye, nasal to the disc, of this patient"}
    write(tmp_path / "a.jsonl", lines)
    path = write_spec({"version": 1, "name": "x", "data": {"format": "jsonl", "root": str(tmp_path / "a.jsonl"), "size": 20, "images": COLOURS, "regions": ["spot", "other"]}, "stages": {"a": {"kind": "command", "run": "true"}}})
    checks.show_data(path, [], tmp_path / "data_summary", as_json=False)
    shown = capsys.readouterr().out
    facts = summarise(opened(spec(tmp_path / "a.jsonl", regions=["spot", "other"]), tmp_path))
    assert facts["captions"]["words"] == {"median": 5.0, "most": 12, "longest": "a.jsonl:1"} and facts["captions"]["sides"] == {"left": 1, "nasal": 1}
    assert facts["captions"]["distinct"] == 6 and facts["captions"]["vocabulary"] == 4 + 5 + 10 and facts["captions"]["frequent"]["number"] == 5
    assert facts["masks"]["given"] == 1 and facts["masks"]["absent"] == 5
    assert facts["masks"]["classes"] == {"spot": {"masks": 1, "images": 1, "pixels": 18, "share": 0.045}, "other": {"masks": 0, "images": 0, "pixels": 0, "share": 0.0}}
    assert "captions: 6 of 6 images, 6 distinct; words: median 5, most 12 (a.jsonl:1)" in shown and "captions that name a side: left 1, nasal 1" in shown
    assert "masks of 1 images, none of 5" in shown and (tmp_path / "data_summary" / "contact_sheet.png").is_file()


def test_submit_and_check_tell_before_anything_is_queued(tmp_path: Path, medgen: Cli, write_spec: Callable[[dict[str, Any]], Path]) -> None:
    lines = lines_of(tmp_path)
    lines[1]["image_path"] = "gone.png"
    write(tmp_path / "a.jsonl", [*lines[:2], "{", *lines[2:]])
    net = {**TINY_NET, "strategy": "rflow", "mode": "seg"}
    job = {"version": 1, "name": "x", "data": {"format": "jsonl", "root": "a.jsonl", "size": 16}, "stages": {"train": {"kind": "train", "config": net, "resources": {"cpus": 1}}}}
    path = write_spec(job)
    told = [medgen("submit", path, "--local", expect=2).stderr, medgen("check", path, expect=2).stderr]
    assert all("a.jsonl:2: the image" in text and "a.jsonl:3: not JSON" in text for text in told) and not list((tmp_path / "runs").glob("x-*"))
    write(tmp_path / "a.jsonl", [lines[0], *lines[2:]])
    with pytest.raises(InputError, match=r"stages.train: its model is trained on masks, and no training image has one; give lines of .*a.jsonl a mask_path"):
        submit.check_data(load(path, [f"data.root={tmp_path / 'a.jsonl'}"]))


@pytest.mark.parametrize(("mode", "positive_only", "refused"), [("bravo", False, True), ("bravo", True, False), ("seg", False, False)])
def test_an_unknown_mask_is_not_taken_for_an_empty_one(mode: str, positive_only: bool, refused: bool, tmp_path: Path) -> None:
    lines = lines_of(tmp_path)
    lines[0]["mask_path"] = picture(tmp_path / "m.png", box(2, 5, 3, 9))
    data = {"format": "jsonl", "root": str(write(tmp_path / "a.jsonl", lines)), "size": 16, "images": {"bravo": 0}, "positive_only": positive_only}
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "name": "x", "data": data, "stages": {"train": {"kind": "train", "config": {**TINY_NET, "batch_size": 1, "strategy": "rflow", "mode": mode}}}}))
    if refused:
        with pytest.raises(InputError, match=r"stages.train: its model is trained on masks, and 3 training images have none \(mask_path: null\)"):
            submit.check_data(load(path))
    else:
        assert submit.check_data(load(path)).startswith("6 patients (4 train, 1 val, 1 test), 6 slices, images 20x12x1")


def test_a_family_that_knows_no_captions_trains(tmp_path: Path, medgen: Cli, write_spec: Callable[[dict[str, Any]], Path]) -> None:
    lines = lines_of(tmp_path, 12)
    for number, line in enumerate(lines):
        line["mask_path"] = picture(tmp_path / f"m{number}.png", box(2, 8, number, number + 6))
    write(tmp_path / "a.jsonl", lines)
    net = {**TINY_NET, "strategy": "rflow", "mode": "seg", "batch_size": 4}
    stages = {"train": {"kind": "train", "config": net, "resources": {"cpus": 1}}}
    medgen("submit", write_spec({"version": 1, "name": "x", "data": {"format": "jsonl", "root": "a.jsonl", "size": 16}, "stages": stages}), "--local")
    (run,) = (tmp_path / "runs").glob("x-*")
    assert list((run / "train" / "ckpt").glob("step-*/commit.json"))


# real data


def test_idrid_by_the_documented_snippet(idrid: Path, tmp_path: Path) -> None:
    """The snippet of docs/jsonl_data.md makes the files; at 128 px a share of 0.16 keeps lesions that one of 0.5 loses."""
    page = (REPOSITORY / "docs" / "jsonl_data.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    data = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)[0])["data"]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "IDRID": str(idrid)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stores = [opened(DataSpec.model_validate({**data, "root": tmp_path / "fundus", "mask_share": share}), tmp_path) for share in (0.16, 0.5)]
    with open(idrid / "segmentation.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert len(stores[0].rows) == len(rows) == 81 and stores[0].rows["split"].value_counts().to_dict() == {"train": 54, "test": 27}
    assert stores[0].rows["caption"].tolist() == [row["caption"] for row in rows] and stores[0].rows["masked"].all()
    assert naming_sides(stores[0].rows["caption"]) == []
    smallest = [int((store.masks(np.arange(81)) == 1).sum()) for store in stores]
    assert smallest[0] > 2 * smallest[1] > 0, "microaneurysms are smaller than half a pixel"
    # of a landscape photograph 85 of 128 rows are image
    inside = stores[0].images("green", np.arange(81)).max(axis=(0, 2)) > 0
    assert inside[22:106].all() and not inside[:21].any() and not inside[107:].any()
