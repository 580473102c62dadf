"""Damage and haste: what was finished and then altered is noticed, told and made again; nothing half takes its place."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_NET, tiny_spec
from test_pipeline import TRAIN_ONLY, Medgen, WriteSpec, _equal, _last_tensors, only_run, tree


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


@pytest.fixture
def masks_run(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec) -> tuple[Path, Path]:
    """A finished run of a mask model and its masks: (spec, run folder)."""
    stages = tiny_spec()["stages"]
    spec = write_spec({**tiny_spec(), "stages": {name: stages[name] for name in ("train_seg", "masks")}})
    medgen("submit", spec, "--local")
    return spec, only_run(tmp_path)


@pytest.mark.fault("F35")
def test_a_damaged_final_checkpoint_is_made_again_not_replaced_by_an_older_one(masks_run: tuple[Path, Path], medgen: Medgen, record_property: Callable[[str, object], None]) -> None:
    spec, run = masks_run
    expected = tree(run / "masks" / "dataset")
    newest = max((run / "train_seg" / "ckpt").glob("step-*"))
    flip_last_byte(newest / "modules.ema.pt")
    for path in (run / "outcome").glob("*masks*"):
        path.unlink()
    shutil.rmtree(run / "masks")
    refused = medgen("generate", run, "--stage", "masks", expect=1)
    assert "ended with is damaged; submit the spec again" in refused.stderr
    record_property("fired", refused.stderr.strip())
    told = medgen("submit", spec, "--local").stdout
    assert f"train_seg: skipping checkpoint {newest}: modules.ema.pt does not match its sha256" in " ".join(told.split())
    assert tree(run / "masks" / "dataset") == expected
    assert (newest.with_name(f"bad-{newest.name}")).is_dir(), "the damaged one is kept to look at"


def test_a_training_whose_checkpoints_are_gone_starts_over_and_says_so(masks_run: tuple[Path, Path], medgen: Medgen) -> None:
    spec, run = masks_run
    shutil.rmtree(run / "train_seg" / "ckpt")
    told = medgen("submit", spec, "--local").stdout
    assert "train_seg shard 0: train_seg/ckpt/" in told and "is missing: it is made again" in told
    assert "train_seg: it had come to step" in told and "no checkpoint is left" in told and "it starts from step 0" in told


@pytest.mark.fault("F37")
def test_altered_images_are_noticed_at_the_next_submit(masks_run: tuple[Path, Path], medgen: Medgen, record_property: Callable[[str, object], None]) -> None:
    spec, run = masks_run
    expected = tree(run / "masks" / "dataset")
    flip_last_byte(run / "masks" / "dataset" / "images" / "000003" / "seg.nii.gz")  # the same size as before
    shutil.rmtree(run / "masks" / "dataset" / "images" / "000005")
    assert medgen("watch", run, "--once", expect=1), "a missing file is seen at once, a changed one when it is read"
    record_property("fired", "one bit of 000003, all of 000005")
    told = medgen("submit", spec, "--local").stdout
    assert "collect_masks shard 0: masks/dataset/images/000003/seg.nii.gz does not match its sha256: it is made again" in told
    assert tree(run / "masks" / "dataset") == expected


@pytest.mark.slow
def test_what_was_altered_after_it_was_collected_is_not_scored(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec) -> None:
    """And the next submit makes it again, also on Slurm, where it compares sizes only: the outcome is gone."""
    stages = tiny_spec()["stages"]
    scored = {"evaluate": {"kind": "evaluate", "of": "masks", "metrics": ["swd"]}}
    spec = write_spec({**tiny_spec(), "stages": {"train_seg": stages["train_seg"], "masks": stages["masks"], **scored}})
    medgen("submit", spec, "--local")
    run = only_run(tmp_path)
    dataset, metrics = run / "masks" / "dataset", run / "evaluate" / "metrics.json"
    expected = tree(dataset), metrics.read_bytes()
    for path in (dataset / "images" / "000003" / "seg.nii.gz", dataset / "index.csv"):
        flip_last_byte(path)
        refused = medgen("evaluate", run, "--again", expect=1).stderr
        assert str(path) in refused
        assert "since it was collected (sha256); submit the spec again, it is collected anew" in refused
        assert not (run / "outcome" / "collect_masks.0.json").exists()
        medgen("submit", spec, "--local")
        assert (tree(dataset), metrics.read_bytes()) == expected


def test_a_report_made_too_early_is_made_again(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec) -> None:
    stages = tiny_spec()["stages"]
    spec = write_spec({**tiny_spec(), "stages": {name: stages[name] for name in ("train_seg", "report")}})
    medgen("submit", spec, "--local")
    run = only_run(tmp_path)
    (run / "outcome" / "train_seg.0.json").unlink()
    early = medgen("report", run, "--again", expect=3)
    assert "shows the run as it is now" in early.stderr
    medgen("submit", spec, "--local")
    assert json.loads((run / "outcome" / "report.0.json").read_text())["status"] == "done"


def test_changed_data_are_never_scored_against(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec) -> None:
    medgen("phantoms", tmp_path / "cohort", "--patients", 6)
    data = {"root": str(tmp_path / "cohort"), "images": {"bravo": "bravo.nii.gz"}, "mask": "seg.nii.gz", "size": 16, "positive_only": True}
    stages = {
        "train": {"kind": "train", "config": {**TINY_NET, "strategy": "rflow", "mode": "bravo"}, "resources": {"cpus": 1}},
        "images": {"kind": "generate", "from": "train", "condition": "test", "count": 4, "sampling": {"steps": 1}},
        "evaluate": {"kind": "evaluate", "of": "images", "metrics": ["mae"]},
    }
    medgen("submit", write_spec({**tiny_spec(name="moved", data=data), "stages": stages}), "--local")
    trained_on = next((tmp_path / "cohort" / "train").iterdir())
    trained_on.rename(tmp_path / "cohort" / "test" / trained_on.name)
    refused = medgen("evaluate", only_run(tmp_path), "--again", expect=2)
    assert "the data have changed since images was made from them" in refused.stderr
    assert "two cohorts must not mix" in medgen("phantoms", tmp_path / "cohort", expect=2).stderr


def test_a_damaged_slice_cache_is_built_again(tmp_path: Path) -> None:
    from medgen.data.store import open_store
    from medgen.spec_data import DataSpec

    data, said = DataSpec(format="phantom", patients=3, size=16, every=4), list[str]()
    store = open_store(data, 1, tmp_path, said.append)
    expected = store.images("bravo", np.arange(len(store.rows)))
    for damage in (lambda: flip_last_byte(store.folder / "bravo.npy"), lambda: (store.folder / "rows.json").write_text("[]"),
                   lambda: (store.folder / "seal.json").unlink(), lambda: next(tmp_path.glob("phantoms-*/*/*/seg.nii.gz")).unlink(),
                   lambda: (tmp_path / "hashes.json").write_text("[1]")):
        said.clear()
        damage()
        again = open_store(data, 1, tmp_path, said.append)
        assert np.array_equal(again.images("bravo", np.arange(len(again.rows))), expected) and again.fingerprint == store.fingerprint
        assert said, "rebuilding is told"


def test_garbage_in_a_run_never_breaks_watch_or_ls(masks_run: tuple[Path, Path], tmp_path: Path, medgen: Medgen) -> None:
    _, run = masks_run
    shutil.copytree(run, tmp_path / "whole")
    for raw in (b"null", b'{"event": "task_started", "time": 3, "version": 1}', b"\xff["):
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "whole", run)
        with open(run / "events.jsonl", "ab") as handle:
            handle.write(raw)
        for path in ("outcome/masks.0.json", "hb/masks.0.json"):
            (run / path).write_bytes(raw)
        assert "it was done; the record of that is missing" in medgen("watch", run, "--once", expect=1).stdout
        medgen("ls")
        (run / "masks" / "shards" / "00000" / "manifest.json").write_bytes(raw)
        assert "shard 0: manifest.json is not readable" in medgen("collect", run, "--stage", "collect_masks", "--again", expect=1).stderr
        (run / "plan.json").write_bytes(raw)
        medgen("watch", run, "--once", expect=2)
        medgen("ls")


@pytest.mark.slow
def test_three_processes_stopped_and_resumed_give_the_same_bits(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec, environment: dict[str, str]) -> None:
    """With three ranks the order of a sum matters: it must not depend on how often the processes were started."""
    config = {**TRAIN_ONLY, "batch_size": 6}
    stage = {"kind": "train", "config": config, "resources": {"processes": 3}}
    spec = write_spec({**tiny_spec(name="three"), "stages": {"train": stage}})
    medgen("submit", spec, "--local")
    run = only_run(tmp_path)
    steps, expected = _last_tensors(run)
    shutil.rmtree(run)
    command = [sys.executable, "-m", "medgen", "submit", str(spec), "--local"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 180
        while not list((run / "train" / "ckpt").glob("step-*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 3
    assert _last_tensors(run)[0] < steps, "stopped too late"
    medgen("submit", spec, "--local")
    reached, found = _last_tensors(run)
    assert reached == steps and _equal(found, expected)
