"""Images from captions and masks as a user makes them: what is told, what is left out, what stands in the dataset afterwards."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import REPOSITORY, tiny_spec
from PIL import Image

Medgen = Callable[..., Any]
WriteSpec = Callable[[dict[str, Any]], Path]
SIZE = 16
NET: dict[str, Any] = {
    "model": "flow", "epochs": 2, "batch_size": 4, "warmup_epochs": 0.5, "lr": 1.0e-3, "network": {"depth": 1, "width": 16, "heads": 2, "key_value_heads": 1, "patch": 4},
    "text": {"vocabulary": 300, "width": 8, "depth": 1, "heads": 2, "max_tokens": 24}, "ema": {"beta": 0.9, "update_after_step": 1, "update_every": 1},
    "loop": {"log_steps": 1, "preview_images": 2},
}  # fmt: skip
SAMPLING = {"sampler": "euler", "steps": 2}
CAPTIONS = {"0": "a healthy eye", "1": "an eye with a bright spot"}


def write_images(folder: Path, count: int, per_split: tuple[int, int] = (12, 4)) -> Path:
    """Discs, half of them with a bright spot; every third spot has been drawn by somebody, and so have two absences of one."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True)
    lines: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for number in range(count):
        rows, columns = np.mgrid[:SIZE, :SIZE] - SIZE / 2
        image, spot = 90.0 * (np.hypot(rows, columns) < 7), np.hypot(rows - 2, columns + number % 5 - 2) < 2
        sick, known = number % 2, number % 3 == 0
        Image.fromarray((image + 120 * spot * sick + rng.uniform(0, 20, image.shape)).astype(np.uint8)).save(folder / f"{number}.png")
        Image.fromarray((255 * (spot & bool(sick))).astype(np.uint8)).save(folder / f"{number}_spot.png")
        lines["train" if number < per_split[0] else "test"].append({
            "image_path": f"{number}.png", "caption": CAPTIONS[str(sick)], "label": str(sick), "patient": f"p{number}", "mask_path": {"spot": f"{number}_spot.png"} if known else None,
        })  # fmt: skip
    for split, listed in lines.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in listed))
    return folder


def spec_of(images: Path, name: str, config: dict[str, Any] | None = None, **stages: Any) -> dict[str, Any]:
    data = {"format": "jsonl", "root": str(images), "size": SIZE, "regions": ["spot"]}
    return {**tiny_spec(name=name), "data": data, "stages": {"train": {"kind": "train", "config": config or NET, "resources": {"cpus": 1}}, **stages}}


def drawn(**more: Any) -> dict[str, Any]:
    return {"kind": "generate", "from": "train", "count": 4, "chunk": 2, "sampling": SAMPLING, "resources": {"cpus": 1}, **more}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "eyes", 16)


