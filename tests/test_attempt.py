"""What a job on a cluster decides about itself: done, again, or no more; and whom it tells."""

from __future__ import annotations

import dataclasses
import http.server
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launch_stub import build, events
from rich.console import Console

from medgen import files, plan
from medgen.errors import Exit
from medgen.launch import attempt
from medgen.launch.script import REQUEUE
from medgen.plan import Plan
from medgen.rundir import Heartbeat, Outcome, RunDir
from medgen.watch.state import read_state
from medgen.watch.view import render

HOUR = 3600.0
TRAIN = [{"name": "train", "kind": "train"}]
ONE_OF_TWO = [{"name": "images", "kind": "generate", "tasks": 2}]


def end(run: RunDir, number: int, exit_code: int, seconds: float = 5, job: str = "", stage: str = "train", shard: int = 0) -> int:
    """One attempt from its beginning to its end."""
    attempt.begin(run, stage, shard, number)
    return int(attempt.end(run, stage, shard, number, exit_code, time.time() - seconds, job))


def last(run: RunDir) -> dict[str, Any]:
    return events(run, "task_ended")[-1]


def outcome(run: RunDir, planned: Plan, number: int, status: str, cause: str | None = None, shard: int = 0) -> None:
    task = planned.stages[0].tasks[shard]
    made = run.stage(task.stage) / "made.bin"
    made.parent.mkdir(parents=True, exist_ok=True)
    made.write_text("made")
    now = time.time()
    produced = [run.produced(made)] if status == "done" else []
    run.write_outcome(Outcome(run.run_id, task.stage, shard, task.hash, number, status, cause, "n1", "cpu", 1, now, now, produced))  # type: ignore[arg-type]


def saved(run: RunDir, step: int) -> None:
    """As if a checkpoint had been written."""
    commit = run.checkpoints("train") / f"step-{step:06d}" / "commit.json"
    commit.parent.mkdir(parents=True)
    commit.write_text("{}")


def submit_again(run: RunDir) -> None:
    run.event("submitted", backend="slurm", tasks=1, submission="1")


def test_done_is_what_the_outcome_says_and_nothing_else(tmp_path: Path) -> None:
    run, planned = build(tmp_path, TRAIN)
    outcome(run, planned, 0, "done")
    assert end(run, 0, 137) == Exit.DONE, "a rank was killed after its work"
    (run.stage("train") / "made.bin").unlink()
    assert end(run, 1, 0) == REQUEUE
    assert "no outcome that verifies" in last(run)["cause"]


def test_a_crash_is_tried_once_more_and_each_submit_brings_new_tries(tmp_path: Path) -> None:
    run, _ = build(tmp_path, TRAIN)
    submit_again(run)
    assert [end(run, 0, 1), end(run, 1, 1)] == [REQUEUE, Exit.FAILED]
    assert last(run)["next"] == "not tried again"
    submit_again(run)
    assert end(run, 2, 1) == REQUEUE


def test_wrong_input_is_not_tried_again(tmp_path: Path) -> None:
    run, planned = build(tmp_path, TRAIN)
    outcome(run, planned, 0, "failed", "no such file")
    assert end(run, 0, Exit.BAD_INPUT) == Exit.FAILED
    assert (last(run)["cause"], last(run)["next"]) == ("no such file", "not tried again: the input is wrong")


def test_what_told_its_failure_is_tried_as_often_as_its_kind_deserves(tmp_path: Path) -> None:
    run, planned = build(tmp_path, [{"name": "report", "kind": "report"}])
    assert end(run, 0, 137, stage="report") == REQUEUE, "killed without a word"
    outcome(run, planned, 1, "failed", "it would give the same answer twice")
    assert end(run, 1, 1, stage="report") == Exit.FAILED


