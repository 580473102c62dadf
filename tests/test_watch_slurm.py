"""What watch says of jobs of Slurm: the truth order with squeue and sacct behind it, one poll for all, and big runs. No Slurm needed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch_stub import REPOSITORY, build, wait_until
from rich.console import Console
from seeing import write_beat, write_rank_beat

from medgen.errors import Exit
from medgen.launch.slurm import AccountingRow, parse_accounting
from medgen.rundir import Heartbeat, Outcome, RankBeat, RunDir, find_run
from medgen.watch import live, outcomes
from medgen.watch.events import EventLog
from medgen.watch.graph import NODE, rails
from medgen.watch.poll import AccountingAnswer, Impatient, Key, Patient, QueueAnswer, Sparing
from medgen.watch.reasons import reason_in_words
from medgen.watch.state import Reader, RunState, TaskState, to_json
from medgen.watch.view import render
from medgen.watch.words import clock

STAGES = [
    {"name": "train", "kind": "train", "gpus": 2, "ranks": 2},
    {"name": "images", "kind": "generate", "tasks": 6, "needs": ["train"], "gpus": 1},
    {"name": "report", "kind": "report", "needs": ["images"]},
]
JOBS = {"train": 71, "images": 72, "report": 73}
HOUR = 3600


class Said:
    """A Source that says what a test wants, and remembers what it was asked."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.asked: float | None = time.time()
        self.trouble: str | None = None
        self.rows: list[AccountingRow] = []
        self.wanted: list[Set[Key]] = []
        self.newer_than = 0.0

    def queue(self, newer_than: float) -> QueueAnswer:
        self.newer_than = newer_than
        return QueueAnswer("\n".join(self.lines), self.asked, time.time(), 15, self.asked, self.trouble)

    def accounting(self, run_id: str, wanted: Set[Key], since: float) -> AccountingAnswer:
        self.wanted.append(set(wanted))
        return AccountingAnswer({(row.job_id, row.array_task): row for row in self.rows})


class Lab:
    """A run whose jobs were submitted an hour ago."""

    def __init__(self, folder: Path):
        self.run, _ = build(folder, STAGES)
        self.said = Said()
        self.event("submitted", HOUR, backend="slurm", tasks=8, submission="1")
        for stage in STAGES:
            self.submit(str(stage["name"]), HOUR, JOBS[str(stage["name"])])

    def submit(self, stage: str, seconds_ago: float, job: int | None, submission: int = 1, offset: int = 0) -> None:
        shards = list(range(offset, next(int(item.get("tasks", 1)) for item in STAGES if item["name"] == stage)))  # type: ignore[call-overload]
        name = self.name(stage, submission, offset)
        self.event("job_intent", seconds_ago, name=name, stage=stage, submission=str(submission), offset=offset, shards=shards)
        if job is not None:
            self.event("job_submitted", seconds_ago, name=name, job_id=job)

    def name(self, stage: str, submission: int = 1, offset: int = 0) -> str:
        return f"medgen.{self.run.run_id}.{stage}.{submission}.{offset}"

    def event(self, kind: str, seconds_ago: float, **facts: Any) -> None:
        with self.run.events_file.open("a") as handle:
            handle.write(json.dumps({"time": time.time() - seconds_ago, "event": kind, "host": "login", **facts}) + "\n")

    def started(self, seconds_ago: float, stage: str = "train", shard: int = 0, attempt: int = 0, from_step: int = 0) -> None:
        self.event("task_started", seconds_ago, stage=stage, shard=shard, attempt=attempt, devices=2, from_step=from_step, job_id=str(JOBS[stage]), node="n1")

    def ended(self, seconds_ago: float, status: str, seconds: float, following: str, cause: str | None = "exit code 1: no", stage: str = "train", shard: int = 0) -> None:
        self.event("task_ended", seconds_ago, stage=stage, shard=shard, attempt=0, status=status, cause=cause, seconds=seconds, next=following, devices=2, again=following.startswith(("will be tried again", "goes on")))

    def beat(self, seconds_ago: float, step: int = 40, stage: str = "train", shard: int = 0, attempt: int = 0, still_seconds: float | None = 0) -> None:
        now = time.time()
        advanced = None if still_seconds is None else now - seconds_ago - still_seconds
        write_beat(self.run, Heartbeat(stage, shard, attempt, step, 100, "steps", 0.5, now - seconds_ago, "n1", 1, advanced))

    def outcome(self, status: str, seconds_ago: float = 0, stage: str = "train", shard: int = 0, cause: str | None = None) -> Path:
        made = self.run.shard(stage, shard) / "made.bin"
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_text("x")
        ended = time.time() - seconds_ago
        self.run.write_outcome(Outcome(self.run.run_id, stage, shard, f"{stage}{shard}", 0, status, cause, "n1", "GPU", 2, ended - 60, ended, [self.run.produced(made)]))  # type: ignore[arg-type]
        return made

    def row(self, state: str, reason: str = "None", stage: str = "train", start: float | None = None, element: str = "N/A", job: int | None = None, submission: int = 1, end: float | None = None) -> None:
        """`start`, `end`: seconds from now."""
        begins, ends = ("N/A" if moment is None else str(int(time.time() + moment)) for moment in (start, end))
        nodes = "n1" if state in ("RUNNING", "COMPLETING", "SUSPENDED") else ""
        number = JOBS[stage] if job is None else job
        self.said.lines.append(f"{number}|{element}|{state}|{reason}|{begins}|{ends}|0:10|1|{nodes}|{self.name(stage, submission)}")

    def account(self, line: str) -> None:
        """A row of sacct; NAME, THEN and NOW are filled in."""
        now = int(time.time())
        self.said.rows += parse_accounting(line.replace("NAME", self.name("train")).replace("THEN", str(now - 600)).replace("NOW", str(now)))

    def state(self) -> RunState:
        return Reader(self.run, self.said).read()

    def task(self, stage: str = "train", shard: int = 0) -> TaskState:
        return next(item for item in self.state().stages if item.name == stage).tasks[shard]


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "medgen"


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


# --- in Slurm's queue ------------------------------------------------------------------------------------------------


