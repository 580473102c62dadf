"""Folder trees and manifests to an index: nothing is dropped in silence, each file that is left out has its reason."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from conftest import REPOSITORY
from dicom_writing import enhanced_dataset, map_dataset, save, values
from pydicom.uid import JPEGLSLossless

from medgen.cardiac.candidates import REASONS
from medgen.cardiac.tree import Index, read_tree
from medgen.errors import InputError

SHAPE = (64, 48)  # rows, columns


def circle(radius: float, centre: tuple[float, float] = (24, 30), count: int = 40) -> np.ndarray:
    angle = np.arange(count) * 2 * np.pi / count
    return np.stack([centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle)], axis=1)


def contours_json(epicardium: np.ndarray | None = None, endocardium: np.ndarray | None = None) -> dict[str, list[float]]:
    outer, inner = (circle(14) if epicardium is None else epicardium), (circle(9) if endocardium is None else endocardium)
    return {"epicardial_contours_x": outer[:, 0].tolist(), "epicardial_contours_y": outer[:, 1].tolist(),
            "endocardial_contours_x": inner[:, 0].tolist(), "endocardial_contours_y": inner[:, 1].tolist()}  # fmt: skip


def write_contours(path: Path, **curves: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contours_json(**curves)))
    return path


def write_map(path: Path, kind: str = "T1", shape: tuple[int, int] = SHAPE, **attributes: Any) -> Path:
    return save(path, map_dataset(values(*shape), ("DERIVED", "PRIMARY", f"{kind} MAP"), **{"PatientID": None, **attributes}))


def write_patient(folder: Path, kinds: tuple[str, ...] = ("T1", "T2"), levels: tuple[str, ...] = ("Apex", "Mid", "Base"), **attributes: Any) -> Path:
    for kind in kinds:
        for level in levels:
            write_map(folder / f"{kind}_Mapping_" / f"{level}.dcm", kind, **attributes)
            write_contours(folder / f"{kind}_map_{level.lower()}{'_' if level == 'Mid' else ''}" / "Contours.json")
    return folder


def skipped(index: Index) -> dict[str, str]:
    """Reason by path below the root."""
    return {str(skip.path.relative_to(index.root)): skip.reason for skip in index.skipped}


def all_told(index: Index) -> bool:
    """Every file of the tree is an entry, the contours of a candidate, or left out with a reason."""
    used = {entry.header.source for entry in index.entries} | {path for entry in index.entries for path in entry.contour_files}
    left_out = {skip.path for skip in index.skipped}
    return {path for path in index.root.rglob("*") if path.is_file()} <= used | left_out


def test_the_cohort_layout(tmp_path: Path) -> None:
    patient = write_patient(tmp_path / "2022_11_22" / "Patient (3)")
    write_patient(tmp_path / "2023_07_09" / "Patient (12)", kinds=("T1",))
    write_map(patient / "T1_Mapping_" / "Apex_2.dcm")
    write_map(patient / "T1_map_apex" / "1.2.3.dcm")
    write_map(patient / "T1_map_apex_contrast" / "1.2.3.dcm")
    write_map(patient / "T2_Mapping_uncorrected" / "Apex.dcm")
    write_contours(patient / "T1_map_apex" / "Contours_2.json")
    write_contours(patient / "T2_map_base" / "notes.json")
    (patient / "T2_Mapping_" / "Base.dcm").unlink()
    (tmp_path / "list.txt").write_text("x")
    index = read_tree(tmp_path)
    assert index.layout == "mapping" and index.patients == ("Patient (12)", "Patient (3)") and all_told(index)
    assert [entry.id for entry in index.entries[:4]] == ["Patient_12_T1_apex", "Patient_12_T1_base", "Patient_12_T1_mid", "Patient_3_T1_apex"]
    assert [(entry.header.type, entry.header.region) for entry in index.entries if entry.patient == "Patient (3)"] == [
        ("T1", "apex"), ("T1", "base"), ("T1", "mid"), ("T2", "apex"), ("T2", "mid")]  # fmt: skip
    place = "2022_11_22/Patient (3)/"
    assert skipped(index) == {
        "list.txt": "no part of the layout", f"{place}T1_Mapping_/Apex_2.dcm": "after contrast", f"{place}T1_map_apex/1.2.3.dcm": "raw weighted image, no map",
        f"{place}T1_map_apex_contrast/1.2.3.dcm": "after contrast", f"{place}T2_Mapping_uncorrected/Apex.dcm": "without motion correction",
        f"{place}T1_map_apex/Contours_2.json": "contours of another observer", f"{place}T2_map_base/Contours.json": "contours without an image",
        f"{place}T2_map_base/notes.json": "no part of the layout",
    }  # fmt: skip
    assert not index.notes and set(index.reasons()) <= set(REASONS) and sum(index.reasons().values()) == 8


def test_an_entry_gives_map_and_masks(tmp_path: Path) -> None:
    entry = read_tree(write_patient(tmp_path / "Patient (1)", ("T2",), ("Mid",)).parent).entries[0]
    assert entry.load().pixels.max() == pytest.approx(values(*SHAPE).max() / 10) and entry.grid().spacing_mm == (1.40625, 1.5)
    labels = entry.anatomy().labels(entry.grid())
    assert labels.shape == SHAPE and labels[30, 24] == 2 and labels[30, 24 + 12] == 1
    finer = entry.grid().at_spacing((0.7, 0.7))
    area_mm2 = [(entry.anatomy().labels(grid) == 2).sum() * grid.pixel_area_mm2 for grid in (entry.grid(), finer)]
    assert area_mm2 == pytest.approx([np.pi * 81 * 1.40625 * 1.5] * 2, rel=0.03)


def test_the_newest_delivery_of_a_patient_counts(tmp_path: Path) -> None:
    for date in ("2022_11_22", "2023_08_15", "2023_07_09"):
        write_patient(tmp_path / date / "Patient (7)", ("T1",), ("Mid",), StudyDate=date.replace("_", ""))
    write_patient(tmp_path / "2022_11_22" / "Patient (8)", ("T1",), ("Mid",))
    index = read_tree(tmp_path)
    assert [(entry.patient, entry.header.study_date) for entry in index.entries] == [("Patient (7)", "20230815"), ("Patient (8)", "20221122")]
    assert index.reasons() == {"older delivery of the patient": 4} and all_told(index)
    assert index.notes == ("1 patients are in several deliveries, the newest is used: Patient (7)",)


WRONG = {
    "no contours": lambda folder: (folder / "T1_map_mid_" / "Contours.json").unlink(),
    "only one of epicardium and endocardium": lambda folder: write_contours(folder / "T1_map_mid_" / "Contours.json", endocardium=np.empty((0, 2))),
    "endocardium outside the epicardium": lambda folder: write_contours(folder / "T1_map_mid_" / "Contours.json", endocardium=circle(9, (35, 30))),
    "contour of another image size": lambda folder: write_contours(folder / "T1_map_mid_" / "Contours.json", epicardium=circle(14, (200, 180))),
    "rows and columns of the contour exchanged": lambda folder: write_contours(
        folder / "T1_map_mid_" / "Contours.json", epicardium=circle(14, (45, 20)), endocardium=circle(9, (45, 20))),
    "contours unusable": lambda folder: (folder / "T1_map_mid_" / "Contours.json").write_text("{"),
    "unknown type": lambda folder: write_map(folder / "T1_Mapping_" / "Mid.dcm", SeriesDescription="T1_map or T2_map", ImageType=["DERIVED"]),
    "no pixel spacing": lambda folder: write_map(folder / "T1_Mapping_" / "Mid.dcm", PixelSpacing=None),
    "image unreadable": lambda folder: (folder / "T1_Mapping_" / "Mid.dcm").write_bytes(b"no image"),
}  # fmt: skip


@pytest.mark.parametrize("reason", WRONG)
def test_every_reason_is_told_with_the_file(tmp_path: Path, reason: str) -> None:
    folder = write_patient(tmp_path / "Patient (1)", ("T1",))
    WRONG[reason](folder)
    index = read_tree(tmp_path)
    assert skipped(index)["Patient (1)/T1_Mapping_/Mid.dcm"] == reason and [entry.header.region for entry in index.entries] == ["apex", "base"]
    (line,) = [skip.detail for skip in index.skipped if skip.reason == reason]
    assert len(line) > 20 and f"1 {reason}\n    Patient (1)/T1_Mapping_/Mid.dcm: " in index.report()


def test_a_compressed_file_without_decoder(tmp_path: Path) -> None:
    folder = write_patient(tmp_path / "Patient (1)", ("T1",), ("Mid",))
    dataset = map_dataset(values(*SHAPE))
    dataset.file_meta.TransferSyntaxUID, dataset.PixelData = JPEGLSLossless, pydicom.encaps.encapsulate([b"\0\0"])
    save(folder / "T1_Mapping_" / "Mid.dcm", dataset)
    if pydicom.pixels.get_decoder(JPEGLSLossless).is_available:
        pytest.skip("this installation decodes JPEG-LS")
    assert skipped(read_tree(tmp_path)) == {"Patient (1)/T1_Mapping_/Mid.dcm": "compressed without a decoder"}


def test_contradictions_copies_and_shared_identities_are_noted(tmp_path: Path) -> None:
    folder = write_patient(tmp_path / "Patient (1)", ("T1",), PatientID="A")
    write_patient(tmp_path / "Patient (2)", ("T1",), ("Mid",), PatientID="A")
    write_map(folder / "T1_Mapping_" / "Apex.dcm", "T2")
    shutil.copy(folder / "T1_Mapping_" / "Mid.dcm", folder / "T1_Mapping_" / "Base.dcm")
    index = read_tree(tmp_path)
    assert index.notes[0].startswith("1 images are taken as T2 by ImageType, but folder says T1: ")
    assert index.notes[1].startswith("PatientID A stands in the files of 2 patients (Patient (1), Patient (2)); if they are one person")
    assert skipped(index) == {"Patient (1)/T1_Mapping_/Mid.dcm": "the same image twice"} and len(index.entries) == 3
    assert "note: 1 images are taken as T2" in index.report()


def test_a_heart_of_unusual_size_is_noted(tmp_path: Path) -> None:
    """Drawn on an image of a quarter the size, a contour fits; its millimetres do not."""
    folder = write_patient(tmp_path / "Patient (1)", ("T1",))
    write_contours(folder / "T1_map_apex" / "Contours.json", epicardium=circle(14) / 4, endocardium=circle(9) / 4)
    (note,) = read_tree(tmp_path).notes
    assert note.startswith("the epicardium of 1 images is 10 mm wide (") and "Apex.dcm), usual are 12 to 140 mm; is the pixel spacing right" in note


def test_the_skipped_files_as_a_table(tmp_path: Path) -> None:
    folder = write_patient(tmp_path / "data" / "Patient (1)", ("T1",))
    WRONG["image unreadable"](folder)
    read_tree(tmp_path / "data").write_skipped(tmp_path / "skipped.csv")
    (row,) = csv.DictReader((tmp_path / "skipped.csv").open())
    assert row["path"].endswith("Mid.dcm") and row["reason"] == "image unreadable" and row["detail"].startswith("no DICOM image")


def write_manifest(folder: Path, *lines: str) -> Path:
    path = folder / "manifest.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_manifest(tmp_path: Path) -> None:
    """Its cells win over the file; frames of one file and curves of one table are told apart."""
    save(tmp_path / "T2_mapping" / "many.dcm", enhanced_dataset(np.stack([values(*SHAPE)] * 3)))
    write_map(tmp_path / "one.dcm", "T1")
    write_contours(tmp_path / "c.json")
    table = ["kind,column_px,row_px,image"]
    for image, shift in (("first", 0), ("third", 5)):
        table += [f"{kind},{x + shift + 0.5},{y + 0.5},{image}" for kind, radius in (("epicardium", 14), ("endocardium", 9)) for x, y in circle(radius)]
    (tmp_path / "curves.csv").write_text("\n".join(table))
    index = read_tree(write_manifest(
        tmp_path, "image,patient,contours,contour_image,frame,type,ms_per_value,region,first_pixel_centre",
        "one.dcm,a,c.json,,,T2,0.25,base,",
        "T2_mapping/many.dcm,b,curves.csv,first,0,,,,0.5",
        "T2_mapping/many.dcm,b,curves.csv,third,2,,,mid,0.5",
    ))  # fmt: skip
    first, third, second = index.entries  # by patient and id: b_T1_many stands before b_T1_mid
    assert (first.header.type, first.header.type_from, first.header.unit_from, first.header.region) == ("T2", "manifest", "manifest", "base")
    assert first.load().pixels.max() == values(*SHAPE).max() / 4 and "taken as T2 by manifest, but ImageType says T1" in index.notes[0]
    assert [(entry.header.frame, entry.header.type) for entry in (second, third)] == [(2, "T1"), (0, "T1")] and second.id == "b_T1_mid"
    np.testing.assert_allclose(third.contours[0].points, circle(14), atol=1e-9)
    np.testing.assert_allclose(second.contours[0].points, np.add(circle(14), (5, 0)), atol=1e-9)


def test_a_workspace_serves_many_images_by_their_uid(tmp_path: Path) -> None:
    def curve(name: str, points: np.ndarray) -> str:
        listed = "".join(f"<i><Point:x>{x * 8:.0f}</Point:x><Point:y>{y * 8:.0f}</Point:y></i>" for x, y in points)
        return f'<i Hash:key="{name}"><i Hash:key="Points">{listed}</i><i Hash:key="SubpixelResolution">8</i></i>'

    uids = [str(pydicom.dcmread(write_map(tmp_path / f"{name}.dcm")).SOPInstanceUID) for name in "ab"]
    states = [f'<i Hash:key="{uid}"><i Hash:key="Contours">{curve("saepicardialContour", circle(14 - n))}{curve("saendocardialContour", circle(9 - n))}</i></i>' for n, uid in enumerate(uids)]
    (tmp_path / "w.cvi42wsx").write_text(f'<w><i Hash:key="ImageStates">{"".join(states)}</i></w>')
    write_map(tmp_path / "c.dcm")
    index = read_tree(write_manifest(tmp_path, "image,patient,contours", *(f"{name}.dcm,{name},w.cvi42wsx" for name in "abc")))
    assert [np.ptp(entry.contours[0].points[:, 0]) for entry in index.entries] == pytest.approx([28, 26], abs=0.2)
    assert skipped_details(index) == [("no contours", "has none of this image")]


def skipped_details(index: Index) -> list[tuple[str, str]]:
    return [(skip.reason, skip.detail[-len("has none of this image") :]) for skip in index.skipped]


def test_contours_are_of_one_frame_and_not_of_all(tmp_path: Path) -> None:
    """A beating heart is drawn in one of its frames: in the others it is somewhere else."""
    save(tmp_path / "beats.dcm", enhanced_dataset(np.stack([values(*SHAPE)] * 3)))
    write_contours(tmp_path / "c.json")
    index = read_tree(write_manifest(tmp_path, "image,patient,contours,type", "beats.dcm,a,c.json,T1"))
    assert not index.entries and [skip.reason for skip in index.skipped] == ["no contours"] * 3
    assert "frame 1: the file has 3 frames and nothing says which one its contours are drawn on; write frame into a manifest" in index.skipped[1].detail
    one = read_tree(write_manifest(tmp_path, "image,patient,contours,type,frame", "beats.dcm,a,c.json,T1,1"))
    assert [entry.header.frame for entry in one.entries] == [1] and not one.skipped


def test_deliveries_of_one_date_have_an_order(tmp_path: Path) -> None:
    for place, shift in (("2024_01_01", 0), ("2024-01-01", 3)):
        write_patient(tmp_path / place / "Patient (1)", kinds=("T1",), levels=("Mid",), StudyID=str(shift))
    (entry,) = read_tree(tmp_path).entries
    assert entry.header.source.parts[-4] == "2024_01_01", "by the names of the folders, whatever the disk lists first"


def test_a_manifest_that_leaves_things_open(tmp_path: Path) -> None:
    write_map(tmp_path / "one.dcm", "T1")
    (tmp_path / "m.con").write_text("Image_resolution=48x64\n" + "".join(f"[XYCONTOUR]\n{n} 0 1 1.0\n3\n1 1\n9 1\n5 9\n" for n in (1, 2)))
    index = read_tree(write_manifest(tmp_path, "image,patient,contours,frame", "one.dcm,a,m.con,", "two.dcm,b,m.con,", "three.dcm,c,,0"))
    assert [(skip.reason, skip.path.name) for skip in index.skipped] == [("contours unusable", "one.dcm"), ("image unreadable", "three.dcm"), ("image unreadable", "two.dcm")]
    assert "holds contours of 2 images (1/0, 2/0) and nothing says which" in index.skipped[0].detail and not index.entries


@pytest.mark.parametrize(("lines", "message"), [
    (["image,patient,typ", "a.dcm,1,T1"], "unknown column 'typ'; the columns are: image, patient, contours"),
    (["image,contours", "a.dcm,c.json"], "no column 'patient'"),
    (["image,patient", "a.dcm,"], "manifest.csv:2: patient is empty"),
    (["image,patient,type", "a.dcm,1,T3"], "manifest.csv:2: type is 'T3'; write one of T1, T2, cine"),
    (["image,patient,region", "a.dcm,1,top"], "region is 'top'; write one of apex, mid, base"),
    (["image,patient,ms_per_value", "a.dcm,1,0"], "ms_per_value is 0; write how many ms"),
    (["image,patient,ms_per_value", "a.dcm,1,nan"], "ms_per_value is 'nan'; write a number"),
    (["image,patient,frame", "a.dcm,1,-1"], "frame is '-1'; write a whole number"),
    (["image,patient,contour_image", "a.dcm,1,5"], "contour_image has no effect without contours"),
    (["image,patient,contours,first_pixel_centre", "a.dcm,1,,1"], "first_pixel_centre has no effect without contours"),
    (["image,patient", "a.dcm,1", "a.dcm,2"], "manifest.csv:3: a.dcm stands in line 2 already"),
    (["image,patient,frame", "a.dcm,1,", "a.dcm,2,3"], "manifest.csv:3: a.dcm stands in line 2 already"),
])  # fmt: skip
def test_a_manifest_that_cannot_be(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        read_tree(write_manifest(tmp_path, *lines))


def test_no_known_layout(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no known layout; known are .* write a manifest: a CSV file with the columns image, patient"):
        read_tree(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        read_tree(tmp_path / "none")


def test_the_real_tree(sunnybrook: Path) -> None:
    """96 frames: 50 have no epicardium, 9 one that was drawn beside the heart; 37 of 4 patients are left, and every file is told."""
    index = read_tree(sunnybrook)
    assert index.layout == "sunnybrook" and len(index.entries) == 37 and len(index.patients) == 4 and not index.notes
    assert index.reasons() == {"only one of epicardium and endocardium": 50, "endocardium outside the epicardium": 9, "no part of the layout": 4}
    entry = next(entry for entry in index.entries if entry.id == "SCD0000101_cine_119")
    pixels, labels = entry.load().pixels, entry.anatomy().labels(entry.grid())
    assert entry.header.type == "cine" and pixels[labels == 2].mean() > 1.5 * pixels[labels == 1].mean()  # blood is bright, muscle dark


def test_the_documented_lines_run(sunnybrook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The Python of docs/cardiac_data.md prints what stands below it, dots aside."""
    text = (REPOSITORY / "docs" / "cardiac_data.md").read_text()
    (code,), (screen,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL), re.findall(r"```\n(scd_cardiac.*?)```", text, flags=re.DOTALL)
    (tmp_path / "scd_cardiac").symlink_to(sunnybrook)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in screen.splitlines() if line.strip() != "..." and line not in printed] == []
    assert names["labels"].shape == names["grid"].shape and set(np.unique(names["labels"])) == {0, 1, 2}
