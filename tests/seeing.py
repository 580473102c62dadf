"""Run folders as failures leave them, and a Slurm that answers from files. Used by the tests of logs, why, usage and watch."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from medgen.rundir import Heartbeat, Outcome, RankBeat, RunDir

STAGES = [
    {"name": "train", "kind": "train", "ranks": 2},
    {"name": "images", "kind": "generate", "tasks": 4, "needs": ["train"]},
    {"name": "report", "kind": "report", "needs": ["images"]},
]


def event(run: RunDir, kind: str, seconds_ago: float, **facts: Any) -> None:
    run.events_file.parent.mkdir(parents=True, exist_ok=True)
    with run.events_file.open("a") as handle:
        handle.write(json.dumps({"time": time.time() - seconds_ago, "event": kind, "host": "vm", **facts}) + "\n")


def log(run: RunDir, text: str, stage: str = "train", shard: int = 0, rank: int = 0, attempt: int = 0) -> Path:
    path = run.log(stage, shard, rank, attempt)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def batch(run: RunDir, text: str, stage: str = "train", shard: int = 0, attempt: int = 0, seconds_ago: float = 100) -> None:
    """One attempt's part of the batch log, as a job script begins it; the attempt's number is taken."""
    began = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(time.time() - seconds_ago))
    path = run.batch_log(stage, shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        handle.write(f"medgen: {stage} shard {shard} attempt {attempt} on n1 at {began}\n{text}")
    run.log(stage, shard, 0, attempt).touch()


def started(run: RunDir, seconds_ago: float = 100, stage: str = "train", shard: int = 0, attempt: int = 0, from_step: int = 0, job: int | str | None = None) -> None:
    told = {"job_id": str(job), "node": "n1", "restart": 0} if job is not None else {}
    event(run, "task_started", seconds_ago, stage=stage, shard=shard, attempt=attempt, devices=1, from_step=from_step, **told)
    run.log(stage, shard, 0, attempt).parent.mkdir(parents=True, exist_ok=True)
    run.log(stage, shard, 0, attempt).touch()


def ended(
    run: RunDir, status: str = "failed", code: int | None = 1, cause: str | None = None, seconds: float = 60, next_action: str = "not tried again",
    stage: str = "train", shard: int = 0, attempt: int = 0, seconds_ago: float = 0,
) -> None:  # fmt: skip
    event(run, "task_ended", seconds_ago, stage=stage, shard=shard, attempt=attempt, status=status, rc=code, cause=cause, seconds=seconds, devices=1, next=next_action, log="",
          again=next_action.startswith(("will be tried again", "goes on")))


def outcome(run: RunDir, status: Any = "failed", cause: str | None = None, stage: str = "train", shard: int = 0, attempt: int = 0) -> None:
    made = run.stage(stage) / f"{shard}.bin"
    made.parent.mkdir(exist_ok=True)
    made.write_text("x")
    run.write_outcome(
        Outcome(run.run_id, stage, shard, f"{stage}{shard}", attempt, status, cause, "vm", "cpu", 1, time.time() - 100, time.time() - 40, [run.produced(made)] if status == "done" else [])
    )


def beat(run: RunDir, step: int, seconds_ago: float = 0, total: int = 1000, attempt: int = 0, stage: str = "train", shard: int = 0) -> None:
    write_beat(run, Heartbeat(stage, shard, attempt, step, total, "steps", 0.5, time.time() - seconds_ago, "vm", 1))


def write_beat(run: RunDir, beat: Heartbeat) -> None:
    """As if its node had written it when it says it did, by a clock that is right."""
    run.write_heartbeat(beat)
    os.utime(run.heartbeat_file(beat.stage, beat.shard), (beat.time, beat.time))


def write_rank_beat(run: RunDir, beat: RankBeat) -> None:
    """The same of another rank of the first task of `train`."""
    run.write_rank_beat("train", 0, beat)
    os.utime(run.rank_beat_file("train", 0, beat.rank), (beat.time, beat.time))


def queued(run: RunDir, job: int, stage: str = "train", shards: tuple[int, ...] = (0,), submission: int = 1, seconds_ago: float = 200) -> str:
    """What a submit to Slurm leaves in the events; returns the job's name."""
    name = f"medgen.{run.run_id}.{stage}.{submission}.0"
    event(run, "job_intent", seconds_ago, name=name, stage=stage, submission=str(submission), offset=0, shards=list(shards))
    event(run, "job_submitted", seconds_ago, name=name, job_id=job)
    return name


class FakeSlurm:
    """squeue and sacct that print what a test has written, or fail."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder = folder
        (folder / "bin").mkdir()
        environment["PATH"] = f"{folder / 'bin'}:{environment['PATH']}"
        environment["XDG_CACHE_HOME"] = str(folder / "cache")
        self.queue()
        self.accounting()

    def _command(self, name: str, body: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def queue(self, *rows: str) -> None:
        (self.folder / "squeue.txt").write_text("".join(f"{row}\n" for row in rows))
        self._command("squeue", f"cat {self.folder / 'squeue.txt'}")

    def accounting(self, *rows: str) -> None:
        (self.folder / "sacct.txt").write_text("".join(f"{row}\n" for row in rows))
        self._command("sacct", f'echo "$@" >> {self.folder / "sacct.calls"}; cat {self.folder / "sacct.txt"}')

    def without(self, command: str) -> None:
        self._command(command, "echo 'Slurm accounting storage is disabled' >&2; exit 1")


def queue_row(job: int, name: str, state: str = "PENDING", reason: str = "Resources", element: str = "N/A") -> str:
    return f"{job}|{element}|{state}|{reason}|N/A|N/A|0:00|{int(time.time()) - 200}||{name}"


def accounting_row(
    job: str, name: str, state: str, began_ago: float, seconds: int, code: str = "0:0", gpus: int = 0, cpus: int = 4, total_cpu: str = "", mem: str = "8G", node: str = "n1",
) -> str:  # fmt: skip
    end = "Unknown" if state == "RUNNING" else str(int(time.time() - began_ago) + seconds)
    tres = f"cpu={cpus},gres/gpu={gpus}" if gpus else f"cpu={cpus}"
    return f"{job}|{state}|{code}|{int(time.time() - began_ago)}|{end}|{int(time.time()) - 200}|{seconds}|{tres}|{cpus}|1|{mem}|{total_cpu}||{node}|None|{name}"


def step_row(job: str, rss: str) -> str:
    return f"{job}.0|COMPLETED|0:0|0|0|0|0|cpu=1|1|1|||{rss}|n1||python"
