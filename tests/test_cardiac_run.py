"""Cardiac maps as a user makes them: drawn from contours at their own and at another spacing, and given away as DICOM and NIfTI."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
import yaml
from conftest import tiny_spec

from medgen.cardiac.dicom import Map, read_headers, read_map
from medgen.cardiac.dicom_writing import Synthetic, dicom_bytes, scale_of, uid_of
from medgen.cardiac.map_type import MapType
from medgen.cardiac.rasterise import Grid
from medgen.cardiac.tree import read_tree
from medgen.conditions import Classes, moved_affine
from medgen.data.cardiac_phantoms import write_cardiac_phantoms
from medgen.data.splits import assign_splits

Medgen = Callable[..., Any]
WriteSpec = Callable[[dict[str, Any]], Path]
NET: dict[str, Any] = {
    "model": "sdm", "epochs": 1, "batch_size": 8, "warmup_epochs": 0.5, "channels": 8, "multipliers": [1, 2], "attention": [False, True], "res_blocks": 1, "head_channels": 8,
    "spade_channels": 8, "lr": 1.0e-3, "respacing": {"factors": [1, 1.5]}, "ema": {"beta": 0.9, "update_after_step": 1, "update_every": 1}, "loop": {"log_steps": 1, "preview_images": 2},
}  # fmt: skip
SAMPLING = {"sampler": "ddim", "steps": 2}
SIZE = 32


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "cohort"
    write_cardiac_phantoms(folder, 5, 3)
    return folder


def spec_of(cohort: Path, name: str, **stages: Any) -> dict[str, Any]:
    data = {"format": "cardiac", "root": str(cohort), "size": SIZE, "splits": {"train": 0.6, "val": 0.2, "test": 0.2}}
    train = {"kind": "train", "config": NET, "resources": {"cpus": 1}}
    return {**tiny_spec(name=name), "data": data, "stages": {"train": train, **stages}}


def drawn(**more: Any) -> dict[str, Any]:
    return {"kind": "generate", "from": "train", "condition": "test", "chunk": 2, "sampling": SAMPLING, "resources": {"cpus": 1}, **more}


def only_run(tmp_path: Path, name: str) -> Path:
    (found,) = (tmp_path / "runs").glob(f"{name}-*")
    return found


def table(run: Path, stage: str) -> pd.DataFrame:
    return pd.read_csv(run / stage / "dataset" / "index.csv", dtype={"id": str})


def exported(run: Path, stage: str) -> list[tuple[pd.Series, Map, nibabel.Nifti1Image, np.ndarray]]:
    """Row of the index, DICOM, NIfTI and labels of each image."""
    folder, found = run / stage / "dataset", []
    for _, row in table(run, stage).iterrows():
        (header,) = read_headers(folder / row["export_dicom"])
        labels = np.asarray(nibabel.load(folder / row["export_labels"]).dataobj)[:, :, 0]
        found.append((row, read_map(header), nibabel.load(folder / row["export_nifti"]), labels))
    return found


@dataclass(frozen=True)
class Finished:
    """A job that was run once for all tests here."""

    folder: Path
    environment: dict[str, str]

    @property
    def run(self) -> Path:
        return only_run(self.folder, "maps")

    def medgen(self, *arguments: object, expect: int = 0) -> str:
        done = subprocess.run([sys.executable, "-m", "medgen", *map(str, arguments)], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path, cohort: Path) -> Finished:
    folder = tmp_path_factory.mktemp("job")
    spec = spec_of(
        cohort, "maps",
        maps=drawn(per_class=[3, 4], export=["dicom", "nifti"]),
        coarse=drawn(count=2, spacing_mm=2.0, export=["dicom", "nifti"]),
        oblong=drawn(count=2, spacing_mm=[1.8, 2.2], export=["nifti"]),
    )  # fmt: skip
    (folder / "maps.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    found = Finished(folder, {**os.environ, "MEDGEN_RUNS": str(folder / "runs"), "MEDGEN_CACHE": str(cache), "OMP_NUM_THREADS": "1", "COLUMNS": "140"})
    found.medgen("submit", "maps.yaml", "--local")
    return found


def test_maps_are_given_away_in_their_unit_and_in_the_place_of_their_contours(finished: Finished, cohort: Path) -> None:
    run, entries = finished.run, read_tree(cohort).entries
    every = exported(run, "maps")
    assert [row["label"] for row, *_ in every] == ["T1"] * 3 + ["T2"] * 4
    for row, image, nifti, labels in every:
        window = {"T1": 2500.0, "T2": 200.0}[row["label"]]
        assert (image.type, image.type_from, image.unit, image.unit_from) == (row["label"], "ImageType", "ms", "RescaleSlope, in ms")
        own = np.asarray(nibabel.load(run / "maps" / "dataset" / row["image"]).dataobj)[:, :, 0]
        assert np.abs(image.pixels - own * window).max() <= 0.51 * image.scale[0] + window / 65535, "in ms, to half a stored value; nothing is padded in 32 of 150 pixels"
        assert np.allclose(np.asarray(nifti.dataobj)[:, :, 0], image.pixels, atol=1e-4) and set(np.unique(labels)) <= {0, 1, 2} and (labels == 2).any()
        assert np.allclose(np.sqrt((nifti.affine[:3, :2] ** 2).sum(axis=0)), image.spacing_mm, atol=1e-5)
        assert image.orientation is not None and image.position_mm is not None
        lps = np.array(image.position_mm) + 5 * image.spacing_mm[0] * np.array(image.orientation[3:]) + 9 * image.spacing_mm[1] * np.array(image.orientation[:3])
        assert np.allclose(nifti.affine @ [5, 9, 0, 1], [-lps[0], -lps[1], lps[2], 1], atol=1e-3), "both files put a pixel at the same place"
        # the centre of the cavity is that of the contour it was drawn on: one of the cohort's, in the patient's mm
        middle = (nifti.affine @ [*np.argwhere(labels == 2).mean(axis=0), 0, 1])[:3] * [-1, -1, 1]
        centres = [
            np.array(entry.header.position_mm) + column * entry.header.spacing_mm[1] * np.array(entry.header.orientation[:3]) + line * entry.header.spacing_mm[0] * np.array(entry.header.orientation[3:])
            for entry in entries if entry.header.orientation and entry.header.type == row["label"]
            for column, line in [next(contour for contour in entry.contours if contour.kind == "endocardium").points.mean(axis=0)]
        ]  # fmt: skip
        assert min(float(np.linalg.norm(middle - centre)) for centre in centres) < 1.0
    datasets = [pydicom.dcmread(run / "maps" / "dataset" / row["export_dicom"]) for row, *_ in every]
    assert all(dataset.PatientID == f"synthetic_{dataset.PatientID.split('_')[1]}_{row['id']}" for (row, *_), dataset in zip(every, datasets, strict=True))
    for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "PatientID"):
        assert len({str(dataset[keyword].value) for dataset in datasets}) == len(datasets), f"{keyword}: no two images are one"
    assert not {dataset.SOPInstanceUID for dataset in datasets} & {entry.header.instance_uid for entry in entries}
    assert all("synthetic" in dataset.DerivationDescription and not dataset.StudyDate for dataset in datasets)

    # a shard that lost one of these files is no longer complete
    lost = run / "maps" / "shards" / "00000" / "images" / "000002" / "map.dcm"
    outcome = json.loads((run / "outcome" / "maps.0.json").read_text())
    assert any(item["path"].endswith("000002/map.dcm") for item in outcome["files"])
    before = lost.read_bytes()
    lost.unlink()
    assert "map.dcm" in finished.medgen("fsck", run, expect=1)
    finished.medgen("submit", "maps.yaml", "--local")
    assert lost.read_bytes() == before, "it is made again, byte for byte"


def test_contours_are_drawn_at_the_spacing_that_is_asked_for(finished: Finished) -> None:
    areas = {row["condition"]: (labels > 0).sum() * np.prod(image.spacing_mm) for row, image, _, labels in exported(finished.run, "maps")}
    for row, image, nifti, labels in exported(finished.run, "coarse"):
        assert image.spacing_mm == (2.0, 2.0) and (row["spacing_x_mm"], row["spacing_y_mm"]) == (2.0, 2.0)
        assert np.allclose(np.sqrt((nifti.affine[:3, :2] ** 2).sum(axis=0)), 2.0, atol=1e-5)
        if row["condition"] in areas:
            assert (labels > 0).sum() * 4.0 == pytest.approx(areas[row["condition"]], rel=0.05), "the heart is as large as ever"
    folder = finished.run / "oblong" / "dataset"
    for _, row in table(finished.run, "oblong").iterrows():
        affine = nibabel.load(folder / row["export_nifti"]).affine
        assert np.allclose(np.sqrt((affine[:3, :2] ** 2).sum(axis=0)), [1.8, 2.2], atol=1e-5) and (row["spacing_y_mm"], row["spacing_x_mm"]) == (1.8, 2.2)


def test_what_the_data_cannot_give_is_known_before_any_training(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec, cohort: Path) -> None:
    """The phantoms have a T1 and a T2 of every patient; without those of the test patient, no contour of that split is of a T2."""
    root = tmp_path / "cohort"
    shutil.copytree(cohort, root)
    splits = assign_splits([f"Patient ({number})" for number in range(1, 6)], {"train": 0.6, "val": 0.2, "test": 0.2}, 42)
    (tested,) = (patient for patient, split in splits.items() if split == "test")
    for folder in root.glob(f"*/{tested}/T2_Mapping_"):
        shutil.rmtree(folder)
    told = medgen("check", write_spec(spec_of(root, "before", maps=drawn(count=4), far=drawn(per_class=[2, 0], spacing_mm=9.0))), "--local", expect=2).stdout
    assert "maps" in told and "that split has no image of the class T2" in told and "spacing_mm: 9 x 9 mm is beyond" in told
    for folder in root.glob("*/*/T2_Mapping_"):
        if splits[folder.parent.name] == "train":
            shutil.rmtree(folder)
    told = medgen("check", write_spec(spec_of(root, "unseen", maps=drawn(per_class=[1, 1], condition="val"))), "--local", expect=2).stdout
    assert "1 images of the class T2 are asked for, and no training image is of it" in told
    untold = spec_of(cohort, "untold", maps=drawn(count=2, export=["dicom"]))
    untold["stages"]["train"]["config"] = {**NET, "told": ["size"]}
    assert "export: the data are T1 and T2 and the model is not told which" in medgen("check", write_spec(untold), "--local", expect=2).stdout


def test_the_room_for_a_cohort_is_known_before_its_cache_is_built(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec, cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDGEN_CACHE", str(tmp_path / "none_yet"))
    spec = spec_of(cohort, "first")
    spec["data"]["windows_ms"] = {"T2": [100, 200]}
    told = medgen("check", write_spec(spec), "--local", expect=2).stdout
    assert "outside the window [100.0, 200.0]; write another data.windows_ms" in told and "NIfTI" not in told


def test_weights_that_knew_other_things_are_told_or_refused(finished: Finished, medgen: Medgen, write_spec: WriteSpec, cohort: Path, tmp_path: Path) -> None:
    start = max((finished.run / "train" / "ckpt").glob("step-*"))
    manifest = tmp_path / "cine.csv"
    lines = ["image,patient,contours,type"]
    for folder in sorted(cohort.glob("*/*")):
        for kind, series in (("T1", "T1"), ("cine", "T2")):
            lines.append(f"{folder / f'{series}_Mapping_' / 'Mid.dcm'},{folder.name},{folder / f'{series}_map_mid_' / 'Contours.json'},{kind}")
    manifest.write_text("\n".join(lines))
    spec = spec_of(manifest, "others")
    spec["stages"]["train"]["config"] = {**NET, "start_from": str(start)}
    told = " ".join(medgen("check", write_spec(spec), "--local").stdout.split())
    assert f"start_from: what {start.name} knows as T1, T2 becomes T1, cine, in that order" in told


def test_a_spacing_that_was_never_trained_on_is_refused(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec, cohort: Path) -> None:
    done = medgen("submit", write_spec(spec_of(cohort, "fine", maps=drawn(count=2, spacing_mm=0.4))), "--local", expect=1)
    log = next((only_run(tmp_path, "fine") / "logs" / "maps").rglob("*.log")).read_text()
    assert "spacing_mm: 0.4 x 0.4 mm is beyond" in log + done.stdout + done.stderr and "Traceback" not in log


@pytest.mark.parametrize(
    ("stage", "wanted"),
    [
        (drawn(count=2, format="png"), "stages.maps.format: png holds neither the regions of a mask nor millimetres"),
        (drawn(count=2, export=["dicom", "dicom"]), "export: name each once"),
        (drawn(count=2, spacing_mm=-1), "mm from one pixel to the next"),
    ],
)
def test_what_cannot_be_made_is_refused_at_submit(medgen: Medgen, write_spec: WriteSpec, cohort: Path, stage: dict[str, Any], wanted: str) -> None:
    assert wanted in medgen("submit", write_spec(spec_of(cohort, "refused", maps=stage)), "--dry-run", expect=2).stderr


def test_images_of_another_spacing_are_not_compared_pixel_by_pixel(medgen: Medgen, write_spec: WriteSpec, cohort: Path) -> None:
    spec = spec_of(cohort, "apart", maps=drawn(count=2, spacing_mm=2.0), evaluate={"kind": "evaluate", "of": "maps", "metrics": ["swd"]})
    assert "stages.evaluate.of: the images of maps have a spacing of their own" in medgen("submit", write_spec(spec), "--dry-run", expect=2).stderr


def test_another_family_takes_no_regions(medgen: Medgen, write_spec: WriteSpec, cohort: Path) -> None:
    spec = spec_of(cohort, "other")
    spec["stages"]["train"]["config"] = {"model": "diffusion", "mode": "seg", "epochs": 1, "warmup_epochs": 0}
    assert "takes a mask of one thing" in medgen("submit", write_spec(spec), "--dry-run", expect=2).stderr


@pytest.mark.parametrize(("kind", "highest", "step"), [("T1", 2500.0, 1.0), ("T2", 200.0, 0.1), ("T1", 6000.0, 6000 / 4095), ("cine", 1.0, 1 / 4095)])
def test_stored_values_are_those_of_scanners_where_they_fit(tmp_path: Path, kind: MapType, highest: float, step: float) -> None:
    assert scale_of(kind, highest) == pytest.approx(step)
    values = np.random.default_rng(1).uniform(0, highest, (7, 5))
    (tmp_path / "map.dcm").write_bytes(dicom_bytes(Synthetic(kind, values, highest, np.diag([1.5, 1.2, 8.0, 1.0]), "run/stage/1", "synthetic_1")))
    (header,) = read_headers(tmp_path / "map.dcm")
    image = read_map(header)
    assert image.type == kind and image.spacing_mm == (1.5, 1.2) and image.slice_thickness_mm == 8
    shown = image.pixels * (step if kind == "cine" else 1.0)  # of cine frames nothing but the order of values counts
    assert np.abs(shown - values).max() <= step / 2 + 1e-3


def test_the_same_image_has_the_same_bytes_and_another_has_other_names() -> None:
    image = Synthetic("T1", np.full((4, 4), 900.0), 2500.0, np.eye(4), "a/maps/1", "synthetic_1")
    assert dicom_bytes(image) == dicom_bytes(image)
    assert len({uid_of(identity, what) for identity in ("a/maps/1", "b/maps/1") for what in ("image", "study")}) == 4
    assert all(len(uid_of("a", str(number))) <= 64 for number in range(50))


def test_an_affine_follows_its_grid() -> None:
    affine = np.array([[0.0, -1.5, 0.2, 7], [1.2, 0.1, 0, -3], [0.3, 0, 8, 2], [0, 0, 0, 1]])
    own, wanted = Grid((32, 32), (1.2, 1.5), (4.8, -3.0)), Grid((16, 16), (2.4, 1.8), (1.0, 6.5))
    moved = moved_affine(affine, own, wanted)
    for row, column in ((0, 0), (3, 11)):
        place = [(wanted.origin_mm[axis] + index * wanted.spacing_mm[axis] - own.origin_mm[axis]) / own.spacing_mm[axis] for axis, index in enumerate((row, column))]
        assert np.allclose(moved @ [row, column, 0, 1], affine @ [*place, 0, 1])


def test_images_of_a_class_are_spread_over_its_own_conditions() -> None:
    classes = Classes(("T1", "T2", "cine"), (3, 3, 8))
    assert [classes.of(index) for index in range(8)] == [0, 0, 0, 2, 2, 2, 2, 2]
    assert [classes.place(index) for index in (0, 2, 3, 7)] == [(0, 3), (2, 3), (0, 5), (4, 5)]


def test_data_shows_types_levels_values_and_what_is_left_out(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec, cohort: Path) -> None:
    spec = write_spec({**spec_of(cohort, "shown"), "data": {**spec_of(cohort, "shown")["data"], "size": 64}})
    told = medgen("data", spec, "--out", tmp_path / "out").stdout
    facts = json.loads(medgen("data", spec, "--out", tmp_path / "out", "--json").stdout)["maps"]
    levels = {"apex": 5, "mid": 5, "base": 5}
    assert facts["images"] == {"T1": levels, "T2": levels} and facts["windows"] == {"T1": {"low": [0, 0], "high": [2500, 2500]}, "T2": {"low": [0, 0], "high": [200, 200]}}
    truth = pd.read_csv(cohort / "truth.csv")
    for kind in ("T1", "T2"):
        drawn_ms = truth[(truth["type"] == kind) & (truth["tissue"] == "myocardium")]["mean_ms"]
        found = facts["means"][kind]["myocardium"]
        assert found["images"] == 15 and found["mean"] == pytest.approx(drawn_ms.mean(), rel=0.1), "pixels at the edges hold some of the blood beside"
        assert facts["means"][kind]["left_ventricle - myocardium"]["mean"] == pytest.approx(facts["means"][kind]["left_ventricle"]["mean"] - found["mean"], abs=0.01)
    assert "T2" in told and " ms" in told and "truth.csv: in no folder Patient (N)" in told
    assert list(pd.read_csv(tmp_path / "out" / "left_out.csv")["reason"]) == ["no part of the layout"]
    assert (tmp_path / "out" / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")