def test_queued_jobs_say_why_and_when(lab: Lab) -> None:
    lab.row("PENDING", "AssocGrpGRES", start=7200)
    lab.row("PENDING", "Dependency", "images", element="0-5%2")
    state = lab.state()
    task = state.stages[0].tasks[0]
    assert (task.word, task.reason, task.job) == ("queued", "the limit of your account on GPUs is reached", "71")
    assert task.starts == pytest.approx(time.time() + 7200, abs=5)
    assert [item.word for item in state.stages[1].tasks] == ["queued"] * 6
    assert state.stages[1].tasks[5].job == "72_5"
    assert state.verdict == "queued"
    assert "starts about" in screen(state) and "after train" in screen(state)
    assert state.where == "Slurm: 0 running, 7 queued"


@pytest.mark.parametrize("reason", ["JobHeldUser", "JobHeldAdmin", "job requeued in held state", "launch failed requeued held"])
def test_held_jobs_say_how_to_go_on(lab: Lab, reason: str) -> None:
    lab.row("PENDING", reason)
    assert lab.task().word == "held"
    assert "`scontrol release 71`" in screen(lab.state())


def test_a_state_of_holding_is_held_whatever_the_reason(lab: Lab) -> None:
    lab.row("REQUEUE_HOLD", "None")
    assert lab.task().word == "held"


def test_a_job_that_can_never_start_is_blocked(lab: Lab) -> None:
    lab.row("PENDING", "DependencyNeverSatisfied", "images", element="0-5")
    assert lab.task("images").word == "blocked"


def test_what_waits_for_a_failed_stage_is_blocked_before_slurm_notices(lab: Lab) -> None:
    lab.started(900)
    lab.ended(600, "failed", 300, "not tried again")
    lab.row("PENDING", "Dependency", "images", element="0-5")
    assert lab.task().word == "failed"
    assert lab.task("images").word == "blocked"
    assert lab.state().verdict == "failed"


def test_a_fresh_heartbeat_counts_more_than_squeue(lab: Lab) -> None:
    lab.started(900)
    lab.beat(5)
    for state in ("PENDING", "FAILED", "SUSPENDED"):
        lab.said.lines.clear()
        lab.row(state)
        assert lab.task().word == "running"
    lab.said.lines.clear()
    assert lab.task().word == "running"


def test_what_slurm_says_after_the_last_heartbeat_counts_more(lab: Lab) -> None:
    lab.started(900)
    lab.beat(30)
    for state, word in (("PENDING", "requeued"), ("SUSPENDED", "suspended"), ("RUNNING", "running")):
        lab.said.lines.clear()
        lab.row(state, start=-900)
        assert lab.task().word == word
    lab.said.lines.clear()
    assert lab.task().word == "interrupted"
    lab.said.asked = time.time() - 25  # just after it: the next heartbeat may be on its way
    assert lab.task().word == "running"


def test_running_with_and_without_signs_of_life(lab: Lab) -> None:
    lab.row("RUNNING", start=-900)
    lab.started(890)
    lab.beat(60)
    assert lab.task().word == "running"
    lab.beat(200)
    task = lab.task()
    assert (task.word, task.node) == ("stalled", "n1")
    lab.beat(400)
    task = lab.task()
    assert task.word == "lost"
    assert task.cause is not None
    assert "Slurm says it runs on n1, but nothing was heard of it for 6m 40s" in task.cause and "`scancel 71`" in task.cause
    assert lab.state().verdict == "running"


def test_a_silent_rank_and_one_that_keeps_the_others_are_named(lab: Lab) -> None:
    lab.row("RUNNING", start=-7200)
    lab.started(7200)
    now = time.time()
    for seconds_ago, still_seconds, word, told in (
        (5, 5, "running", None), (120, 115, "stalled", "nothing was heard of rank 1 on n2 for 2m"), (400, 395, "lost", "nothing was heard of rank 1 on n2 for 6m 40s"),
        (5, 2000, "stalled", "rank 1 on n2 stands at reading data, and the others wait for it"),
    ):  # fmt: skip
        write_beat(lab.run, Heartbeat("train", 0, 0, 40, 100, "steps", 0.5, now - 2, "n1", 1, now - still_seconds, "waiting for the others"))
        write_rank_beat(lab.run, RankBeat(1, 0, 40, now - still_seconds, "reading data", now - seconds_ago, "n2", 2))
        task = lab.task()
        assert task.word == word
        if told is not None:
            assert task.cause is not None and told in task.cause and "`scancel 71`" in task.cause


def test_a_job_may_take_its_time_to_begin(lab: Lab) -> None:
    lab.row("RUNNING", start=-120)
    assert lab.task().word == "running"
    lab.said.lines.clear()
    lab.row("RUNNING", start=-900)
    assert lab.task().word == "lost"


def test_it_lives_but_does_not_advance(lab: Lab) -> None:
    lab.row("RUNNING", start=-9000)
    lab.started(9000)
    lab.beat(5, still_seconds=900)
    assert lab.task().word == "running"  # 40 steps in 8100 s: ten of them take longer than that
    lab.beat(5, still_seconds=3000)
    task = lab.task()
    assert task.word == "stalled"
    assert task.cause is not None and task.cause.startswith("it lives, but has stood at 40 of 100 steps for 50m")


def test_heartbeats_of_an_older_medgen(lab: Lab) -> None:
    lab.row("RUNNING", start=-9000)
    lab.started(9000)
    path = lab.run.heartbeat_file("train", 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"stage": "train", "shard": 0, "attempt": 0, "step": 4, "total": 9, "unit": "steps", "loss": None, "time": time.time(), "host": "n1", "pid": 1}))
    assert lab.task().word == "running"
    path.write_text(path.read_text()[:-1] + ', "advanced": "soon"}')
    assert lab.task().step == 0  # damaged: as if there were none


def test_suspended_completing_and_states_never_heard_of(lab: Lab) -> None:
    for state, word in (("SUSPENDED", "suspended"), ("COMPLETING", "running"), ("STAGE_OUT", "running"), ("SOMETHING_NEW", "running"), ("CONFIGURING", "queued")):
        lab.said.lines.clear()
        lab.row(state, start=-60)
        assert lab.task().word == word, state
        assert lab.state().verdict in ("running", "queued")


