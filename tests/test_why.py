"""What `medgen why` says of every kind of failure, from the records it leaves."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launch_stub import build, interpreter
from seeing import (
    STAGES,
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
)

from medgen.launch.causes import Records, classify
from medgen.launch.local import LocalBackend
from medgen.launch.slurm import AccountingRow
from medgen.launch.tries import Try
from medgen.rundir import RunDir

Medgen = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made, _ = build(tmp_path / "runs", STAGES)
    return made


@pytest.fixture
def slurm(tmp_path: Path, environment: dict[str, str]) -> FakeSlurm:
    return FakeSlurm(tmp_path, environment)


def told(medgen: Medgen, expect: int = 1) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(medgen("why", "stub", "--json", expect=expect).stdout)
    return record


def first(medgen: Medgen) -> dict[str, Any]:
    found: dict[str, Any] = told(medgen)["findings"][0]
    return found


def test_nothing_is_wrong_with_a_run_that_never_began(run: RunDir, medgen: Medgen) -> None:
    assert told(medgen, expect=0)["findings"] == []
    assert "nothing is wrong" in medgen("why", "stub").stdout


def test_a_finished_run(run: RunDir, medgen: Medgen) -> None:
    outcome(run, "done")
    for shard in range(4):
        outcome(run, "done", stage="images", shard=shard)
    outcome(run, "done", stage="report")
    assert "everything is done" in medgen("why", "stub").stdout


def failed(run: RunDir, cause: str | None, code: int = 1, told_by: str = "outcome") -> None:
    started(run)
    if told_by == "outcome":
        outcome(run, cause=cause)
    ended(run, cause=cause, code=code)


@pytest.mark.parametrize(
    ("cause", "code", "kind"),
    [
        ("the loss became nan between steps 90 and 100; lower lr", 1, "NAN"),
        ("images 0 to 15: channel bravo holds NaN; the checkpoint is not usable, choose another", 1, "NAN"),
        ("diverged: the loss (9) has been more than 5 times its best (1) for 500 steps, now step 900; lower lr", 1, "NAN"),
        ("/runs/x: the disk is full; mend that and run the same command again", 2, "DISK_FULL"),
        ("/runs/x: the disk quota is used up; mend that and run the same command again", 2, "DISK_FULL"),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB", 1, "OOM"),
        ("MemoryError: Unable to allocate 3.1 GiB", 1, "OOM"),
        ("DistNetworkError: The client socket has timed out after 120000ms while trying to connect to (n1, 10033).", 1, "RENDEZVOUS"),
        ("n1:10033: 2 ranks could not meet within 120 s", 1, "RENDEZVOUS"),
        ("stages.train: the train split has no patients", 2, "INPUT"),
        ("ValueError: shapes do not match", 1, "USER"),
        ("KeyError: 'oom_killer'", 1, "USER"),
    ],
)  # fmt: skip
def test_what_the_task_told_decides(run: RunDir, medgen: Medgen, cause: str, code: int, kind: str) -> None:
    failed(run, cause, code)
    found = first(medgen)
    assert (found["stage"], found["cause"]["kind"], found["cause"]["certain"]) == ("train", kind, True)
    assert cause.startswith(found["cause"]["detail"][:40])
    assert found["cause"]["evidence"][0]["record"] == "outcome"
    assert any(line.startswith("medgen submit") for line in found["advice"])


@pytest.mark.parametrize(
    ("text", "kind", "where"),
    [
        ("slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.0. Some of your processes may have been killed\n", "OOM", "host"),
        ("slurmstepd-n1: error: StepId=6.batch exceeded memory limit (348472320 > 314572800), being killed\n", "OOM", "host"),
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-21T14:57:36 DUE TO TIME LIMIT ***\n", "TIMEOUT", ""),
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-21T14:57:36 DUE TO PREEMPTION ***\n", "PREEMPTED", ""),
        ("slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-11-21T14:57:36 DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***\n", "NODE_FAIL", ""),
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-21T14:57:36 ***\n", "CANCELLED", ""),
        ("srun: error: n1: task 1: Killed\nsrun: error: *** STEP 7.0 ON n1 CANCELLED AT 2026-11-21T14:57:36 ***\n", "OOM", "host"),  # by srun itself
    ],
)  # fmt: skip
def test_slurms_own_words_in_the_batch_log(run: RunDir, medgen: Medgen, text: str, kind: str, where: str) -> None:
    started(run)
    log(run, "step 1\n", rank=1)
    batch(run, text)
    ended(run, code=137, cause="killed by SIGKILL: often too little memory: step 1")
    cause = first(medgen)["cause"]
    assert (cause["kind"], cause["where"]) == (kind, where)
    assert cause["certain"] is not text.startswith("srun: error: n1: task 1: Killed")


def test_only_the_words_about_the_last_attempt_count(run: RunDir, medgen: Medgen) -> None:
    started(run, 200)
    batch(run, "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026 DUE TO TIME LIMIT ***\n")
    ended(run, "interrupted", 3, "stopped", next_action="goes on from what it saved")
    started(run, 100, attempt=1)
    batch(run, "", attempt=1)
    log(run, "Traceback (most recent call last):\nValueError: no\n", attempt=1)
    ended(run, cause="exit code 1: ValueError: no", attempt=1)
    found = first(medgen)
    assert (found["cause"]["kind"], found["attempt"]) == ("USER", 1)
    assert found["cause"]["detail"] == "exit code 1: ValueError: no"
    assert found["lines"][-1] == "ValueError: no"


def test_a_failed_set_up_that_no_event_tells_of(run: RunDir, medgen: Medgen) -> None:
    batch(run, "bash: line 12: module: command not found\nmedgen: set-up failed with exit code 127: module load CUDA/12\n")
    found = first(medgen)
    assert found["cause"]["kind"] == "SETUP"
    assert "module load CUDA/12" in found["cause"]["detail"]
    assert (found["attempt"], found["node"]) == (0, "n1")


def test_the_guilty_ranks_words_beat_those_of_a_rank_that_lost_it(run: RunDir, medgen: Medgen) -> None:
    started(run)
    outcome(run, cause="RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")
    batch(run, "srun: error: vm: task 1: Exited with exit code 1\n")
    log(run, "rank 0 lost somebody\n")
    log(run, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n", rank=1)
    ended(run, cause="RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")
    found = first(medgen)
    assert (found["cause"]["kind"], found["cause"]["where"]) == ("OOM", "GPU")
    assert found["log"].endswith("r1.a0.log")
    event(run, "rank_failed", 50, stage="train", shard=0, attempt=0, cause="IndexError: list index out of range")
    log(run, "IndexError: list index out of range\n", rank=1)
    cause = first(medgen)["cause"]
    assert (cause["kind"], cause["detail"]) == ("USER", "IndexError: list index out of range")


def test_killed_without_a_word_is_only_probably_memory(run: RunDir, medgen: Medgen) -> None:
    started(run)
    ended(run, code=137, cause="killed by SIGKILL: often too little memory")
    assert "OOM (host), probably" in medgen("why", "stub", expect=1).stdout
    event(run, "cancelled", 39)
    assert first(medgen)["cause"]["kind"] == "CANCELLED"


def test_a_users_command_is_judged_by_its_own_exit_code(tmp_path: Path, medgen: Medgen) -> None:
    run, _ = build(tmp_path / "runs", [{"name": "step", "kind": "command"}])
    for attempt, (code, kind) in enumerate([(137, "OOM"), (2, "USER"), (127, "USER")]):
        started(run, 100 - attempt, "step", attempt=attempt)
        log(run, f"the tool says {code}\nstep: failed: the command ended with exit code {code}\n", "step", attempt=attempt)
        outcome(run, cause=f"the command ended with exit code {code}", stage="step", attempt=attempt)
        ended(run, cause=f"the command ended with exit code {code}", stage="step", attempt=attempt)
        found = first(medgen)
        assert found["cause"]["kind"] == kind, code
        if kind == "USER":
            assert found["cause"]["detail"] == f"exit code {code}: the tool says {code}"


def test_what_waits_for_a_failure_is_blocked_not_failed(run: RunDir, medgen: Medgen) -> None:
    failed(run, "ValueError: no")
    findings = told(medgen)["findings"]
    assert [(item["stage"], item["cause"]["kind"], item["shards"]) for item in findings] == [
        ("train", "USER", [0]), ("images", "DEPENDENCY", [0, 1, 2, 3]), ("report", "DEPENDENCY", [0]),
    ]  # fmt: skip
    shown = medgen("why", "stub", expect=1).stdout
    assert "images shards 0-3  DEPENDENCY  needs train" in shown


def test_shards_with_the_same_cause_are_one_finding(run: RunDir, medgen: Medgen) -> None:
    outcome(run, "done")
    for shard in (0, 1, 3):
        started(run, stage="images", shard=shard)
        outcome(run, cause=f"ValueError: image {shard * 16} is empty", stage="images", shard=shard)
        ended(run, stage="images", shard=shard, cause=f"ValueError: image {shard * 16} is empty")
    findings = told(medgen)["findings"]
    assert [(item["cause"]["kind"], item["shards"]) for item in findings] == [("USER", [0, 1, 3]), ("DEPENDENCY", [2]), ("DEPENDENCY", [0])]


def test_files_that_vanished_after_the_task_was_done(run: RunDir, medgen: Medgen) -> None:
    started(run)
    outcome(run, "done")
    ended(run, "done", 0, next_action="done")
    (run.stage("train") / "0.bin").unlink()
    cause = first(medgen)["cause"]
    assert cause["kind"] == "USER" and "missing" in cause["detail"]


def test_a_task_that_runs_is_not_judged(run: RunDir, medgen: Medgen) -> None:
    started(run)
    beat(run, 10)
    assert told(medgen, expect=0)["findings"] == []
    beat(run, 10, seconds_ago=300)  # and nobody supervises it
    cause = first(medgen)["cause"]
    assert (cause["kind"], cause["certain"]) == ("LOST", True)


# --- advice ----------------------------------------------------------------------------------------------------------


def advice(medgen: Medgen) -> str:
    return "\n".join(first(medgen)["advice"])


def test_advice_names_what_to_change(run: RunDir, slurm: FakeSlurm, medgen: Medgen) -> None:
    name = queued(run, 7)
    started(run, job=7)
    ended(run, code=137, cause="killed by SIGKILL: often too little memory")
    slurm.accounting(accounting_row("7", name, "OUT_OF_MEMORY", 100, 60, "0:125", mem="16G"))
    found = first(medgen)
    assert found["cause"]["certain"] and "-o stages.train.resources.mem=32G" in "\n".join(found["advice"])
    slurm.accounting(accounting_row("7", name, "NODE_FAIL", 100, 60, node="n2"))
    text = advice(medgen)
    assert "{nodes: n2, reason:" in text and "until: 20" in text and "exclude:" in text


def test_advice_after_the_time_limit_counts_with_the_speed_so_far(run: RunDir, slurm: FakeSlurm, medgen: Medgen) -> None:
    name = queued(run, 7)
    started(run, 4000, job=7)
    beat(run, 300, total=1000, seconds_ago=400)
    slurm.accounting(accounting_row("7", name, "TIMEOUT", 4000, 3600))
    text = advice(medgen)
    assert "-o stages.train.segments=4" in text
    assert "-o stages.train.resources.time=2h" in text


def test_the_submit_command_is_the_one_that_made_the_run(run: RunDir, medgen: Medgen, tmp_path: Path) -> None:
    run.manifest.write_text(json.dumps({
        "command": ["/usr/bin/medgen", "submit", "spec.yaml", "-o", "seed=3", "--detach", "--site", "lab"], "folder": str(tmp_path), "spec_file": str(tmp_path / "spec.yaml"),
    }))  # fmt: skip
    failed(run, "ValueError: no")
    assert "medgen submit spec.yaml -o seed=3 --site lab" in first(medgen)["advice"]


# --- Slurm, from recorded answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "code", "kind"),
    [
        ("OUT_OF_MEMORY", "0:125", "OOM"), ("TIMEOUT", "0:0", "TIMEOUT"), ("DEADLINE", "0:0", "TIMEOUT"), ("PREEMPTED", "0:0", "PREEMPTED"),
        ("NODE_FAIL", "0:0", "NODE_FAIL"), ("BOOT_FAIL", "0:0", "NODE_FAIL"), ("CANCELLED by 1000", "0:0", "CANCELLED"), ("FAILED", "7:0", "USER"), ("FAILED", "0:9", "OOM"),
    ],
)  # fmt: skip
def test_the_accounting_knows_how_a_job_ended_that_told_nothing(run: RunDir, slurm: FakeSlurm, medgen: Medgen, state: str, code: str, kind: str) -> None:
    name = queued(run, 7)
    started(run, job=7)
    slurm.accounting(accounting_row("7", name, state, 100, 60, code))
    found = first(medgen)
    assert found["cause"]["kind"] == kind
    assert any(item["record"] == "accounting" for item in found["cause"]["evidence"])
    assert (found["node"], found["job_id"]) == ("n1", "7")


def test_a_row_of_another_cluster_life_is_not_believed(run: RunDir, slurm: FakeSlurm, medgen: Medgen) -> None:
    queued(run, 7)
    started(run, job=7)
    slurm.accounting(accounting_row("7", "somebody-elses", "TIMEOUT", 100, 60))
    assert first(medgen)["cause"]["kind"] == "NODE_FAIL"  # it stopped without a word


def test_without_accounting_and_without_a_queue(run: RunDir, slurm: FakeSlurm, medgen: Medgen) -> None:
    queued(run, 7)
    started(run, job=7)
    slurm.without("sacct")
    record = told(medgen)
    assert (record["findings"][0]["cause"]["kind"], record["findings"][0]["cause"]["certain"]) == ("NODE_FAIL", False)
    assert "disabled" in record["notes"][0]
    ended(run, code=137, cause="killed by SIGKILL: often too little memory")
    assert first(medgen)["cause"]["kind"] == "OOM"
    slurm.without("squeue")
    record = told(medgen)
    assert record["findings"][0]["cause"]["kind"] == "OOM" and len(record["notes"]) == 2


@pytest.mark.parametrize(
    ("reason", "state", "kind"),
    [
        ("DependencyNeverSatisfied", "PENDING", "DEPENDENCY"), ("PartitionTimeLimit", "PENDING", "INPUT"), ("JobHeldUser", "PENDING", "CANCELLED"),
        ("job requeued in held state", "PENDING", "CANCELLED"), ("launch failed requeued held", "PENDING", "NODE_FAIL"), ("PartitionDown", "PENDING", "NODE_FAIL"),
    ],
)  # fmt: skip
def test_jobs_that_wait_for_ever(run: RunDir, slurm: FakeSlurm, medgen: Medgen, reason: str, state: str, kind: str) -> None:
    slurm.queue(queue_row(7, queued(run, 7), state, reason))
    found = first(medgen)
    assert found["cause"]["kind"] == kind
    assert found["cause"]["evidence"][0]["said"] == f"job 7: {state} ({reason})"


@pytest.mark.parametrize("reason", ["Resources", "Priority", "Dependency", "BeginTime", "QOSMaxJobsPerUserLimit", "AReasonOfTomorrow"])
def test_jobs_that_only_have_to_wait(run: RunDir, slurm: FakeSlurm, medgen: Medgen, reason: str) -> None:
    slurm.queue(queue_row(7, queued(run, 7), "PENDING", reason))
    assert told(medgen, expect=0)["alive"]


def test_jobs_that_were_cancelled_before_they_began(run: RunDir, slurm: FakeSlurm, medgen: Medgen) -> None:
    names = [queued(run, 7), queued(run, 8, "images", (0, 1, 2, 3)), queued(run, 9, "report")]
    slurm.accounting(*(f"{job}|CANCELLED by 0|0:0|None|{100}|{100}|0|||0||||None assigned|None|{name}" for job, name in zip(("7", "8_[0-3]", "9"), names, strict=True)))
    findings = told(medgen)["findings"]
    assert [(item["stage"], item["cause"]["kind"]) for item in findings] == [("train", "CANCELLED"), ("images", "DEPENDENCY"), ("report", "DEPENDENCY")]


def test_a_task_that_was_started_again_is_told_but_not_wrong(run: RunDir, slurm: FakeSlurm, medgen: Medgen) -> None:
    name = queued(run, 7)
    started(run, 150, job=7)
    batch(run, "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-21T14:57:36 DUE TO PREEMPTION ***\n", seconds_ago=150)
    ended(run, "interrupted", 3, "stopped by SIGTERM after step 4; saved", 50, "goes on from what it saved", seconds_ago=100)
    slurm.queue(queue_row(7, name, "PENDING", "BeginTime"))
    record = told(medgen, expect=0)
    assert [(item["stage"], item["cause"]["kind"]) for item in record["again"]] == [("train", "PREEMPTED")]
    assert "attempt 0: PREEMPTED, goes on" in medgen("why", "stub").stdout


# --- the rules by themselves -------------------------------------------------------------------------------------------


def records(**facts: Any) -> Records:
    item = Try("train", 0, 0, 1000.0, 1, 0, "7", "n1", **facts.pop("item", {}))
    return Records(**{"item": item, "stage_kind": "train", "limit_seconds": 3600.0, "grace_seconds": 180.0, "on_slurm": True, **facts})


def accounting(state: str, signal: int = 0, code: int = 0) -> AccountingRow:
    return AccountingRow(7, None, "", state, code, signal, 1000.0, 2000.0, 900.0, 1000, 0, 1, 1, "n1", None, None, None, "")


@pytest.mark.parametrize(
    ("facts", "kind", "certain"),
    [
        ({"item": {"status": "interrupted", "ended": 1000 + 3500.0, "cause": "stopped by SIGUSR2 after step 9"}}, "TIMEOUT", False),
        ({"item": {"status": "interrupted", "ended": 1000 + 300.0, "cause": "stopped by SIGTERM after step 9"}}, "PREEMPTED", False),
        ({"item": {"status": "interrupted", "ended": 1300.0, "cause": "stopped"}, "row": accounting("PREEMPTED")}, "PREEMPTED", True),
        ({"item": {"status": "interrupted", "ended": 1300.0, "cause": "stopped", "kind": "CANCELLED"}, "row": accounting("PREEMPTED")}, "CANCELLED", True),
        ({"item": {"status": "interrupted", "ended": 1300.0, "cause": "stopped"}, "on_slurm": False}, "CANCELLED", False),
        ({"item": {"status": "interrupted", "ended": 1300.0, "cause": "x", "kind": "TIMEOUT"}}, "TIMEOUT", True),
        ({"item": {"status": "failed", "exit_code": 1}, "rank_lines": ("RuntimeError: NCCL error: unhandled system error",), "row": accounting("NODE_FAIL")}, "NODE_FAIL", True),
        ({"item": {"status": "failed", "exit_code": 1}, "rank_lines": ("Watchdog caught collective operation timeout",)}, "RENDEZVOUS", True),
        ({"item": {"status": "failed", "exit_code": 1}, "rank_lines": ("ModuleNotFoundError: No module named 'torch'",)}, "SETUP", True),
        ({"item": {"status": "failed", "exit_code": 0}}, "USER", True),
        ({"item": {"status": "failed", "exit_code": 1}, "rank_lines": ("OSError: [Errno 28] No space left on device",)}, "DISK_FULL", True),
        ({"item": {"status": "failed", "exit_code": 1}, "batch": "medgen: set-up failed with exit code 1: cp: write error: No space left on device\n"}, "DISK_FULL", True),
    ],
)  # fmt: skip
def test_rules(facts: dict[str, Any], kind: str, certain: bool) -> None:
    cause = classify(records(**facts))
    assert (cause.kind, cause.certain) == (kind, certain)


# --- how it looks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 120])
def test_the_screen_fits(run: RunDir, medgen: Medgen, environment: dict[str, str], columns: int) -> None:
    environment["COLUMNS"] = str(columns)
    started(run)
    log(run, "x" * 300 + "\nValueError: no\n")
    outcome(run, cause="ValueError: " + "long words " * 30)
    ended(run, cause="ValueError: " + "long words " * 30)
    shown = medgen("why", "stub", expect=1).stdout
    assert "✘ train  USER" in shown
    free = [line for line in shown.splitlines() if len(line) > columns]
    assert all(line.lstrip().startswith(("medgen submit", "attempt 0")) for line in free), free  # to be copied: never cut
    assert not [line for line in shown.splitlines() if line != line.rstrip()]


def test_a_real_local_failure(tmp_path: Path, medgen: Medgen) -> None:
    run, plan = build(tmp_path / "runs", [{"name": "train", "kind": "train"}, {"name": "report", "kind": "report", "needs": ["train"]}], {"train": {"crashes": 9}})
    LocalBackend(2, 0, interpreter(tmp_path)).submit(run, plan)
    record = told(medgen)
    assert [(item["stage"], item["cause"]["kind"], item["attempt"]) for item in record["findings"]] == [("train", "USER", 1), ("report", "DEPENDENCY", None)]
    assert record["findings"][0]["cause"]["detail"] == "exit code 1: ValueError: the stub was told to crash"


def test_user_errors_are_one_line(medgen: Medgen) -> None:
    assert medgen("why", "nothing", expect=2).stderr.startswith("medgen: nothing: no such run")