def test_a_stop_before_the_limit_goes_on_and_one_at_the_limit_counts_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [time.time()]
    monkeypatch.setattr(time, "time", lambda: clock[0])

    def stopped_after(number: int, seconds: float) -> int:
        attempt.begin(run, "train", 0, number)
        started = clock[0]
        clock[0] += seconds
        saved(run, number + 1)
        return int(attempt.end(run, "train", 0, number, Exit.INTERRUPTED, started, ""))

    run, planned = build(tmp_path, TRAIN)
    files.write_json(run.plan, plan.to_json(dataclasses.replace(planned, stages=[dataclasses.replace(planned.stages[0], segments=2)])))
    submit_again(run)
    limit = planned.stages[0].time_minutes * 60
    assert [stopped_after(number, limit / 3) for number in range(4)] == [REQUEUE] * 4, "preempted as often as it takes"
    assert stopped_after(4, limit - 100) == REQUEUE
    assert stopped_after(5, limit - 100) == Exit.FAILED
    assert last(run)["next"] == "not tried again: its 2 segments are used up; write more segments: or a longer time:, and submit again"


def test_three_attempts_that_end_where_they_began_are_the_last(tmp_path: Path) -> None:
    run, _ = build(tmp_path, TRAIN)
    saved(run, 7)
    submit_again(run)
    assert [end(run, number, Exit.INTERRUPTED) for number in range(2)] == [REQUEUE, REQUEUE]
    saved(run, 8)  # in between it did progress
    assert [end(run, number, Exit.INTERRUPTED) for number in range(2, 5)] == [REQUEUE, REQUEUE, Exit.FAILED]
    assert "no progress in 3 attempts, its checkpoints stand at step 8" in last(run)["next"]


@pytest.mark.parametrize(
    ("job", "cause"),
    [
        ("JobState=COMPLETING Restarts=1", "Slurm took the job back to start it again"),
        ("JobState=COMPLETING Restarts=0", "cancelled with scancel"),
        ("JobState=PENDING Restarts=0", "Slurm put the job back into its queue"),
    ],
)
def test_what_slurm_has_decided_is_not_decided_again(tmp_path: Path, job: str, cause: str) -> None:
    run, _ = build(tmp_path, TRAIN)
    assert end(run, 0, 143, job=job) == Exit.FAILED
    assert (last(run)["status"], last(run)["cause"]) == ("interrupted", cause)


def test_what_has_saved_when_it_is_ended_at_its_limit_goes_on(tmp_path: Path) -> None:
    """The grace was too short for the end of the script, not for the checkpoint; a job that somebody cancels then does not come back."""
    run, planned = build(tmp_path, TRAIN)
    with_stage(run, planned, segments=None)
    for number, words in enumerate(("DUE TO TIME LIMIT ", "")):
        attempt.begin(run, "train", 0, number)
        outcome(run, planned, number, "interrupted", "stopped by SIGUSR2 after step 6; saved, run again to go on")
        saved(run, number + 1)
        run.batch_log("train", 0).parent.mkdir(parents=True, exist_ok=True)
        with run.batch_log("train", 0).open("a") as log:
            log.write(f"medgen: train shard 0 attempt {number} on n1 at 2026-11-21T18:20:53+0000\nslurmstepd: error: *** JOB 58 ON n1 CANCELLED AT 2026-11-21T18:24:12 {words}***\n")
        code = attempt.end(run, "train", 0, number, 143, time.time() - planned.stages[0].time_minutes * 60, "JobState=COMPLETING Restarts=0")
        assert code == (Exit.FAILED if number else REQUEUE)
    assert [end["next"] for end in events(run, "task_ended")] == ["goes on from what it saved", "not tried again: write more segments: or a longer time:, and submit again"]


def test_an_attempt_that_nobody_saw_the_end_of_is_ended_by_the_next(tmp_path: Path) -> None:
    run, _ = build(tmp_path, TRAIN)
    attempt.begin(run, "train", 0, 0)
    attempt.begin(run, "train", 0, 1)
    assert (last(run)["attempt"], last(run)["status"]) == (0, "interrupted")
    assert "Slurm took the job away" in last(run)["cause"]
    planned = plan.read(run)
    now, limit_seconds = time.time(), planned.stages[0].time_minutes * 60
    run.write_heartbeat(Heartbeat("train", 0, 1, 5, 9, "steps", None, now + limit_seconds, "n1", 1))
    attempt.begin(run, "train", 0, 2)
    assert "met its time limit before it could save" in last(run)["cause"] and last(run)["cause_kind"] == "TIMEOUT"