@dataclass(frozen=True)
class Finished:
    """A job that was run once for all tests here."""

    run: Path
    report: str

    def table(self, stage: str) -> pd.DataFrame:
        return pd.read_csv(self.run / stage / "dataset" / "index.csv", dtype=str, keep_default_na=False)

    def bytes_of(self, stage: str) -> list[bytes]:
        return [(self.run / stage / "dataset" / path).read_bytes() for path in self.table(stage)["image"]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path, images: Path) -> Finished:
    folder = tmp_path_factory.mktemp("job")
    spec = spec_of(
        images, "told",
        as_given=drawn(condition="test"),
        without_mask=drawn(condition="test", without=["mask"]),
        without_both=drawn(condition="test", without=["caption", "mask"]),
        other_words=drawn(condition="test", captions=["an eye with a bright spot"], sampling={**SAMPLING, "guidance": 3.0, "mask_guidance": 2.0, "longest": 1.5}),
        words_alone=drawn(captions=["a healthy eye", "an eye with a bright spot"]),
        report={"kind": "report"},
    )  # fmt: skip
    (folder / "told.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    environment = {**os.environ, "MEDGEN_RUNS": str(folder / "runs"), "MEDGEN_CACHE": str(cache), "OMP_NUM_THREADS": "1", "COLUMNS": "140"}
    done = subprocess.run([sys.executable, "-m", "medgen", "submit", "told.yaml", "--local"], cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (folder / "runs").glob("told-*")
    return Finished(run, (run / "report" / "index.html").read_text())


def test_each_image_says_what_it_was_made_from(finished: Finished) -> None:
    given = finished.table("as_given")
    assert list(given["caption"]) == [CAPTIONS[label] for label in given["label"]] and set(given["label"]) == {"0", "1"}
    assert all(given["seg"]) and given["condition"].nunique() == 2, "of images 12 and 15 of the data there is a mask, and of the other two nothing is known"
    assert finished.table("without_mask")["condition"].nunique() == 4 and "seg" not in finished.table("without_mask")
    nothing = finished.table("without_both")
    assert set(nothing["caption"]) == {""} and set(nothing["label"]) == {"0", "1"} and "seg" not in nothing
    assert set(finished.table("other_words")["caption"]) == {CAPTIONS["1"]} and "label" not in finished.table("other_words"), "other words may say another class"
    alone = finished.table("words_alone")
    assert list(alone["caption"]) == [CAPTIONS["0"], CAPTIONS["1"]] * 2 and set(alone["condition_kind"]) == {"none"} and set(alone["spacing_x_mm"]) == {"1.0"}


def test_the_dataset_has_every_image_and_the_report_its_pictures(finished: Finished) -> None:
    for stage in ("as_given", "without_mask", "without_both", "other_words", "words_alone"):
        assert len(set(finished.bytes_of(stage))) == 4
    assert "4 synthetic images" in finished.report and "Next-DiT" not in finished.report


@pytest.mark.parametrize(("stage", "config", "wanted"), [
    (drawn(), {}, "the model of train is told captions; add condition: test, for those of that split and their masks, or captions: [...]"),
    (drawn(captions=[" "]), {}, "captions: number 1 is empty"),
    (drawn(captions=["a"], condition="test", without=["caption"]), {}, "captions and without: [caption] contradict each other"),
    (drawn(captions=["a"], without=["mask"]), {}, "without has no effect where there is no condition"),
    (drawn(condition="test", without=["mask"]), {"told": ["caption"]}, "the model of train is told no mask; remove it"),
    (drawn(condition="test", captions=["a"]), {"told": ["mask"], "text": None}, "the model of train reads no captions; remove it"),
    (drawn(condition="test", sampling={"mask_guidance": 2}), {"mask_dropout": 0.0}, "mask_guidance needs a training with mask_dropout"),
    (drawn(condition="test", sampling={"longest": 1}), {}, "longest has no effect without guidance"),
    (drawn(condition="test"), {"text": {"width": 10, "heads": 4}}, "heads: 4 do not divide the width of 10"),
    (drawn(condition="test"), {"network": "tiny/5"}, "network.patch: 5 does not divide data.size: 16"),
    (drawn(condition="test"), {"network": "huge/8"}, "'huge/8' is no size/patch: sizes are tiny, small, base, 2B"),
    (drawn(condition="test"), {"told": ["caption"], "region_weight": 2}, "region_weight has no effect: the mask is not told"),
])  # fmt: skip
def test_what_cannot_be_is_refused_at_submit(medgen: Medgen, write_spec: WriteSpec, images: Path, stage: dict[str, Any], config: dict[str, Any], wanted: str) -> None:
    told = medgen("submit", write_spec(spec_of(images, "refused", {**NET, **config}, maps=stage)), "--dry-run", expect=2).stderr
    assert wanted in told and "Traceback" not in told


def test_captions_that_name_sides_and_mirrored_images_contradict_each_other(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec) -> None:
    folder = write_images(tmp_path / "eyes", 16)
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    lines[3]["caption"] = "A bright spot in the Left eye"
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = " ".join(medgen("check", write_spec(spec_of(folder, "sides", {**NET, "flip": True})), "--local", expect=2).stdout.split())
    assert "flip: captions name sides (left), which are wrong of mirrored images" in told


def test_a_caption_that_is_too_long_says_which(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec) -> None:
    folder = write_images(tmp_path / "eyes", 16)
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    lines[3]["caption"] = " ".join(f"finding{number ** 3}" for number in range(40))
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = " ".join(medgen("check", write_spec(spec_of(folder, "long")), "--local", expect=2).stdout.split())
    assert "more than the 24 that are read; shorten it, or train with more max_tokens" in told


def test_the_fundus_job_on_real_photographs(idrid: Path, tmp_path: Path, environment: dict[str, str], medgen: Medgen) -> None:
    """The snippet of docs/text_and_masks.md makes its data; what the data cannot give would be told by the dry run."""
    page = (REPOSITORY / "docs" / "text_and_masks.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[-1]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "IDRID": str(idrid)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = {split: len((tmp_path / "fundus" / f"{split}.jsonl").read_text().splitlines()) for split in ("train", "val", "test")}
    assert counts == {"train": 402, "val": 57, "test": 129}
    environment["DATA"] = str(tmp_path)
    told = medgen("submit", REPOSITORY / "jobs" / "fundus_text_mask.yaml", "--dry-run", "--local").stdout
    assert "fundus_text_mask" in told
