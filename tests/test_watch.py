"""What watch says about a run: the truth order, and the screen."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import launch_stub
import pytest
from launch_stub import REPOSITORY, build, wait_until
from rich.console import Console
from seeing import write_beat, write_rank_beat

from medgen import plan
from medgen.errors import Exit
from medgen.launch.local import LocalBackend
from medgen.launch.supervisor import register, retire
from medgen.launch.tries import read_tries, seconds_busy
from medgen.rundir import Heartbeat, Outcome, RankBeat, RunDir
from medgen.stop import StopFlag
from medgen.task import Work
from medgen.watch.live import describe_event, list_runs, watch
from medgen.watch.state import RunState, StageState, read_state, to_json
from medgen.watch.view import duration, percent, render, runs_table

STAGES = [
    {"name": "train", "kind": "train"},
    {"name": "images", "kind": "generate", "tasks": 4, "needs": ["train"]},
    {"name": "collect_images", "kind": "collect", "needs": ["images"], "of": "images"},
    {"name": "report", "kind": "report", "needs": ["train", "images", "collect_images"]},
]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made, _ = build(tmp_path, STAGES)
    return made


def event(run: RunDir, kind: str, seconds_ago: float, **facts: Any) -> None:
    with run.events_file.open("a") as handle:
        handle.write(json.dumps({"time": time.time() - seconds_ago, "event": kind, "host": "here", **facts}) + "\n")


def started(run: RunDir, seconds_ago: float, stage: str = "train", shard: int = 0, attempt: int = 0, from_step: int = 0, devices: int = 1) -> None:
    event(run, "task_started", seconds_ago, stage=stage, shard=shard, attempt=attempt, devices=devices, from_step=from_step)


def ended(run: RunDir, status: str, seconds: float, stage: str = "train", shard: int = 0, attempt: int = 0, next_action: str = "not tried again", cause: str | None = None) -> None:
    event(run, "task_ended", 0, stage=stage, shard=shard, attempt=attempt, status=status, cause=cause, seconds=seconds, next=next_action, again=next_action.startswith(("will be tried again", "goes on")))


def beat(run: RunDir, step: int, seconds_ago: float = 0, stage: str = "train", shard: int = 0, attempt: int = 0) -> None:
    write_beat(run, Heartbeat(stage, shard, attempt, step, 100, "steps", 0.25, time.time() - seconds_ago, "here", 1))


def outcome(run: RunDir, status: Any, stage: str = "train", shard: int = 0, attempt: int = 0, task_hash: str | None = None, cause: str | None = None) -> None:
    now = time.time()
    made = run.stage(stage) / f"{shard}.bin"
    made.parent.mkdir(exist_ok=True)
    made.write_text("x")
    run.write_outcome(
        Outcome(run.run_id, stage, shard, task_hash or f"{stage}{shard}", attempt, status, cause, "here", "cpu", 1, now - 36, now, [run.produced(made)])
    )


def stage_of(run: RunDir, name: str = "train") -> StageState:
    return next(stage for stage in read_state(run).stages if stage.name == name)


def screen(state: RunState, width: int = 130) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(render(state))
    return console.export_text()


def test_nothing_has_started(run: RunDir) -> None:
    state = read_state(run)
    assert state.verdict == "not started"
    assert {stage.word for stage in state.stages} == {"pending"}
    assert state.stages[3].waits_for == ["collect_images"]  # the rest is implied


def test_a_verified_outcome_beats_everything_else(run: RunDir) -> None:
    started(run, 50)
    ended(run, "failed", 40)
    outcome(run, "done")
    assert stage_of(run).word == "done"
    (run.stage("train") / "0.bin").unlink()
    assert stage_of(run).word == "failed"


def test_an_outcome_of_another_plan_counts_for_nothing(run: RunDir) -> None:
    outcome(run, "done", task_hash="of-another-plan")
    assert stage_of(run).word == "pending"


def test_exit_0_without_outcome_is_not_done(run: RunDir) -> None:
    started(run, 50)
    ended(run, "failed", 50, cause="exit code 0, but no outcome that verifies")
    assert stage_of(run).word == "failed"
    assert read_state(run).verdict == "failed"


def test_running_stalled_and_lost(run: RunDir) -> None:
    register(run, False)
    started(run, 200)
    assert stage_of(run).word == "running"  # no heartbeat yet: it imports and reads data
    beat(run, 10, seconds_ago=5)
    assert stage_of(run).word == "running"
    beat(run, 10, seconds_ago=61)
    assert stage_of(run).word == "stalled"
    retire(run)
    state = read_state(run)
    assert state.stages[0].word == "interrupted"
    assert state.stages[0].tasks[0].cause == "its supervisor ended without a word"
    assert state.verdict == "interrupted"
    assert 135 < state.stages[0].seconds < 145  # up to its last heartbeat


def test_stopping_is_shown_until_it_is_over(run: RunDir) -> None:
    register(run, False)
    event(run, "submitted", 60, tasks=1)
    started(run, 50)
    event(run, "stopping", 1)
    assert read_state(run).verdict == "stopping"
    assert "A second Ctrl-C kills them" in screen(read_state(run))
    retire(run)
    assert read_state(run).verdict == "interrupted"
    register(run, False)
    event(run, "submitted", 0, tasks=1)
    assert read_state(run).verdict == "running"


def test_a_supervisor_record_of_a_dead_process_does_not_count(run: RunDir) -> None:
    register(run, False)
    record = json.loads(run.supervisor.read_text())
    run.supervisor.write_text(json.dumps({**record, "start_ticks": record["start_ticks"] + 1}))
    assert read_state(run).where is None


def test_a_heartbeat_tells_when_the_step_last_advanced(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan.read(run)
    work = Work(run, planned, planned.stages[0], planned.stages[0].tasks[0], 0, StopFlag(), is_main=True)
    told = []
    for moment, step in ((100.0, 1), (200.0, 1), (300.0, 2), (400.0, 2)):
        monkeypatch.setattr(time, "time", lambda moment=moment: moment)
        work.progress(step, 9, "steps")
        work.heartbeat()
        beat_now = run.read_heartbeat("train", 0)
        assert beat_now is not None
        told.append((beat_now.time, beat_now.advanced))
    assert told == [(100, 100), (200, 100), (300, 300), (400, 300)]


def test_a_stage_started_by_hand_is_seen_by_its_heartbeat(run: RunDir) -> None:
    beat(run, 50)
    state = read_state(run)
    assert state.stages[0].word == "running"
    assert state.verdict == "running"


def test_a_task_that_comes_back_is_pending(run: RunDir) -> None:
    register(run, False)
    started(run, 50)
    ended(run, "failed", 50, next_action="will be tried again", cause="exit code 1")
    assert stage_of(run).word == "pending"
    retire(run)
    assert stage_of(run).word == "failed"


def test_an_old_heartbeat_is_not_that_of_the_new_attempt(run: RunDir) -> None:
    register(run, False)
    started(run, 300)
    ended(run, "interrupted", 100, next_action="goes on")
    beat(run, 60, seconds_ago=200)
    started(run, 10, attempt=1, from_step=60)
    stage = stage_of(run)
    assert stage.word == "running"
    assert stage.tasks[0].step == 0


def test_failure_blocks_what_needs_it(run: RunDir) -> None:
    started(run, 50)
    ended(run, "failed", 50, cause="exit code 1: ValueError: no")
    log = run.log("train", 0, 0, 0)
    log.parent.mkdir(parents=True)
    log.write_text("one\ntwo\nValueError: no\n")
    state = read_state(run)
    assert [stage.word for stage in state.stages] == ["failed", "blocked", "blocked", "blocked"]
    text = screen(state)
    for part in ("failed", "exit code 1: ValueError: no", "r0.a0.log", "│ two", "needs train", "goes on from here"):
        assert part in text


def test_the_guilty_rank_is_the_one_srun_named(run: RunDir) -> None:
    started(run, 50)
    ended(run, "failed", 50, cause="exit code 1")
    for rank in range(2):
        run.log("train", 0, rank, 0).parent.mkdir(parents=True, exist_ok=True)
        run.log("train", 0, rank, 0).write_text(f"rank {rank} speaks\n")
    run.batch_log("train", 0).write_text("medgen: train shard 0 attempt 0 on here at now\nsrun: error: n1: task 1: Exited with exit code 1\n")
    assert stage_of(run).tasks[0].last_lines == ["rank 1 speaks"]


def test_progress_eta_and_hours(run: RunDir) -> None:
    register(run, False)
    started(run, 100, from_step=20, devices=4)
    beat(run, 60)
    state = read_state(run)
    stage = state.stages[0]
    assert stage.fraction == 0.6
    assert stage.eta_seconds == pytest.approx(100, abs=3)  # 40 steps took 100 s
    assert state.device_hours == pytest.approx(4 * 100 / 3600, rel=0.05)
    assert state.seconds == pytest.approx(100, abs=2)


def test_hours_of_failed_attempts_count(run: RunDir) -> None:
    started(run, 7200)
    ended(run, "failed", 3600)
    started(run, 3600, attempt=1)
    ended(run, "done", 1800, attempt=1)
    outcome(run, "done", attempt=1)
    assert read_state(run).device_hours == pytest.approx(1.5)


def test_shards(run: RunDir) -> None:
    register(run, False)
    for shard in range(3):
        started(run, 30, "images", shard)
    for shard in range(2):
        ended(run, "done", 10, "images", shard)
        outcome(run, "done", "images", shard)
    beat(run, 50, stage="images", shard=2)
    stage = stage_of(run, "images")
    assert stage.counts == {"done": 2, "running": 1, "pending": 1}
    assert stage.fraction == pytest.approx(2.5 / 4)
    assert stage.eta_seconds == pytest.approx(15)
    assert "2/4 shards" in screen(read_state(run))


@pytest.mark.parametrize("width", [60, 80, 107, 108, 200])
def test_the_screen_fits_every_width(run: RunDir, width: int) -> None:
    test_shards(run)
    text = screen(read_state(run), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert all(stage["name"] in text for stage in STAGES)


def test_json_is_json(run: RunDir) -> None:
    test_shards(run)
    assert json.loads(json.dumps(to_json(read_state(run))))["stages"][1]["counts"]["done"] == 2


def test_once_has_an_exit_code(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert watch(run, once=True) == Exit.UNFINISHED
    started(run, 10)
    ended(run, "failed", 10, cause="x")
    assert watch(run, once=True, as_json=True) == Exit.FAILED
    for stage in read_state(run).stages:
        for task in stage.tasks:
            outcome(run, "done", stage.name, task.shard)
    capsys.readouterr()
    assert watch(run, once=True) == Exit.DONE
    assert "Report:" in capsys.readouterr().out


def test_reading_changes_nothing(run: RunDir) -> None:
    test_shards(run)
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}
    read_state(run)
    assert before == {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}


def test_every_event_of_a_real_run_has_words(tmp_path: Path) -> None:
    run, plan = build(tmp_path, STAGES, {"train": {"crashes": 1}, "collect_images": {"told_failures": 9}})
    LocalBackend(2, 0, python=launch_stub.interpreter(tmp_path)).submit(run, plan)
    lines = [describe_event(event) for event in run.events()]
    assert None not in lines
    text = "\n".join(line or "" for line in lines)
    for part in ("train shard 0: failed: exit code 1", "will be tried again", "done in", "report: not started, because collect_images failed", "ended; failed: collect_images"):
        assert part in text


def test_list_of_runs(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MEDGEN_RUNS", str(tmp_path))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "plan.json").write_text("{")
    assert list_runs() == Exit.DONE
    printed = capsys.readouterr()
    assert run.run_id in printed.out
    assert "broken" in printed.err
    list_runs(as_json=True)
    [record] = json.loads(capsys.readouterr().out)
    assert record["verdict"] == "not started"
    assert runs_table([read_state(run)], time.time())


def test_no_runs_yet_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MEDGEN_RUNS", str(tmp_path))
    list_runs()
    assert "no runs in" in capsys.readouterr().out


@pytest.mark.parametrize("key", [b"q", b"\x03"])
def test_leaving_the_live_screen_leaves_the_jobs_alone(run: RunDir, key: bytes) -> None:
    register(run, False)
    started(run, 10)
    controller, terminal = pty.openpty()
    program = f"import sys; from pathlib import Path; from medgen.rundir import RunDir; from medgen.watch.live import watch; sys.exit(watch(RunDir(Path({str(run.root)!r}))))"
    watcher = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0), env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    os.set_blocking(controller, False)

    def has_shown() -> bool:
        nonlocal shown
        with contextlib.suppress(BlockingIOError):
            shown += os.read(controller, 65536)
        return b"q or Ctrl-C leaves" in shown

    wait_until(has_shown)
    os.write(controller, key)
    assert watcher.wait(10) == Exit.UNFINISHED
    os.close(controller)


def test_numbers_in_words() -> None:
    assert [duration(seconds) for seconds in (0, 59.4, 185, 7800, 273600)] == ["0s", "59s", "3m 05s", "2h 10m", "3d 4h"]
    assert [percent(fraction) for fraction in (0, 0.999, 1.0, 0.29)] == ["0%", "99%", "100%", "29%"]
    assert seconds_busy([(0, 10), (5, 20), (30, 31)]) == 21


def test_an_end_belongs_to_its_own_attempt_however_late_it_is_told(run: RunDir) -> None:
    started(run, 100)
    started(run, 50, attempt=1)
    ended(run, "interrupted", 40, next_action="goes on from what it saved", cause="told late")
    event(run, "requeue_refused", 0, stage="train", shard=0, attempt=0)
    first, second = read_tries(run.events())["train", 0]
    assert (first.status, first.cause, first.comes_back) == ("interrupted", "told late", False)
    assert second.ended is None


# --- a task of several ranks -----------------------------------------------------------------------------------------


@pytest.fixture
def ranks(tmp_path: Path) -> RunDir:
    """A training of three ranks that has run for an hour."""
    made, _ = build(tmp_path, [{"name": "train", "kind": "train", "ranks": 3}])
    register(made, False)
    started(made, 3600)
    return made


def rank_beats(run: RunDir, doing: tuple[str, str, str], seconds_ago: tuple[float, float, float] = (2, 2, 2), still_seconds: float = 2, slow: list[tuple[int, float]] | None = None) -> None:
    now = time.time()
    advanced = now - still_seconds
    write_beat(run, Heartbeat("train", 0, 0, 512, 900, "steps", 0.25, now - seconds_ago[0], "n0", 10, advanced, doing[0], slow or []))
    for rank in (1, 2):
        write_rank_beat(run, RankBeat(rank, 0, 512, advanced, doing[rank], now - seconds_ago[rank], f"n{rank}", 10 + rank))


def test_ranks_that_are_well_are_listed_and_not_spoken_of(ranks: RunDir) -> None:
    rank_beats(ranks, ("computing a step", "exchanging gradients", "reading data"))
    task = stage_of(ranks).tasks[0]
    assert (task.word, task.cause, task.note) == ("running", None, None)
    assert [(item["rank"], item["host"], item["pid"], item["step"], item["doing"]) for item in task.ranks] == [
        (0, "n0", 10, 512, "computing a step"), (1, "n1", 11, 512, "exchanging gradients"), (2, "n2", 12, 512, "reading data"),
    ]  # fmt: skip
    assert "rank" not in screen(read_state(ranks))


def test_a_slow_rank_runs_and_is_named(ranks: RunDir) -> None:
    rank_beats(ranks, ("computing a step", "exchanging gradients", "reading data"), slow=[(2, 2.4)])
    task = stage_of(ranks).tasks[0]
    assert (task.word, task.note) == ("running", "rank 2 on n2 is 2.4 times slower than the others")
    assert task.ranks[2]["times_slower"] == 2.4 and task.ranks[1]["times_slower"] is None
    assert "rank 2 on n2 is 2.4 times slower than the others" in screen(read_state(ranks))
    assert json.loads(json.dumps(to_json(read_state(ranks))))["stages"][0]["tasks"][0]["note"] == task.note


@pytest.mark.parametrize(("doing", "told"), [
    (("exchanging gradients", "waiting for the others", "reading data"), "rank 2 on n2 stands at reading data, and the others wait for it"),
    (("saving", "waiting for the others", "waiting for the others"), "rank 0 on n0 stands at saving, and the others wait for it"),
    (("waiting for the others",) * 3, "all 3 ranks stand at the same place, waiting for the others"),
])  # fmt: skip
def test_a_training_that_stands_says_who_stands_where(ranks: RunDir, doing: tuple[str, str, str], told: str) -> None:
    rank_beats(ranks, doing, still_seconds=2400)
    task = stage_of(ranks).tasks[0]
    assert task.word == "stalled" and task.cause is not None
    assert "it lives, but has stood at 512 of 900 steps for 40m 00s: " + told in task.cause and "`medgen cancel`" in task.cause


def test_a_silent_rank_is_stalled_then_lost_and_named_with_its_node(ranks: RunDir) -> None:
    doing = ("exchanging gradients", "exchanging gradients", "reading data")
    rank_beats(ranks, doing, (2, 2, 130), still_seconds=129)
    task = stage_of(ranks).tasks[0]
    assert task.word == "stalled" and task.cause is not None
    assert "nothing was heard of rank 2 on n2 for 2m 10s; last heard of at step 512, reading data; the others live" in task.cause
    rank_beats(ranks, doing, (2, 2, 400), still_seconds=399)
    assert stage_of(ranks).tasks[0].word == "lost"


def test_a_rank_whose_beats_come_late_is_not_silent_while_the_training_advances(ranks: RunDir) -> None:
    rank_beats(ranks, ("exchanging gradients", "exchanging gradients", "reading data"), (2, 2, 400), still_seconds=3)
    assert stage_of(ranks).tasks[0].word == "running"


def test_a_silent_rank_0_is_told_from_a_dead_job_by_the_others(ranks: RunDir) -> None:
    rank_beats(ranks, ("reading data", "exchanging gradients", "exchanging gradients"), (100, 2, 2), still_seconds=99)
    task = stage_of(ranks).tasks[0]
    assert task.word == "stalled" and task.cause is not None
    assert task.cause.endswith("of rank 0 on n0, last heard of at step 512, reading data; the others live")


def test_beats_of_an_earlier_attempt_or_damaged_ones_count_for_nothing(ranks: RunDir) -> None:
    rank_beats(ranks, ("computing a step",) * 3)
    ranks.rank_beat_file("train", 0, 1).write_text('{"rank": ')
    ranks.write_rank_beat("train", 0, RankBeat(2, 7, 512, 0.0, "reading data", 0.0, "n2", 12))
    task = stage_of(ranks).tasks[0]
    assert task.word == "running" and [item["rank"] for item in task.ranks] == [0]


def test_a_task_that_was_killed_with_its_supervisor_is_seen_at_once(tmp_path: Path) -> None:
    """Its last heartbeat is a moment old, and its process is gone: no minute in which it is said to run."""
    run, _ = build(tmp_path, [{"name": "train", "kind": "train"}])
    started(run, 60)
    living = subprocess.Popen(["sleep", "60"])
    write_beat(run, Heartbeat("train", 0, 0, 5, 100, "steps", 0.25, time.time(), socket.gethostname(), living.pid))
    assert stage_of(run).tasks[0].word == "running", "started by hand: no supervisor is needed"
    living.kill()
    living.wait()
    assert stage_of(run).tasks[0].word == "interrupted"
    assert "interrupted" in read_state(run).verdict


def test_what_happens_to_ranks_has_words() -> None:
    about = {"stage": "train", "shard": 0, "rank": 3, "node": "n2", "step": 5, "doing": "saving"}
    assert describe_event({"event": "submitted", "tasks": 1}) == "1 task to run"
    assert describe_event({"event": "stopping", "tasks": 1, "seconds": 20}) == "stopping: 1 task has 20 s to save"
    assert describe_event({"event": "rank_silent", "seconds": 90, **about}) == "train shard 0: nothing was heard of rank 3 on n2 for 90 s; last heard of at step 5, saving"
    assert describe_event({"event": "slow_rank", "factor": 2.4, **about}) == "train shard 0: rank 3 on n2 is 2.4 times slower than the others"
    assert describe_event({"event": "rank_lost", "cause": "gone", **about}) == "train shard 0: gone"