def test_a_job_that_is_lost_again_and_again_is_given_up(tmp_path: Path) -> None:
    """A training that brings down its node would be started again for ever; another submit may try anew."""
    run, _ = build(tmp_path, [*TRAIN, *ONE_OF_TWO])
    submit_again(run)
    assert [attempt.begin(run, "train", 0, number) for number in range(4)] == [0, 0, 0, Exit.FAILED]
    assert "no progress in 3 attempts" in last(run)["next"] and not last(run)["again"]
    submit_again(run)
    assert attempt.begin(run, "train", 0, 3) == 0
    assert [attempt.begin(run, "images", 0, number) for number in range(7)] == [0] * 6 + [Exit.FAILED]
    for number in range(7):
        assert attempt.begin(run, "images", 1, number) == 0, "Slurm says that it was preempted, and that has no budget"
        log = run.batch_log("images", 1)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as lines:
            lines.write(f"medgen: images shard 1 attempt {number} on n1 at 2026-11-21T18:20:53+0000\nslurmstepd: error: *** JOB 58 ON n1 CANCELLED AT 2026-11-21T18:24:12 DUE TO PREEMPTION ***\n")
    assert len(events(run, "task_started")) == 3 + 1 + 6 + 7


class Inbox(http.server.BaseHTTPRequestHandler):
    received: list[dict[str, Any]]

    def do_POST(self) -> None:
        self.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet."""


@pytest.fixture
def inbox() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of a web server on this machine, and what it was sent."""
    Inbox.received = []
    server = http.server.HTTPServer(("127.0.0.1", 0), Inbox)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/hook", Inbox.received
    server.shutdown()


