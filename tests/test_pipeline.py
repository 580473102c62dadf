"""The whole job through the real command line: run, run again, interrupt, shard, corrupt."""

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
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import REPOSITORY, TINY_NET, tiny_spec
from launch_stub import create_run

Medgen = Callable[..., subprocess.CompletedProcess[str]]
WriteSpec = Callable[[dict[str, Any]], Path]


def only_run(tmp_path: Path) -> Path:
    (found,) = [path.parent for path in (tmp_path / "runs").glob("*/plan.json")]
    return found


def outcome(run: Path, stage: str, shard: int = 0) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "outcome" / f"{stage}.{shard}.json").read_text())
    return record


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _results(run: Path) -> dict[Path, int]:
    """Every file that a stage wrote, with the time of its last change."""
    folders = ["outcome", "logs", "hb", "train_seg", "train_bravo", "masks", "images", "evaluate", "report"]
    return {path: path.stat().st_mtime_ns for folder in folders for path in (run / folder).rglob("*") if path.is_file()}


def test_one_command_gives_models_images_scores_and_a_report_and_twice_does_nothing(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec) -> None:
    spec = write_spec(tiny_spec())
    medgen("submit", spec, "--local")
    run = only_run(tmp_path)
    index = pd.read_csv(run / "images" / "dataset" / "index.csv")
    assert list(index["index"]) == list(range(14)) and set(index["condition_kind"]) == {"synthetic"}
    assert all((run / "images" / "dataset" / path).is_file() for column in ("bravo", "seg") for path in index[column])
    masks = pd.read_csv(run / "masks" / "dataset" / "index.csv")
    assert list(index["seg_sha256"]) == list(masks["seg_sha256"]), "image i carries mask i"
    assert json.loads((run / "evaluate" / "metrics.json").read_text())["scores"]
    page = (run / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64") >= 2 and "http://" not in page.replace("http://www.w3.org", "")

    state = json.loads(medgen("watch", "tiny", "--once", "--json").stdout)
    assert state["verdict"] == "done"
    assert "tiny" in medgen("ls").stdout
    before = _results(run)
    medgen("submit", spec, "--local")
    assert _results(run) == before, "nothing is done twice"

    # the generated dataset can be read again as data
    again = {"version": 1, "name": "again", "stages": {"train": {"kind": "train", "config": {**TINY_NET, "mode": "bravo"}}},
             "data": {"format": "csv", "root": str(run / "images" / "dataset" / "index.csv"), "images": {"bravo": "bravo"}, "mask": "seg", "size": 16, "content": 0.0, "window": {"fixed": [0, 1]}}}
    checked = json.loads(medgen("check", write_spec(again), "--json").stdout)
    assert sum(split["slices"] for split in checked["data"]["splits"].values()) == 14


SHARDED = {"train_seg", "masks", "train_bravo", "images"}


def test_any_number_of_shards_gives_the_same_bytes(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec, environment: dict[str, str]) -> None:
    """1 and 3 shards, one of them killed and made again: the dataset is the same, byte for byte."""
    full = tiny_spec()
    spec = write_spec({**full, "stages": {name: stage for name, stage in full["stages"].items() if name in SHARDED}})
    medgen("submit", spec, "--local")
    run = only_run(tmp_path)
    expected = {stage: tree(run / stage / "dataset") for stage in ("masks", "images")}
    for stage in ("masks", "images"):
        shutil.rmtree(run / stage)
        for path in [*(run / "outcome").glob(f"*{stage}.*"), *(run / "hb").glob(f"{stage}.*")]:
            path.unlink()
    override = ["-ostages.masks.shards=3", "-ostages.images.shards=3"]
    _submit_and_kill_one_shard(tmp_path, spec, override, environment, run)
    medgen("submit", spec, *override, "--local")
    assert only_run(tmp_path) == run, "another number of shards is the same run"
    assert len(list((run / "images" / "shards").iterdir())) == 3
    for stage, files in expected.items():
        assert tree(run / stage / "dataset") == files


def _submit_and_kill_one_shard(tmp_path: Path, spec: Path, override: list[str], environment: dict[str, str], run: Path) -> None:
    command = [sys.executable, "-m", "medgen", "submit", str(spec), *override, "--local"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as submit:
        deadline = time.monotonic() + 120
        while not (run / "hb" / "masks.2.json").exists():
            assert submit.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(json.loads((run / "hb" / "masks.2.json").read_text())["pid"], signal.SIGKILL)
        time.sleep(0.2)
        submit.send_signal(signal.SIGINT)
        submit.wait(timeout=60)


@pytest.mark.fault("F37")
def test_collect_names_and_repairs_what_is_missing_or_corrupt(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec, record_property: Callable[[str, object], None]) -> None:
    full = tiny_spec()
    full["stages"]["masks"]["shards"] = 3
    spec = write_spec({**full, "stages": {name: full["stages"][name] for name in ("train_seg", "masks")}})
    medgen("submit", spec, "--local")
    run = only_run(tmp_path)
    expected = tree(run / "masks" / "dataset")
    good = {path: path.stat().st_ino for path in (run / "masks" / "shards" / "00000").rglob("*") if path.is_file()}

    shutil.rmtree(run / "masks" / "dataset")
    (run / "outcome" / "collect_masks.0.json").unlink()
    shutil.rmtree(run / "masks" / "shards" / "00001")
    victim = next((run / "masks" / "shards" / "00002").rglob("seg.nii.gz"))
    content = bytearray(victim.read_bytes())
    content[-9] ^= 1
    victim.write_bytes(content)
    failed = medgen("collect", run, "--stage", "collect_masks", expect=1)
    record_property("fired", failed.stderr.strip())
    assert "2 of 3 shards of masks are missing or corrupt" in failed.stderr
    assert "shard 1: the shard is missing" in failed.stderr and "shard 2: images/" in failed.stderr
    assert not (run / "masks" / "dataset").exists(), "nothing is published half"

    medgen("submit", spec, "--local")
    assert tree(run / "masks" / "dataset") == expected
    assert {path: path.stat().st_ino for path in good} == good, "a good shard is never touched"
    assert len(list((run / "masks" / "quarantine").iterdir())) == 1


TRAIN_ONLY = {**TINY_NET, "strategy": "ddpm", "mode": "bravo", "epochs": 2, "batch_size": 2,
              "loop": {"log_steps": 1, "checkpoint_steps": 1, "preview_images": 0, "validate_epochs": 1.0}}


def _prepare_training(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec) -> Path:
    spec = write_spec({**tiny_spec(name="train"), "stages": {"train": {"kind": "train", "config": TRAIN_ONLY, "resources": {"cpus": 1}}}})
    return create_run(spec, (), tmp_path / "runs")[0].root


def _last_tensors(run: Path) -> tuple[int, dict[str, Any]]:
    folder = max((run / "train" / "ckpt").glob("step-*"))
    return int(folder.name[5:]), {path.name: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(_equal(*pair) for pair in zip(left, right, strict=True))
    return bool(left == right)


def test_killed_twice_in_one_epoch_gives_the_same_bits(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec, environment: dict[str, str]) -> None:
    """kill -9 at any step, TERM at another, run again: weights, optimizer and EMA equal an uninterrupted run's."""
    run = _prepare_training(tmp_path, medgen, write_spec)
    whole = tmp_path / "whole" / run.name
    shutil.copytree(run, whole)
    medgen("train", whole)
    steps, expected = _last_tensors(whole)
    per_epoch = steps // 2
    assert per_epoch >= 6, "both kills must fall into the first epoch"

    command = [sys.executable, "-m", "medgen", "train", str(run)]
    for kill_after, number in ((2, signal.SIGKILL), (4, signal.SIGTERM)):
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 120
            while not any(int(path.name[5:]) >= kill_after for path in (run / "train" / "ckpt").glob("step-*")):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.005)
            process.send_signal(number)
            _, told = process.communicate(timeout=60)
        reached, _ = _last_tensors(run)
        assert kill_after <= reached < per_epoch, "killed too late to be in the first epoch"
        if number == signal.SIGTERM:
            assert process.returncode == 3 and "stopped by SIGTERM after step" in told
            assert outcome(run, "train")["status"] == "interrupted"
    done = medgen("train", run)
    assert "resuming from" in done.stdout
    reached, found = _last_tensors(run)
    assert reached == steps and _equal(found, expected)
    logged = [json.loads(line)["step"] for line in (run / "train" / "log.jsonl").read_text().splitlines() if "val_loss" not in line]
    assert logged == list(range(1, steps + 1)), "every step is logged once"


@pytest.mark.fault("F35")
def test_a_bad_checkpoint_is_passed_over_and_one_of_other_data_refused(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec, record_property: Callable[[str, object], None]) -> None:
    run = _prepare_training(tmp_path, medgen, write_spec)
    medgen("train", run)
    (run / "outcome" / "train.0.json").unlink()
    newest = max((run / "train" / "ckpt").glob("step-*"))
    (newest / "modules.ema.pt").write_bytes(b"broken")
    done = medgen("train", run)
    assert f"skipping checkpoint {newest}: modules.ema.pt has 6 bytes" in done.stdout and "resuming from" in done.stdout

    record_property("fired", "modules.ema.pt has 6 bytes")
    (run / "outcome" / "train.0.json").unlink()
    plan = json.loads((run / "plan.json").read_text())
    (run / "plan.json").write_text(json.dumps({**plan, "data": {**plan["data"], "patients": 5}}))
    refused = medgen("train", run, expect=2)
    assert "this checkpoint is of other data" in refused.stderr
    assert outcome(run, "train")["status"] == "failed"
    plan["stages"][0]["settings"]["config"]["channels"] = [8, 24]
    (run / "plan.json").write_text(json.dumps(plan))
    assert "another model configuration; use the run it belongs to, or another name for this one (differs in: channels)" in medgen("train", run, expect=2).stderr


@pytest.mark.slow
@pytest.mark.fault("F41")
def test_divergence_is_told(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec, record_property: Callable[[str, object], None]) -> None:
    config = {**TRAIN_ONLY, "lr": 1e8, "warmup_epochs": 0, "clip_norm": 1e8}
    spec = write_spec({**tiny_spec(name="wild"), "stages": {"train": {"kind": "train", "config": config}}})
    failed = medgen("submit", spec, "--local", expect=1)
    run = only_run(tmp_path)
    cause = outcome(run, "train")["cause"]
    record_property("fired", cause)
    assert "the loss became nan" in cause or "diverged" in cause or "holds NaN" in cause, cause
    assert cause.split(";")[0][:30] in failed.stdout + failed.stderr


def test_two_processes_train_through_the_local_backend(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec) -> None:
    stage = {"kind": "train", "config": {**TRAIN_ONLY, "loop": {"log_steps": 1, "validate_epochs": 1.0}}, "resources": {"processes": 2}}
    medgen("submit", write_spec({**tiny_spec(name="ranks"), "stages": {"train": stage}}), "--local")
    run = only_run(tmp_path)
    assert outcome(run, "train")["devices"] == 2
    assert len(list((run / "logs" / "train" / "s0").glob("r*.a0.log"))) == 2
    assert list((run / "train" / "tb").glob("events*"))


def test_real_masks_make_pairs_and_other_formats_work(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec) -> None:
    full = tiny_spec(name="dual")
    stages = {
        "train": {"kind": "train", "config": {**TINY_NET, "strategy": "rflow", "mode": "dual"}, "resources": {"cpus": 1}},
        "png": {"kind": "generate", "from": "train", "condition": "test", "count": 4, "chunk": 2, "format": "png", "checkpoint": "best-val", "sampling": {"steps": 1}},
        "evaluate": {"kind": "evaluate", "of": "png"},
        "report": {"kind": "report"},
    }
    medgen("submit", write_spec({**full, "stages": stages}), "--local")
    run = only_run(tmp_path)
    index = pd.read_csv(run / "png" / "dataset" / "index.csv")
    assert {"t1_pre", "t1_gd", "seg"} <= set(index.columns) and set(index["condition_kind"]) == {"real"}
    metrics = json.loads((run / "evaluate" / "metrics.json").read_text())
    measured = {(score["metric"], score["channel"]) for score in metrics["scores"]}
    assert {("mae", "t1_pre"), ("mae", "t1_gd"), ("psnr", "t1_gd"), ("ssim", "t1_pre")} <= measured


@pytest.mark.parametrize(("change", "message"), [
    ({"data": {"format": "nifti", "root": "/nowhere/at/all", "images": {"bravo": "b.nii.gz"}, "mask": "s.nii.gz", "size": 16}}, "/nowhere/at/all"),
    ({"version": 3}, "version"),
])
def test_wrong_input_exits_with_2_and_writes_no_run(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec, change: dict[str, Any], message: str) -> None:
    done = medgen("submit", write_spec(tiny_spec(**change)), "--local", expect=2)
    assert message in done.stderr
    assert not list((tmp_path / "runs").glob("*/plan.json"))


@pytest.mark.fault("F40")
def test_a_runs_folder_that_cannot_be_written_is_told(medgen: Medgen, write_spec: WriteSpec, environment: dict[str, str], record_property: Callable[[str, object], None]) -> None:
    environment["MEDGEN_RUNS"] = "/proc/medgen"
    done = medgen("submit", write_spec(tiny_spec()), "--local", expect=2)
    record_property("fired", done.stderr.strip())
    assert "/proc/medgen" in done.stderr and "MEDGEN_RUNS" in done.stderr


@pytest.mark.slow
@pytest.mark.fault("F33")
def test_a_full_disk_stops_with_its_name_and_the_run_goes_on_when_there_is_room(tmp_path: Path, write_spec: WriteSpec, environment: dict[str, str], private_mounts: list[str], record_property: Callable[[str, object], None]) -> None:
    spec, disk = write_spec(tiny_spec()), tmp_path / "disk"
    disk.mkdir()
    # fill the disk while the first training runs, then make room and submit again
    script = ('mount -t tmpfs -o size=40m none "$1"; export MEDGEN_RUNS="$1/runs"; mkdir "$1/runs"\n'
              'dd if=/dev/zero of="$1/filler" bs=1M count=23 2>/dev/null; "$0" -m medgen submit "$2" --local; echo "first $?"\n'
              'rm "$1/filler"; "$0" -m medgen submit "$2" --local; echo "second $?"')
    done = subprocess.run([*private_mounts, "bash", "-c", script, sys.executable, str(disk), str(spec)], env=environment, cwd=tmp_path, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert "first 1" in lines and "second 0" in lines, done.stdout + done.stderr
    record_property("fired", lines[0])
    assert "MiB are free" in done.stdout + done.stderr or "disk is full" in done.stdout + done.stderr


@pytest.mark.fault("F40")
def test_a_run_folder_that_became_read_only_is_told(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec, environment: dict[str, str], private_mounts: list[str], record_property: Callable[[str, object], None]) -> None:
    run = _prepare_training(tmp_path, medgen, write_spec)
    script = ('mount --bind "$1" "$1"; mount -o remount,ro,bind "$1"\n'
              '"$0" -m medgen train "$2"; echo "train $?"; "$0" -m medgen submit "$3" --local; echo "submit $?"; "$0" -m medgen watch "$2" --once; echo "watch $?"')
    arguments = [sys.executable, str(tmp_path / "runs"), str(run), str(tmp_path / "train.yaml")]
    done = subprocess.run([*private_mounts, "bash", "-c", script, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True)
    record_property("fired", done.stderr.splitlines()[0])
    assert {"train 2", "submit 2", "watch 4"} <= set(done.stdout.splitlines()), done.stdout + done.stderr
    assert done.stderr.lower().count("read-only") >= 2 and "Traceback" not in done.stderr, done.stderr


def test_real_volumes_go_through_check_and_data(glioma: Path, tmp_path: Path, medgen: Medgen, environment: dict[str, str]) -> None:
    environment["MEDGEN_GLIOMA"] = str(glioma)
    small = ["-odata.size=32", "-odata.every=8", "-ostages.train.config.channels=[8,16]", "-ostages.train.config.attention=[false,true]", "-ostages.train.config.head_channels=8"]
    checked = json.loads(medgen("check", REPOSITORY / "jobs" / "glioma_dual.yaml", *small, "--json").stdout)
    assert {split: facts["patients"] for split, facts in checked["data"]["splits"].items()} == {"train": 6, "val": 1, "test": 1}
    assert checked["data"]["spacing_mm"] == {"x": [7.5, 7.5], "y": [7.5, 7.5], "thickness": [1.0, 1.0]}
    medgen("data", REPOSITORY / "jobs" / "glioma_dual.yaml", *small, "--out", tmp_path / "summary")
    assert (tmp_path / "summary" / "contact_sheet.png").stat().st_size > 10_000