def test_a_job_that_takes_long_to_end_is_not_lost(lab: Lab) -> None:
    lab.row("COMPLETING", start=-9000)
    lab.started(9000)
    lab.beat(2000)
    assert lab.task().word == "running"


def test_the_heartbeat_of_the_life_before_says_nothing_of_this_one(lab: Lab) -> None:
    """Slurm started the job again; it reads its modules and has not told that it begins."""
    lab.started(3000)
    lab.beat(1000)
    lab.row("RUNNING", start=-400)
    assert lab.task().word == "running"


def test_a_job_that_slurm_took_back_starts_again(lab: Lab) -> None:
    lab.started(900)
    lab.beat(100)
    lab.row("PENDING", "BeginTime", start=60)
    task = lab.task()
    assert task.word == "requeued"
    assert task.starts is not None
    assert "starts again about" in screen(lab.state())
    assert task.seconds == pytest.approx(800, abs=2)  # up to its last heartbeat, not up to now


def test_a_row_from_before_the_start_says_nothing(lab: Lab) -> None:
    lab.said.asked = time.time() - 12
    lab.row("PENDING", "Resources")
    lab.started(5)
    assert lab.task().word == "running"


def test_after_a_failure_that_is_tried_again(lab: Lab) -> None:
    lab.started(900)
    lab.ended(50, "failed", 850, "will be tried again", "exit code 1: CUDA out of memory")
    lab.row("RUNNING", start=-900)  # the script that asks for its requeue
    assert lab.task().word == "requeued"
    lab.said.lines.clear()
    lab.row("PENDING", "BeginTime", start=10)
    task = lab.task()
    assert (task.word, task.last_cause, task.tries_left) == ("requeued", "exit code 1: CUDA out of memory", 1)
    text = screen(lab.state())
    assert "failed before: exit code 1: CUDA out of memory" in text and "its last try" in text
    lab.said.lines.clear()
    lab.row("RUNNING", start=-3)  # the next attempt, which has not told yet
    assert lab.task().word == "running"


def test_submitted_again_after_a_failure_is_queued(lab: Lab) -> None:
    lab.started(900)
    lab.ended(600, "failed", 300, "not tried again")
    lab.event("submitted", 20, backend="slurm", tasks=1, submission="2")
    lab.submit("train", 20, 91, submission=2)
    lab.row("PENDING", "Priority", job=91, submission=2)
    task = lab.task()
    assert (task.word, task.job) == ("queued", "91")


def test_how_an_older_job_ended_does_not_explain_the_last_one(lab: Lab) -> None:
    lab.submit("train", 300, 91, submission=2)
    lab.row("TIMEOUT", "TimeLimit", start=-3000, end=-2000)
    assert (lab.task().word, lab.task().cause) == ("interrupted", "its job 91 has left Slurm's queue without an outcome")


def test_whatever_medgen_did_to_the_queue_makes_older_answers_old(lab: Lab) -> None:
    for seconds_ago, kind in ((50, "jobs_released"), (40, "jobs_cancelled"), (30, "cancelled")):
        lab.event(kind, seconds_ago, job_ids=[71])
        lab.state()
        assert lab.said.newer_than == pytest.approx(time.time() - seconds_ago, abs=2)


def test_of_several_jobs_the_running_one_counts(lab: Lab) -> None:
    lab.event("job_submitted", 10, name=lab.name("train"), job_id=75)
    lab.row("PENDING", "Dependency", job=75)
    lab.row("RUNNING", start=-30)
    lab.row("COMPLETED", job=75)
    assert lab.task().word == "running"