def test_people_are_told_of_the_end_and_of_a_failure_for_good(
    tmp_path: Path, inbox: tuple[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, received = inbox
    monkeypatch.setenv("CHAT_HOOK", address)
    run, planned = build(tmp_path, ONE_OF_TWO)
    told = tmp_path / "told"
    notify = {"mail": None, "webhook": "CHAT_HOOK", "command": f'echo "$MEDGEN_EVENT: $MEDGEN_TEXT" >> {told}', "on": ["end", "fail"]}
    files.write_json(run.plan, plan.to_json(dataclasses.replace(planned, place=dataclasses.replace(planned.place, notify=notify))))
    submit_again(run)
    outcome(run, planned, 0, "done", shard=0)
    end(run, 0, 0, stage="images", shard=0)
    end(run, 0, 1, stage="images", shard=1)
    assert not told.exists() and not received, "the other shard is not done, and this one will be tried again"
    end(run, 1, 1, stage="images", shard=1)
    assert "images shard 1 failed" in received[0]["text"]
    outcome(run, planned, 2, "done", shard=1)
    end(run, 2, 0, stage="images", shard=1)
    assert [line.split(":")[0] for line in told.read_text().splitlines()] == ["fail", "end"]
    assert [message["event"] for message in received] == ["fail", "end"]
    assert not [event for event in events(run, "notified") if event["problems"]]


def test_a_message_that_cannot_be_sent_is_told_and_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHAT_HOOK", raising=False)
    run, planned = build(tmp_path, TRAIN)
    notify = {"mail": None, "webhook": "CHAT_HOOK", "command": "exit 3", "on": ["fail"]}
    files.write_json(run.plan, plan.to_json(dataclasses.replace(planned, place=dataclasses.replace(planned.place, notify=notify))))
    assert end(run, 0, Exit.BAD_INPUT) == Exit.FAILED
    [event] = events(run, "notified")
    assert event["problems"] == ["command: CalledProcessError", "webhook: the variable CHAT_HOOK is not set in the job; put it into the site's secrets file"]


# --- budgets by cause --------------------------------------------------------------------------------------------------


def said(run: RunDir, number: int, text: str, stage: str = "train", shard: int = 0) -> None:
    """The last words in the log of the first rank."""
    log = run.log(stage, shard, 0, number)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(text + "\n")


def with_stage(run: RunDir, planned: Plan, **changes: Any) -> Plan:
    """The same run with other facts about its only stage."""
    changed = dataclasses.replace(planned, stages=[dataclasses.replace(planned.stages[0], **changes)])
    files.write_json(run.plan, plan.to_json(changed))
    return changed


def test_too_little_memory_is_tried_once_more_with_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, planned = build(tmp_path, TRAIN)
    with_stage(run, planned, mem_mebibytes=4000)
    submit_again(run)
    for number in range(2):
        said(run, number, "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=3.0")
    assert end(run, 0, 137) == REQUEUE
    assert capsys.readouterr().out == "MinMemoryNode=6000\n", "what scontrol update is to change"
    assert (last(run)["cause_kind"], last(run)["next"]) == ("OOM", "will be tried again with 6000 MiB of memory instead of 4000")
    assert run.read_relief("train", 0).mem_mebibytes == 6000
    assert end(run, 1, 137) == Exit.FAILED
    assert last(run)["next"] == "not tried again: it had too little memory twice"


def test_too_little_gpu_memory_is_tried_once_more_with_smaller_micro_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, planned = build(tmp_path, TRAIN)
    with_stage(run, planned, mem_mebibytes=4000)
    submit_again(run)
    said(run, 0, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")
    assert end(run, 0, 1) == REQUEUE
    assert (run.read_relief("train", 0).micro_batch_divisor, run.read_relief("train", 0).mem_mebibytes) == (2, None)
    assert "the global batch stays the same" in last(run)["next"] and not capsys.readouterr().out


def test_sigkill_without_a_word_is_a_crash_and_asks_for_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, planned = build(tmp_path, TRAIN)
    with_stage(run, planned, mem_mebibytes=4000)
    submit_again(run)
    assert end(run, 0, 137) == REQUEUE
    assert not capsys.readouterr().out and run.read_relief("train", 0).mem_mebibytes is None
    saved(run, 5)
    assert end(run, 1, 137) == REQUEUE, "the first since the newest checkpoint"
    assert end(run, 2, 137) == Exit.FAILED, "a crash counts as one, whatever is most often behind it"
    submit_again(run)
    assert end(run, 3, 137) == REQUEUE
    said(run, 4, "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=3.0")
    saved(run, 6)
    assert end(run, 4, 137) == REQUEUE, "the first time that it is known to be too little memory"


def test_a_full_disk_is_not_tried_again(tmp_path: Path) -> None:
    run, planned = build(tmp_path, TRAIN)
    outcome(run, planned, 0, "failed", "ckpt/step-000004: the disk is full; free some space and submit again")
    assert end(run, 0, 1) == Exit.FAILED
    assert (last(run)["status"], last(run)["cause_kind"]) == ("refused", "DISK_FULL")


def test_a_broken_node_is_remembered_and_left_for_others(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from medgen.launch import nodes

    run, planned = build(tmp_path, TRAIN)
    submit_again(run)
    for number in range(3):
        monkeypatch.setenv("SLURMD_NODENAME", f"n{number}")
        outcome(run, planned, number, "failed", f"no GPU can be used on n{number}, although the job was given 0: the node or its driver is broken")
        job = "JobState=RUNNING ExcNodeList=(null)" if number == 0 else "JobState=RUNNING ExcNodeList=n0"
        assert end(run, number, 1, job=job) == (REQUEUE if number < 2 else Exit.FAILED)
    assert capsys.readouterr().out.splitlines() == ["ExcNodeList=n0", "ExcNodeList=n0,n1"]
    assert [entry.node for entry in nodes.believed(run.cache)] == ["n0", "n1", "n2"]
    assert nodes.believed(run.cache)[0].reason.startswith("no GPU can be used on n0")
    nodes.forget(run.cache, "n0")
    assert [entry.node for entry in nodes.believed(run.cache)] == ["n1", "n2"]


def test_preemption_has_no_budget_of_its_own(tmp_path: Path) -> None:
    run, _ = build(tmp_path, ONE_OF_TWO)
    submit_again(run)
    for number in range(9):
        assert end(run, number, Exit.INTERRUPTED, stage="images", job="JobState=RUNNING PreemptTime=2026-11-21T17:00:00") == REQUEUE
    assert last(run)["cause_kind"] == "PREEMPTED"
    assert [end(run, number, Exit.INTERRUPTED, stage="images", job="JobState=RUNNING PreemptTime=None") for number in range(9, 11)] == [Exit.FAILED] * 2


def test_a_training_meets_its_limit_as_often_as_it_progresses(tmp_path: Path) -> None:
    run, planned = build(tmp_path, TRAIN)
    with_stage(run, planned, segments=None)
    submit_again(run)
    for number in range(6):
        saved(run, number + 1)
        attempt.begin(run, "train", 0, number)
        saved(run, number + 100)
        assert attempt.end(run, "train", 0, number, Exit.INTERRUPTED, time.time() - planned.stages[0].time_minutes * 60, "") == REQUEUE
    assert last(run)["cause_kind"] == "TIMEOUT"


def test_what_cannot_save_in_the_middle_is_not_started_again_at_its_limit(tmp_path: Path) -> None:
    run, planned = build(tmp_path, ONE_OF_TWO)
    attempt.begin(run, "images", 0, 0)
    assert attempt.end(run, "images", 0, 0, Exit.INTERRUPTED, time.time() - planned.stages[0].time_minutes * 60, "") == Exit.FAILED
    assert "a longer time: or more shards:" in last(run)["next"]


def test_jobs_of_a_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The first meets its limit, the second finishes, the third has nothing to do."""
    from medgen.launch.script import ENOUGH, Chunk, job_name

    run, planned = build(tmp_path, TRAIN)
    planned = with_stage(run, planned, segments=3, chain=3)
    submit_again(run)

    def segment(number: int) -> None:
        monkeypatch.setenv("SLURM_JOB_NAME", job_name(run, "train", Chunk(1, 0, None, number)))

    segment(1)
    attempt.begin(run, "train", 0, 0)
    saved(run, 5)
    assert attempt.end(run, "train", 0, 0, Exit.INTERRUPTED, time.time() - planned.stages[0].time_minutes * 60, "") == Exit.FAILED
    assert last(run)["next"] == "the next job of its chain goes on from what it saved (2 left)"
    segment(2)
    assert attempt.begin(run, "train", 0, 1) == 0
    outcome(run, planned, 1, "done")
    assert attempt.end(run, "train", 0, 1, 0, time.time(), "") == Exit.DONE
    segment(3)
    assert attempt.begin(run, "train", 0, 2) == ENOUGH
    assert len(events(run, "task_started")) == 2


def test_a_chain_that_is_used_up_says_why_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if one of its jobs ended before its limit."""
    from medgen.launch.script import Chunk, job_name

    run, planned = build(tmp_path, TRAIN)
    planned = with_stage(run, planned, segments=2, chain=2)
    submit_again(run)
    for number in range(2):  # the first is lost
        monkeypatch.setenv("SLURM_JOB_NAME", job_name(run, "train", Chunk(1, 0, None, number + 1)))
        assert attempt.begin(run, "train", 0, number) == 0
        saved(run, number + 1)
    outcome(run, planned, 1, "interrupted", "stopped by SIGUSR2 after step 2; saved")
    assert attempt.end(run, "train", 0, 1, Exit.INTERRUPTED, time.time() - planned.stages[0].limit_seconds + 100, "") == Exit.FAILED
    task = read_state(run).stages[0].tasks[0]
    why = "stopped by SIGUSR2 after step 2; saved; not tried again: its 2 segments are used up; write more segments: or a longer time:, and submit again"
    assert (task.word, task.cause) == ("interrupted", why)
    console = Console(width=200, file=io.StringIO(), color_system=None)
    console.print(render(read_state(run)))
    assert why in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_chain_that_was_given_up_is_not_taken_up_by_its_next_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medgen.launch.script import Chunk, job_name

    run, planned = build(tmp_path, TRAIN)
    planned = with_stage(run, planned, segments=3, chain=3)
    monkeypatch.setenv("SLURM_JOB_NAME", job_name(run, "train", Chunk(1, 0, None, 1)))
    outcome(run, planned, 0, "failed", "no such file")
    assert end(run, 0, Exit.BAD_INPUT) == Exit.FAILED
    monkeypatch.setenv("SLURM_JOB_NAME", job_name(run, "train", Chunk(1, 0, None, 2)))
    assert attempt.begin(run, "train", 0, 1) == Exit.FAILED


def test_crashes_count_from_the_newest_checkpoint(tmp_path: Path) -> None:
    """A crash on Monday and one on Friday do not end a week."""
    run, _ = build(tmp_path, TRAIN)
    submit_again(run)
    for number in range(5):
        attempt.begin(run, "train", 0, number)
        saved(run, number + 1)
        assert attempt.end(run, "train", 0, number, 1, time.time(), "") == REQUEUE
    assert [end(run, 5, 1), end(run, 6, 1)] == [REQUEUE, Exit.FAILED], "no newer one"


def test_people_are_told_when_a_training_is_given_up_without_having_failed(tmp_path: Path) -> None:
    run, planned = build(tmp_path, TRAIN)
    told = tmp_path / "told"
    notify = {"mail": None, "webhook": None, "command": f'echo "$MEDGEN_TEXT" >> {told}', "on": ["fail"]}
    files.write_json(run.plan, plan.to_json(dataclasses.replace(planned, place=dataclasses.replace(planned.place, notify=notify))))
    submit_again(run)
    for number in range(3):
        assert not told.exists()
        end(run, number, Exit.INTERRUPTED)
    assert "train interrupted" in told.read_text() and "no progress in 3 attempts" in told.read_text()


def test_a_node_that_cannot_be_remembered_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, planned = build(tmp_path, TRAIN)
    submit_again(run)
    monkeypatch.setenv("SLURMD_NODENAME", "a name with spaces")
    outcome(run, planned, 0, "failed", "no GPU can be used on it, although the job was given 0: the node or its driver is broken")
    assert end(run, 0, 1) == REQUEUE


def test_people_are_told_of_a_chain_that_is_given_up_and_not_of_one_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medgen.launch.script import Chunk, job_name

    run, planned = build(tmp_path, TRAIN)
    told = tmp_path / "told"
    notify = {"mail": None, "webhook": None, "command": f'echo "$MEDGEN_TEXT" >> {told}', "on": ["fail"]}
    planned = with_stage(run, dataclasses.replace(planned, place=dataclasses.replace(planned.place, notify=notify)), segments=3, chain=3)
    monkeypatch.setenv("SLURM_JOB_NAME", job_name(run, "train", Chunk(1, 0, None, 1)))
    attempt.begin(run, "train", 0, 0)
    saved(run, 5)
    attempt.end(run, "train", 0, 0, Exit.INTERRUPTED, time.time() - planned.stages[0].time_minutes * 60, "")
    assert not told.exists(), "the next job goes on"
    monkeypatch.setenv("SLURM_JOB_NAME", job_name(run, "train", Chunk(1, 0, None, 2)))
    outcome(run, planned, 1, "failed", "no such file")
    assert end(run, 1, Exit.BAD_INPUT) == Exit.FAILED
    assert "no such file" in told.read_text()
