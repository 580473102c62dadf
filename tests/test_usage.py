"""`medgen usage`: hours and losses from the accounting, from the events alone, and from both together."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launch_stub import build
from seeing import (
    FakeSlurm,
    accounting_row,
    batch,
    beat,
    ended,
    event,
    log,
    outcome,
    queue_row,
    queued,
    started,
    step_row,
)

from medgen.rundir import RunDir

Medgen = Callable[..., subprocess.CompletedProcess[str]]
STAGES = [
    {"name": "train", "kind": "train", "gpus": 2, "ranks": 2, "threads": 4},
    {"name": "images", "kind": "generate", "tasks": 4, "needs": ["train"], "gpus": 1},
    {"name": "collect_images", "kind": "collect", "needs": ["images"], "of": "images"},
]
HOUR = 3600


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made, _ = build(tmp_path / "runs", STAGES)
    return made


@pytest.fixture
def slurm(tmp_path: Path, environment: dict[str, str]) -> FakeSlurm:
    return FakeSlurm(tmp_path, environment)


def measured(medgen: Medgen) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(medgen("usage", "stub", "--json").stdout)
    return record


def stage(record: dict[str, Any], name: str = "train") -> dict[str, Any]:
    found: dict[str, Any] = next(item for item in record["stages"] if item["name"] == name)
    return found


def test_a_run_that_never_began(run: RunDir, medgen: Medgen) -> None:
    record = measured(medgen)
    assert record["source"] == "events" and record["total"]["gpu_hours"] == 0
    assert "0.00 GPU-hours" in medgen("usage", "stub").stdout


def test_from_the_events_of_a_local_run(run: RunDir, medgen: Medgen) -> None:
    started(run, 2 * HOUR)
    ended(run, cause="ValueError: no", seconds=HOUR / 2)
    started(run, HOUR, attempt=1)
    outcome(run, "done", attempt=1)
    ended(run, "done", 0, seconds=HOUR, attempt=1, next_action="done")
    used = stage(measured(medgen))
    assert used["gpu_hours"] == pytest.approx(3.0)  # 2 GPUs for 1.5 h
    assert used["cpu_hours"] == pytest.approx(1.5 * 4 * 2)
    assert used["wasted_hours"] == {"USER": pytest.approx(1.0)}  # it left no checkpoint
    assert (used["attempts"], used["done"], used["cpu_efficiency"]) == (2, 1, None)


def test_only_what_came_after_the_last_checkpoint_is_lost(run: RunDir, medgen: Medgen) -> None:
    started(run, 3 * HOUR)
    log(run, "resuming from x (step 0 of 1000)\n")
    ended(run, code=137, cause="killed by SIGKILL", seconds=HOUR)
    started(run, 2 * HOUR, attempt=1, from_step=400)  # the heartbeat of the first had reached 400
    log(run, "some words first\nresuming from train/ckpt/step-000300 (step 300 of 1000)\n", attempt=1)
    ended(run, "interrupted", 3, "stopped by SIGTERM after step 700", HOUR, "goes on from what it saved", attempt=1)
    started(run, HOUR, attempt=2, from_step=700)
    log(run, "resuming from train/ckpt/step-000700 (step 700 of 1000)\n", attempt=2)
    outcome(run, "done", attempt=2)
    ended(run, "done", 0, seconds=HOUR, attempt=2, next_action="done")
    used = stage(measured(medgen))
    assert used["gpu_hours"] == pytest.approx(6.0)
    assert used["wasted_hours"] == {"OOM": pytest.approx(2.0 * 100 / 400)}  # 100 of 400 steps; the interrupted one had saved


def test_a_checkpoint_on_disk_counts_before_anything_resumed_from_it(run: RunDir, medgen: Medgen) -> None:
    started(run, HOUR)
    beat(run, 400, seconds_ago=600)
    for step, whole in ((300, True), (350, False)):
        folder = run.checkpoints("train") / f"step-{step:06d}"
        folder.mkdir(parents=True)
        if whole:
            (folder / "commit.json").write_text("{}")
    ended(run, cause="ValueError: no", seconds=HOUR)
    assert stage(measured(medgen))["wasted_hours"] == {"USER": pytest.approx(2.0 * 100 / 400)}


def test_a_running_attempt_counts_until_now_and_a_lost_one_until_its_last_heartbeat(run: RunDir, medgen: Medgen) -> None:
    started(run, HOUR)
    beat(run, 10)
    record = measured(medgen)
    assert record["running"] == 1 and stage(record)["gpu_hours"] == pytest.approx(2.0, rel=0.05) and not stage(record)["wasted_hours"]
    assert "so far, 1 running" in medgen("usage", "stub").stdout
    beat(run, 10, seconds_ago=HOUR / 2)
    record = measured(medgen)
    assert record["running"] == 0 and stage(record)["gpu_hours"] == pytest.approx(1.0, rel=0.01)
    assert list(stage(record)["wasted_hours"]) == ["LOST"]


def slurm_run(run: RunDir, slurm: FakeSlurm) -> list[str]:
    """A training that was preempted once, then done on the same job number; images of which two are done and one was lost."""
    event(run, "submitted", 8 * HOUR, backend="slurm", tasks=6, submission="1")
    train, images = queued(run, 7, seconds_ago=8 * HOUR), queued(run, 8, "images", (0, 1, 2, 3), seconds_ago=8 * HOUR)
    event(run, "jobs_released", 8 * HOUR - 10, job_ids=[7])
    started(run, 7 * HOUR, job=7)
    batch(run, "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026 DUE TO PREEMPTION ***\n", seconds_ago=7 * HOUR)
    log(run, "step 1\n")
    ended(run, "interrupted", 3, "stopped by SIGTERM after step 500", HOUR, "goes on from what it saved")
    started(run, 5 * HOUR, attempt=1, from_step=500, job=7)
    log(run, "resuming from x (step 500 of 1000)\n", attempt=1)
    outcome(run, "done", attempt=1)
    ended(run, "done", 0, seconds=HOUR, attempt=1, next_action="done")
    for shard in range(2):
        started(run, 3 * HOUR, "images", shard, job=f"8_{shard}")
        outcome(run, "done", stage="images", shard=shard)
        ended(run, "done", 0, seconds=HOUR, stage="images", shard=shard, next_action="done")
    return [
        accounting_row("7", train, "PREEMPTED", 7 * HOUR, HOUR, gpus=2, cpus=8, total_cpu="04:00:00", mem="64G"), step_row("7", "4G"),
        accounting_row("7", train, "COMPLETED", 5 * HOUR, HOUR, gpus=2, cpus=8, total_cpu="02:00:00", mem="64G"), step_row("7", "8G"),
        *(accounting_row(f"8_{shard}", images, "COMPLETED", 3 * HOUR, HOUR, gpus=1, cpus=1) for shard in range(2)),
        accounting_row("8_2", images, "NODE_FAIL", 3 * HOUR, HOUR // 2, gpus=1, cpus=1),
    ]  # fmt: skip


def test_from_the_accounting_with_requeued_jobs_and_blanks(run: RunDir, slurm: FakeSlurm, medgen: Medgen) -> None:
    slurm.accounting(*slurm_run(run, slurm))
    record = measured(medgen)
    train, images = stage(record), stage(record, "images")
    assert record["source"] == "accounting" and record["notes"] == []
    assert "-D" in (slurm.folder / "sacct.calls").read_text().split()
    assert (train["gpu_hours"], train["cpu_hours"], train["attempts"]) == (4.0, 16.0, 2)
    assert train["wasted_hours"] == {}  # it had saved
    assert train["cpu_efficiency"] == pytest.approx(6 / 16)
    assert (train["used_mebibytes"], train["asked_mebibytes"]) == (2 * 8192, 65536)  # of two ranks; the larger life
    assert train["wait_seconds"] == pytest.approx(HOUR - 10, abs=15)  # from the release, not from sbatch
    assert (images["gpu_hours"], images["wasted_hours"]) == (2.5, {"NODE_FAIL": 0.5})
    assert (images["cpu_efficiency"], images["used_mebibytes"]) == (None, None)
    assert (images["images"], images["images_per_hour"]) == (2, pytest.approx(2 / 2.5))
    assert record["total"]["wasted_hours"] == {"GPU-hours": {"NODE_FAIL": 0.5}, "CPU-hours": {}}
    assert record["hints"] == ["-o stages.train.resources.mem=24G  (asked for 64G, used 16G at most)"]


def test_a_purged_record_is_counted_from_the_events(run: RunDir, slurm: FakeSlurm, medgen: Medgen) -> None:
    rows = slurm_run(run, slurm)
    slurm.accounting(*rows[2:])
    record = measured(medgen)
    assert stage(record)["gpu_hours"] == pytest.approx(4.0)
    assert record["notes"] == ["1 attempt is not in the accounting (removed there, or run elsewhere): counted from medgen's own events"]


def test_without_accounting(run: RunDir, slurm: FakeSlurm, medgen: Medgen) -> None:
    slurm_run(run, slurm)
    slurm.without("sacct")
    record = measured(medgen)
    assert record["source"] == "events" and "disabled" in record["notes"][0]
    assert stage(record)["gpu_hours"] == pytest.approx(4.0)
    assert stage(record, "images")["gpu_hours"] == pytest.approx(2.0)  # the lost one told nothing
    assert "from the events" in medgen("usage", "stub").stdout


def test_a_running_job_counts_what_the_accounting_says_so_far(run: RunDir, slurm: FakeSlurm, medgen: Medgen) -> None:
    name = queued(run, 7, seconds_ago=HOUR)
    started(run, HOUR, job=7)
    slurm.queue(queue_row(7, name, "RUNNING", "None"))
    slurm.accounting(accounting_row("7", name, "RUNNING", HOUR, HOUR, gpus=2))
    record = measured(medgen)
    assert record["running"] == 1 and stage(record)["gpu_hours"] == 2.0 and stage(record)["wasted_hours"] == {}


def test_a_job_that_never_said_a_word_is_lost_time(run: RunDir, slurm: FakeSlurm, medgen: Medgen) -> None:
    name = queued(run, 7, seconds_ago=HOUR)
    slurm.accounting(accounting_row("7", name, "FAILED", HOUR, HOUR // 4, "127:0", gpus=2))
    assert stage(measured(medgen))["wasted_hours"] == {"SETUP": 0.5}


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits(run: RunDir, slurm: FakeSlurm, medgen: Medgen, environment: dict[str, str], columns: int) -> None:
    slurm.accounting(*slurm_run(run, slurm))
    environment["COLUMNS"] = str(columns)
    shown = medgen("usage", "stub").stdout
    assert all(len(line) <= columns for line in shown.splitlines()), shown
    assert ("16G of 64G" in shown) == (columns == 120)
    assert "lost: 0.50 GPU-hours (8%): node failure 0.50" in shown
    assert "…" not in shown