@pytest.mark.fault("F32")
@pytest.mark.timeout(60)
def test_jobs_of_a_namesake_in_another_folder_are_not_ours(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    lab.row("RUNNING", start=-30, job=4000)
    lab.said.lines.append("5000|N/A|RUNNING|None|1|1|0:10|1|n1|medgen.other-0123456789.train.1.0")
    lab.said.lines.append(f"5000|N/A|RUNNING|None|1|1|0:10|1|n1|medgen.{lab.run.run_id}.train")
    assert lab.task().word == "interrupted"
    assert lab.state().where is None
    record_property("fired", "foreign jobs in the answer of squeue")


def test_a_job_whose_number_was_lost_is_known_by_its_name(lab: Lab) -> None:
    lab.submit("train", 5, None, submission=2)
    lab.row("PENDING", "Priority", job=4000, submission=2)
    assert (lab.task().word, lab.task().job) == ("queued", "4000")


def test_shards_are_elements_and_an_offset(lab: Lab) -> None:
    lab.submit("images", 60, 80, submission=2, offset=4)
    lab.said.lines.append(f"80|1|RUNNING|None|{int(time.time()) - 20}|N/A|0:10|1|n2|{lab.name('images', 2, 4)}")
    lab.row("PENDING", "Priority", "images", element="1,3%2")
    words = [task.word for task in lab.state().stages[1].tasks]
    assert words == ["interrupted", "queued", "interrupted", "queued", "interrupted", "running"]


# --- gone from the queue ---------------------------------------------------------------------------------------------

HEAD = "71|{}|{}|THEN|NOW|THEN|600|gres/gpu=2|2|1|4G|00:10||n1|None|NAME"
ENDINGS = [
    ("TIMEOUT", "0:0", "interrupted", "Slurm ended it at its time limit"),
    ("CANCELLED by 1000", "0:0", "interrupted", "it was cancelled"),
    ("NODE_FAIL", "0:0", "interrupted", "its node n1 failed"),
    ("PREEMPTED", "0:0", "interrupted", "a job of higher priority took its place"),
    ("OUT_OF_MEMORY", "0:125", "failed", "more memory than it had asked for"),
    ("FAILED", "7:0", "failed", "its job ended with exit code 7 and left no outcome"),
    ("FAILED", "0:9", "failed", "its job was killed by signal 9 and left no outcome"),
    ("COMPLETED", "0:0", "failed", "its job ended with exit code 0, but left no outcome"),
]


@pytest.mark.parametrize(("state", "code", "word", "cause"), ENDINGS)
def test_how_the_accounting_says_it_ended(lab: Lab, state: str, code: str, word: str, cause: str) -> None:
    lab.started(900)
    lab.beat(700)
    lab.account(HEAD.format(state, code).replace("NOW", str(int(time.time()) - 300)))
    task = lab.task()
    assert task.word == word
    assert task.cause is not None and cause in task.cause
    assert task.seconds == pytest.approx(600, abs=2)  # GPUs were held until the job's end
    assert (71, None) in lab.said.wanted[0]


def test_too_much_memory_is_told_in_numbers(lab: Lab) -> None:
    lab.started(900)
    lab.account(HEAD.format("FAILED", "9:0").replace("NOW", "1000") + "\n" + HEAD.replace("71|", "71.0|", 1).format("CANCELLED", "0:9").replace("00:10||", "00:10|5G|"))
    assert lab.task().cause == "killed, because it used more memory than it had asked for: 5.0 GiB of 4.0 GiB"


@pytest.mark.fault("F39")
def test_an_outcome_may_be_seen_late(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    """A file system shows the outcome a while after the job has ended: that is no failure."""
    lab.started(900)
    lab.beat(100)
    lab.account(HEAD.format("COMPLETED", "0:0"))
    assert (lab.task().word, lab.state().verdict) == ("running", "running")
    record_property("fired", "the job has ended, its outcome is not there yet")
    lab.outcome("done")
    assert lab.task().word == "done"


@pytest.mark.fault("F30", "F32")
@pytest.mark.timeout(60)
def test_rows_that_are_not_complete_or_not_ours_say_nothing(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    lab.started(900)
    lab.account(HEAD.format("", "0:0").replace("NAME", "allocation"))
    lab.account(HEAD.format("RUNNING", "0:0"))
    task = lab.task()
    assert (task.word, task.cause) == ("interrupted", "its job 71 has left Slurm's queue without an outcome")
    record_property("fired", "a half row and a row of another")


def test_without_accounting_the_queue_itself_tells_a_while(lab: Lab) -> None:
    lab.started(900)
    lab.beat(700)
    lab.row("TIMEOUT", "TimeLimit", start=-900, end=-300)
    assert (lab.task().word, lab.task().cause) == ("interrupted", "Slurm ended it at its time limit")
    lab.said.lines.clear()
    assert lab.task().word == "interrupted"


def test_the_accounting_is_asked_only_for_what_is_not_explained(lab: Lab) -> None:
    lab.outcome("done")
    lab.row("RUNNING", start=-30, stage="images", element="0")
    lab.started(900, "images", 1)
    lab.ended(500, "failed", 100, "not tried again", stage="images", shard=1)
    lab.row("PENDING", "Dependency", "report")
    lab.state()
    assert lab.said.wanted == [{(72, shard) for shard in range(2, 6)}]
    for shard in range(2, 6):
        lab.outcome("failed", stage="images", shard=shard, cause="no")
    lab.state()
    assert len(lab.said.wanted) == 1


def test_a_cancelled_run_needs_no_explanation(lab: Lab) -> None:
    lab.started(900)
    lab.ended(50, "interrupted", 850, "cancelled; submit again to go on", "stopped by SIGTERM")
    lab.event("cancelled", 40, job_ids=[71, 72, 73], left=0)
    state = lab.state()
    assert [stage.word for stage in state.stages] == ["interrupted", "pending", "pending"]
    assert state.verdict == "interrupted"
    assert lab.said.wanted == []


def test_a_verified_outcome_counts_more_than_everything(lab: Lab) -> None:
    made = lab.outcome("done")
    lab.row("RUNNING", start=-30)
    lab.started(900)
    assert lab.task().word == "done"
    made.write_text("longer than it was")
    assert lab.task().word == "running"


def test_an_outcome_that_tells_a_failure(lab: Lab) -> None:
    lab.started(900)
    lab.outcome("failed", cause="the disk is full")
    assert (lab.task().word, lab.task().cause) == ("failed", "the disk is full")


# --- Slurm does not answer -------------------------------------------------------------------------------------------


@pytest.mark.fault("F31")
@pytest.mark.timeout(60)
def test_a_slurm_that_never_answers_makes_nothing_fail(lab: Lab, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]) -> None:
    lab.said.asked, lab.said.trouble = None, "squeue: did not answer within 20 s"
    assert lab.task().word == "queued"
    lab.started(900)
    assert lab.task().word == "stalled"
    lab.beat(5)
    assert lab.task().word == "running"
    lab.beat(400)
    task = lab.task()
    assert task.word == "stalled"
    assert task.cause is not None and "Slurm does not answer" in task.cause
    assert lab.state().verdict == "running"
    assert lab.said.wanted == []
    record_property("fired", lab.said.trouble)


def test_submitted_again_while_slurm_does_not_answer(lab: Lab) -> None:
    lab.started(900)
    lab.ended(600, "failed", 300, "not tried again")
    lab.said.asked, lab.said.trouble = time.time() - 300, "Socket timed out"
    lab.submit("train", 20, 91, submission=2)
    assert (lab.task().word, lab.task().job) == ("queued", "91")


@pytest.mark.fault("F31")
@pytest.mark.timeout(60)
def test_an_old_answer_proves_nothing_about_later(lab: Lab, record_property: Callable[[str, object], None]) -> None:
    """The job is not in an answer from before its heartbeat: that is no sign that it is gone."""
    lab.started(900)
    lab.beat(200)
    lab.said.asked, lab.said.trouble = time.time() - 300, "Unable to contact slurm controller"
    state = lab.state()
    assert state.stages[0].tasks[0].word == "stalled"
    assert state.silence is not None and state.silence.startswith("Slurm has not answered for 5m 0")
    assert "Slurm has not answered for 5m 0" in screen(state)
    lab.said.asked = time.time() - 100
    assert lab.task().word == "interrupted"
    record_property("fired", lab.said.trouble)


def test_a_failure_that_was_told_stays_one_without_slurm(lab: Lab) -> None:
    lab.said.asked, lab.said.trouble = None, "squeue: not on PATH"
    lab.started(900)
    lab.ended(600, "failed", 300, "not tried again")
    assert lab.task().word == "failed"
    assert lab.task("images").word == "blocked"
    assert lab.state().verdict == "failed"


def test_a_run_that_was_submitted_here_last_is_none_of_slurms_business(lab: Lab) -> None:
    lab.event("submitted", 10, backend="local", tasks=1, pid=1, submission="2", detached=False)
    lab.row("RUNNING", start=-30)
    state = lab.state()
    assert not state.on_slurm
    assert state.stages[0].word == "pending"


# --- one poll for all ------------------------------------------------------------------------------------------------

QUEUE = "1|N/A|{}|None|1|N/A|0:10|1|n1|medgen.a-0123456789.b.1.0\n"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put a command of a few lines of sh first on PATH; its calls are counted in the folder returned."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(name: str, lines: str) -> Path:
        (folder / f"{name}.new").write_text(f"#!/bin/sh\necho x >> {folder}/{name}.calls\n{lines}\n")
        (folder / f"{name}.new").chmod(0o755)
        (folder / f"{name}.new").rename(folder / name)
        return folder

    return make


def calls(folder: Path, name: str = "squeue") -> int:
    path = folder / f"{name}.calls"
    return len(path.read_text().split()) if path.exists() else 0


def age(folder: Path, seconds: float, kind: str = "queue") -> dict[str, Any]:
    """Make what is kept so much older; returns what it is now."""
    [path] = folder.glob(f"{kind}-*.json")
    record: dict[str, Any] = json.loads(path.read_text())
    record["tried"] -= seconds
    if record.get("asked") is not None:
        record["asked"] -= seconds
    path.write_text(json.dumps(record))
    return record


def test_one_answer_serves_all_until_it_is_old(stand_in: Callable[..., Path], cache_home: Path) -> None:
    folder = stand_in("squeue", f"printf '{QUEUE.format('RUNNING')}'")
    answers = [Patient().queue(0.0) for _ in range(5)]
    assert calls(folder) == 1
    assert {answer.text for answer in answers} == {QUEUE.format("RUNNING")}
    [path] = cache_home.glob("queue-*.json")
    assert path.stat().st_mode & 0o777 == 0o600
    assert cache_home.stat().st_mode & 0o777 == 0o700
    age(cache_home, 16)
    assert Patient().queue(0.0).text == QUEUE.format("RUNNING")
    assert calls(folder) == 2
    assert Patient().queue(time.time() - 60).asked == Patient().queue(0.0).asked


def test_many_processes_ask_once(stand_in: Callable[..., Path], cache_home: Path) -> None:
    folder = stand_in("squeue", f"sleep 0.5; printf '{QUEUE.format('RUNNING')}'")
    program = "from medgen.watch.poll import Patient; print(Patient().queue(0.0).text)"
    processes = [subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    printed = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert printed == {QUEUE.format("RUNNING").strip()}
    assert calls(folder) == 1


def test_a_queue_that_does_not_change_is_asked_less_often(stand_in: Callable[..., Path], cache_home: Path) -> None:
    stand_in("squeue", f"printf '{QUEUE.format('RUNNING')}' | sed \"s/0:10/0:$(date +%N)/\"")  # the clock goes on: no change
    intervals = []
    for _ in range(6):
        intervals.append(Patient().queue(0.0).interval_seconds)
        age(cache_home, 100)
    assert intervals == [15, 22.5, 33.75, 50.625, 60, 60]
    stand_in("squeue", f"printf '{QUEUE.format('COMPLETED')}'")
    assert Patient().queue(0.0).interval_seconds == 15


@pytest.mark.fault("F31")
@pytest.mark.timeout(60)
def test_a_failing_slurm_gives_the_last_answer_and_its_age(stand_in: Callable[..., Path], cache_home: Path, record_property: Callable[[str, object], None]) -> None:
    folder = stand_in("squeue", f"printf '{QUEUE.format('RUNNING')}'")
    first = Patient().queue(0.0)
    age(cache_home, 30)
    stand_in("squeue", "echo 'slurm_load_jobs error: Invalid user' >&2; exit 1")
    answer = Patient().queue(0.0)
    assert (answer.text, answer.asked) == (first.text, pytest.approx((first.asked or 0) - 30))
    assert answer.trouble is not None and "Invalid user" in answer.trouble
    record_property("fired", answer.trouble)
    assert answer.interval_seconds == 30
    assert calls(folder) == 2
    assert Patient().queue(time.time()).trouble == answer.trouble  # not again at once, whatever was submitted
    assert calls(folder) == 2
    age(cache_home, 61)
    stand_in("squeue", f"printf '{QUEUE.format('COMPLETED')}'")
    assert (Patient().queue(0.0).trouble, Patient().queue(0.0).text) == (None, QUEUE.format("COMPLETED"))


def test_what_was_submitted_since_is_asked_for_soon(stand_in: Callable[..., Path], cache_home: Path) -> None:
    folder = stand_in("squeue", f"printf '{QUEUE.format('RUNNING')}'")
    Patient().queue(0.0)
    age(cache_home, 5)
    Patient().queue(time.time() - 60)
    assert calls(folder) == 1
    Patient().queue(time.time())
    assert calls(folder) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"text": 3}', '{"text": "x", "asked": "now"}', '{"text": "", "unknown": 1}', '{"text": "x", "asked": 9e99, "tried": 9e99}'])
def test_a_damaged_cache_is_no_trap(stand_in: Callable[..., Path], cache_home: Path, content: str) -> None:
    """A time to come, from a clock that was set back, counts as old."""
    folder = stand_in("squeue", f"printf '{QUEUE.format('RUNNING')}'")
    Patient().queue(0.0)
    [path] = cache_home.glob("queue-*.json")
    path.write_text(content)
    assert Patient().queue(0.0).text == QUEUE.format("RUNNING")
    assert calls(folder) == 2


def test_a_cache_that_cannot_be_written_costs_only_the_sharing(stand_in: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a_file"))
    folder = stand_in("squeue", f"printf '{QUEUE.format('RUNNING')}'")
    patient = Patient()
    assert patient.queue(0.0).text == patient.queue(0.0).text == QUEUE.format("RUNNING")
    assert calls(folder) == 1


def test_what_was_kept_for_a_month_goes(stand_in: Callable[..., Path], cache_home: Path) -> None:
    stand_in("squeue", f"printf '{QUEUE.format('RUNNING')}'")
    cache_home.mkdir(parents=True)
    old, young = cache_home / "outcomes-0123456789ab.json", cache_home / "accounting-a-0-0123456789ab.json"
    for path, days in ((old, 31), (young, 29)):
        path.write_text("{}")
        os.utime(path, (time.time() - days * 86400,) * 2)
    Patient().queue(0.0)
    assert not old.exists() and young.exists()


def test_clusters_do_not_share_answers(stand_in: Callable[..., Path], cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stand_in("squeue", 'printf "1|N/A|RUNNING|None|1|N/A|0:10|1|%s|medgen.a-0123456789.b.1.0\\n" $SLURM_CONF')
    monkeypatch.setenv("SLURM_CONF", "/one/slurm.conf")
    one = Patient().queue(0.0)
    monkeypatch.setenv("SLURM_CONF", "/other/slurm.conf")
    assert Patient().queue(0.0).text != one.text
    assert calls(folder) == 2


def test_the_accounting_is_asked_once_a_minute_and_only_for_open_ends(stand_in: Callable[..., Path], cache_home: Path) -> None:
    row = "7|TIMEOUT|0:0|1000|2000|900|600|gres/gpu=2|2|1|4G|00:10||n1|None|medgen.a-0.b.1.0"
    folder = stand_in("sacct", f"printf '%s\\n' '{row}' '{row.replace('7|', '8|', 1).replace('TIMEOUT', 'RUNNING')}' '{row.replace('7|', '9|', 1).replace('a-0', 'other-0')}'")
    assert set(Patient().accounting("a-0", {(7, None), (9, None)}, 0.0).rows) == {(7, None), (8, None)}
    Patient().accounting("a-0", {(8, None)}, 0.0)
    assert calls(folder, "sacct") == 1
    age(cache_home, 61, "accounting-a-0")
    Patient().accounting("a-0", {(7, None)}, 0.0)
    assert calls(folder, "sacct") == 1  # how that ended is known for good
    Patient().accounting("a-0", {(7, None), (8, None)}, 0.0)
    assert calls(folder, "sacct") == 2
    age(cache_home, 61, "accounting-a-0")
    Sparing().accounting("a-0", {(11, None)}, 0.0)
    assert calls(folder, "sacct") == 2


@pytest.mark.fault("F30")
@pytest.mark.timeout(60)
def test_no_accounting_is_remembered(stand_in: Callable[..., Path], cache_home: Path, record_property: Callable[[str, object], None]) -> None:
    folder = stand_in("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    answer = Patient().accounting("a-0", {(7, None)}, 0.0)
    assert answer.trouble is not None and "disabled" in answer.trouble
    age(cache_home, 300, "accounting-a-0")
    Patient().accounting("a-0", {(7, None)}, 0.0)
    assert calls(folder, "sacct") == 1
    record_property("fired", answer.trouble)


def test_a_live_screen_does_not_wait_for_slurm(stand_in: Callable[..., Path], cache_home: Path, tmp_path: Path) -> None:
    stand_in("squeue", f"while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; printf '{QUEUE.format('RUNNING')}'")
    source = Impatient()
    assert source.queue(0.0).asked is None
    assert source.queue(0.0).asked is None
    (tmp_path / "go").write_text("")
    deadline = time.monotonic() + 20
    while source.queue(0.0).asked is None:
        assert time.monotonic() < deadline, "the answer never came"
        time.sleep(0.02)
    assert source.queue(0.0).text == QUEUE.format("RUNNING")


# --- through the command line ----------------------------------------------------------------------------------------


@pytest.fixture
def watched(lab: Lab, stand_in: Callable[..., Path], cache_home: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`medgen watch --once` as a user runs it, in a fresh process."""

    def watch(*options: str, expect: int = 4) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "medgen", "watch", str(lab.run.root), "--once", *options]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "130"})
        assert done.returncode == expect, done.stdout + done.stderr
        assert done.stderr == ""
        return done

    return watch


@pytest.mark.fault("F31")
@pytest.mark.timeout(120)
def test_every_second_squeue_fails(lab: Lab, stand_in: Callable[..., Path], watched: Callable[..., Any], cache_home: Path, record_property: Callable[[str, object], None]) -> None:
    """The screen stays and says how old it is; the exit code is that of the run."""
    lab.row("RUNNING", start=-30)
    (cache_home.parent.parent / "answer").write_text(lab.said.lines[0] + "\n")
    folder = stand_in("squeue", f'[ $(($(wc -l < $0.calls) % 2)) = 0 ] && {{ echo "error: no" >&2; exit 1; }}; cat {cache_home.parent.parent}/answer')
    for look in range(4):
        shown = watched().stdout
        assert "running" in shown
        assert ("Slurm has not answered for" in shown) == (look % 2 == 1)
        age(cache_home, 61)
    assert calls(folder) == 4
    record_property("fired", "two of four answers of squeue")


def test_a_machine_without_slurm_shows_what_the_run_folder_tells(lab: Lab, watched: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    lab.started(900)
    lab.ended(600, "failed", 300, "not tried again")
    shown = watched(expect=1).stdout
    assert "failed" in shown and "Slurm has not answered" in shown


def test_once_as_json(lab: Lab, stand_in: Callable[..., Path], watched: Callable[..., Any]) -> None:
    lab.row("PENDING", "Resources", start=600)
    stand_in("squeue", f"printf '%s\\n' '{lab.said.lines[0]}'")
    record = json.loads(watched("--json").stdout)
    task = record["stages"][0]["tasks"][0]
    assert (record["verdict"], record["on_slurm"], task["word"], task["job"], task["reason"]) == ("queued", True, "queued", "71", "next in line, waits for free nodes or GPUs")


def test_a_local_run_asks_slurm_nothing(tmp_path: Path, stand_in: Callable[..., Path], cache_home: Path) -> None:
    folder = stand_in("squeue", "exit 1")
    run, _ = build(tmp_path, STAGES)
    with run.events_file.open("a") as handle:
        handle.write(json.dumps({"time": 1.0, "event": "submitted", "backend": "local", "tasks": 8}) + "\n")
    live.watch(run, once=True)
    assert calls(folder) == 0
    assert not cache_home.exists()


@pytest.mark.fault("F31")
@pytest.mark.timeout(120)
def test_a_slurm_that_hangs_freezes_neither_the_screen_nor_the_keys(lab: Lab, stand_in: Callable[..., Path], record_property: Callable[[str, object], None]) -> None:
    folder = stand_in("squeue", "exec sleep 60")
    lab.started(900)
    lab.beat(5)
    controller, terminal = pty.openpty()
    program = f"import sys; from pathlib import Path; from medgen.rundir import RunDir; from medgen.watch.live import watch; sys.exit(watch(RunDir(Path({str(lab.run.root)!r}))))"
    watcher = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdin=terminal, stdout=terminal, stderr=terminal, env={**os.environ, "TERM": "xterm"})
    os.close(terminal)
    os.set_blocking(controller, False)
    shown = b""

    def has_shown() -> bool:
        nonlocal shown
        with contextlib.suppress(BlockingIOError):
            shown += os.read(controller, 65536)
        return b"q or Ctrl-C leaves" in shown and b"running" in shown and calls(folder) == 1

    wait_until(has_shown)
    os.write(controller, b"q")
    assert watcher.wait(30) == Exit.UNFINISHED
    os.close(controller)
    record_property("fired", "squeue hangs")


def test_exit_codes(lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(live, "Impatient", lambda: lab.said)
    monkeypatch.setattr(live, "read_state", lambda run: Reader(run, lab.said).read())
    lab.started(900)
    lab.ended(600, "interrupted", 300, "cancelled; submit again to go on", "stopped")
    lab.event("cancelled", 500, job_ids=[71, 72, 73], left=0)
    assert (live.watch(lab.run, once=True), live.watch(lab.run)) == (Exit.UNFINISHED, Exit.INTERRUPTED)
    for stage in STAGES:
        for shard in range(int(stage.get("tasks", 1))):  # type: ignore[call-overload]
            lab.outcome("done", stage=str(stage["name"]), shard=shard)
    assert (live.watch(lab.run, once=True), live.watch(lab.run)) == (Exit.DONE, Exit.DONE)
    lab.run.outcome_file("train", 0).unlink()
    lab.ended(500, "failed", 300, "not tried again")
    assert (live.watch(lab.run, once=True), live.watch(lab.run)) == (Exit.FAILED, Exit.FAILED)


def test_the_events_of_a_submission_in_words(lab: Lab) -> None:
    words = {
        "queued as job 71": {"event": "job_submitted", "name": "medgen.x.train.1.0", "job_id": 71},
        "released: jobs 1, 2 may start": {"event": "jobs_released", "job_ids": [1, 2]},
        "taken out of the queue: job 1: queued twice": {"event": "jobs_cancelled", "job_ids": [1], "cause": "queued twice"},
        "jobs 1, 2, 3, 4, 5, 6 and 3 more": {"event": "submission_rolled_back", "job_ids": list(range(1, 10))},
        "cancelled: job 4": {"event": "cancelled", "job_ids": [4], "left": 0},
    }
    for expected, event in words.items():
        assert expected in (live.describe_event({"time": 0.0, **event}) or "")
    assert live.describe_event({"event": "task_started", "time": 0.0}) is None  # damaged


def test_the_newest_of_several_runs_with_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MEDGEN_RUNS", str(tmp_path))
    for number, name in enumerate(("same-1111111111", "same-2222222222", "same-0000000000")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "plan.json").write_text("{}")
        os.utime(tmp_path / name / "plan.json", (number, number))
    assert find_run("same").run_id == "same-0000000000"
    assert capsys.readouterr().err == "same: the newest of 3 runs with this name is same-0000000000; `medgen ls` shows all\n"
    assert find_run("same-1111111111").run_id == "same-1111111111"
    assert capsys.readouterr().err == ""


# --- the screen ------------------------------------------------------------------------------------------------------


def screen(state: RunState, width: int = 150) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(render(state, "q leaves"))
    return console.export_text()


@pytest.mark.parametrize("width", [40, 72, 80, 100, 120, 160, 220])
def test_the_screen_fits_every_width(lab: Lab, width: int) -> None:
    lab.outcome("done")
    lab.started(900, "images", 0)
    lab.beat(5, stage="images", shard=0)
    lab.row("RUNNING", stage="images", element="0", start=-900)
    lab.row("RUNNING", stage="images", element="1", start=-9000)
    lab.row("PENDING", "QOSMaxSubmitJobPerUserLimit", "images", start=9000, element="2-5%2")
    lab.row("PENDING", "Dependency", "report")
    text = screen(lab.state(), width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert all(str(stage["name"]) in text for stage in STAGES)
    if width >= 80:
        assert "━" in text and "4 queued, next about" in text and "after images" in text
    if width >= 120:
        assert "the limit of the QOS on queued jobs" in text and "1 running" in text
    if width >= 160:  # before midnight it says `tomorrow`, too
        assert "the limit of the QOS on queued jobs per user is reached" in text


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Priority", "other jobs come first"),
        ("ReqNodeNotAvail, UnavailableNodes:gpu-[05-08]", "the nodes it asks for are not available: maintenance, down or reserved"),
        ("(Nodes_required_for_job_are_DOWN,_DRAINED_or_reserved)", "the nodes it could use are down, drained or kept for higher priority"),
        ("QOSMaxGRESPerUser", "the limit of the QOS on GPUs per user is reached"),
        ("AssocGrpGRESRunMinutes", "the limit of your account on hours of GPUs is reached"),
        ("QOSMaxWallDurationPerJobLimit", "asks for more time than the QOS allows"),
        ("QOSMinGRES", "asks for fewer GPUs than the QOS wants"),
        ("None", ""),
        ("NobodyKnowsWhat", "NobodyKnowsWhat"),
    ],
)
def test_reasons_in_words(reason: str, words: str) -> None:
    assert reason_in_words(reason) == words


def test_every_reason_of_a_real_slurm_has_words() -> None:
    lines = [line for path in (REPOSITORY / "tests" / "slurm_recorded").glob("squeue-*.txt") for line in path.read_text().splitlines()]
    waiting = {line.split("|")[3] for line in lines if "|PENDING|" in line}
    assert len(waiting) >= 10
    assert all(reason_in_words(reason) not in ("", reason) for reason in waiting)


def test_moments_to_come() -> None:
    noon = time.mktime((2026, 11, 21, 12, 0, 0, 0, 0, -1))
    moments = [clock(noon + seconds, noon) for seconds in (600, 86400, 3 * 86400, 9 * 86400)]
    assert moments == ["12:10", "tomorrow 12:00", "Tue 12:00", "30 Nov"]


GRAPH = {
    "train_seg": [], "train_bravo": [], "masks": ["train_seg"], "collect_masks": ["masks"],
    "images": ["train_bravo", "collect_masks"], "collect_images": ["images"], "report": ["collect_images"],
}  # fmt: skip


def test_the_graph_beside_the_stages() -> None:
    drawn = rails(GRAPH)
    assert [drawn[name].node for name in GRAPH] == ["●  ", "│ ●", "● │", "● │", "●─╯", "●  ", "●  "]
    assert drawn["masks"].below == "│ │"
    assert [rail.node for rail in rails({"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}).values()] == ["●  ", "├─●", "● │", "●─╯"]
    assert [rail.node for rail in rails({"a": [], "b": [], "c": [], "d": ["a", "c"], "e": ["b", "d"]}).values()] == ["●    ", "│ ●  ", "│ │ ●", "●─┼─╯", "●─╯  "]
    assert {rail.node for rail in rails({str(number): [] for number in range(9)} | {"all": [str(number) for number in range(9)]}).values()} == {NODE}


@given(st.lists(st.sets(st.integers(0, 11), max_size=3), min_size=1, max_size=12))
def test_any_graph_can_be_drawn(wanted: list[set[int]]) -> None:
    needs = {str(number): [str(other) for other in sorted(others) if other < number] for number, others in enumerate(wanted)}
    drawn = rails(needs)
    assert list(drawn) == list(needs)
    assert all(rail.node.count(NODE) == 1 for rail in drawn.values())
    assert len({len(rail.node) for rail in drawn.values()}) == 1
    columns = [rail.node.index(NODE) for rail in drawn.values()]
    if len(next(iter(drawn.values())).node) > 1:
        for name, row in zip(needs, drawn.values(), strict=True):
            if needs[name]:  # a line comes in: from above in its own column, or from the side
                mine = columns[int(name)]
                above = drawn[str(int(name) - 1)].below[mine]
                assert above == "│" or "─" in row.node


# --- big runs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def many(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """Six finished shards count as many, and were finished a while ago."""
    monkeypatch.setattr(outcomes, "MANY", 3)
    for shard in range(6):
        made = lab.outcome("done", stage="images", shard=shard)
        os.utime(made.parent, (time.time() - 60, time.time() - 60))
    return lab


def words(lab: Lab) -> list[str]:
    return [task.word for task in lab.state().stages[1].tasks]


def test_what_was_verified_is_remembered_and_still_true(many: Lab, cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert words(many) == ["done"] * 6
    [path] = cache_home.glob("outcomes-*.json")
    assert path.stat().st_mode & 0o777 == 0o600
    with monkeypatch.context() as patched:
        patched.setattr(outcomes.Outcomes, "_read", lambda *_: pytest.fail("read again what has not changed"))
        assert words(many) == ["done"] * 6
    (many.run.shard("images", 1) / "made.bin").unlink()
    (many.run.shard("images", 2) / "made.bin").rename(many.run.shard("images", 2) / "elsewhere.bin")
    many.outcome("failed", stage="images", shard=3, cause="no")
    many.run.outcome_file("images", 4).unlink()
    (many.run.shard("images", 5) / "something_new").write_text("harmless")
    found = words(many)
    assert (found[0], found[5]) == ("done", "done")
    assert "done" not in found[1:5]


def test_a_change_at_the_moment_of_looking_is_not_missed(many: Lab) -> None:
    """Within one tick of its clock a file system gives the same time twice, so a folder just written is looked at again."""
    reader = Reader(many.run, many.said)
    (many.run.shard("images", 0) / "made.bin").unlink()
    made = many.outcome("done", stage="images", shard=0)
    assert reader.read().stages[1].tasks[0].word == "done"
    seen = made.parent.stat().st_mtime_ns
    made.unlink()
    os.utime(made.parent, ns=(seen, seen))
    assert reader.read().stages[1].tasks[0].word != "done"


@pytest.mark.parametrize("content", ["", "{", '{"version": 1}', '{"version": 1, "root": "ROOT", "outcomes": {"images.0.json": [1]}}', '{"version": 99, "root": "ROOT", "outcomes": {}}'])
def test_a_damaged_memory_is_read_anew(many: Lab, cache_home: Path, content: str) -> None:
    words(many)
    [path] = cache_home.glob("outcomes-*.json")
    path.write_text(content.replace("ROOT", str(many.run.root)))
    assert words(many) == ["done"] * 6


def test_a_small_run_writes_nothing_into_the_cache(lab: Lab, cache_home: Path) -> None:
    lab.outcome("done")
    lab.state()
    assert not cache_home.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"status": "done"}', '{"run_id": 1}'])
def test_a_damaged_outcome_counts_for_nothing(lab: Lab, content: str) -> None:
    lab.outcome("done")
    lab.run.outcome_file("train", 0).write_text(content)
    lab.row("RUNNING", start=-30)
    assert lab.task().word == "running"


def test_json_keeps_every_field(lab: Lab) -> None:
    record = json.loads(json.dumps(to_json(lab.state())))
    assert set(record["stages"][0]["tasks"][0]) == set(TaskState.__slots__)


def test_events_are_read_once(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    log = EventLog(run)
    assert log.refresh() == 0
    lines = [json.dumps({"time": number, "event": "x"}) + "\n" for number in range(4)]
    run.events_file.write_text(lines[0] + "not json\n" + lines[1] + '{"time": "soon", "event": "x"}\n[1]\n' + lines[2][:9])
    assert log.refresh() == 2
    with run.events_file.open("a") as handle:
        handle.write(lines[2][9:] + lines[3])
    assert log.refresh() == 2
    assert [record["time"] for record in log.records] == [0, 1, 2, 3]
    assert log.records == run.events()
    run.events_file.write_text(lines[3])
    assert log.refresh() == 1
    assert [record["time"] for record in log.records] == [3]
