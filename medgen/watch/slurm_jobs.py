"""Which Slurm job is which task of a run. Called by queue_view.py, and by accounted.py for why and usage.

A job's name tells run, stage and first shard; events tell its number, so that nobody else's job is taken for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from medgen.launch import slurm
from medgen.launch.script import parse_job_name
from medgen.launch.slurm import AccountingRow, QueueRow
from medgen.rundir import RunDir
from medgen.watch.poll import Key
from medgen.watch.reasons import SUSPENDED_STATES, WAITING_STATES

TaskKey = tuple[str, int]  # stage, shard
CHANGES = ("job_intent", "job_submitted", "jobs_released", "jobs_cancelled", "submission_rolled_back", "cancelled")


@dataclass(frozen=True)
class SubmittedJob:
    """One sbatch call: which shards of which stage it was for, and when (unix seconds).

    `numbers`: what Slurm calls it; none if nobody heard its reply, several if it was queued twice."""

    name: str
    stage: str
    offset: int
    shards: tuple[int, ...]
    time: float
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Submitted:
    """What was ever given to Slurm. `last`: when medgen changed the queue last, `cancelled`: when a person ended the run; unix seconds."""

    jobs: dict[str, SubmittedJob]  # by name, in order
    newest: dict[TaskKey, SubmittedJob]  # of each task the last one
    last: float
    cancelled: float

    def when(self, task: TaskKey) -> float | None:
        """When a task was given to Slurm last; None if never."""
        return self.newest[task].time if task in self.newest else None

    def key(self, task: TaskKey, is_array: bool) -> Key | None:
        """Job and element of a task, if the number of its job is known."""
        job = self.newest.get(task)
        return (max(job.numbers), task[1] - job.offset if is_array else None) if job is not None and job.numbers else None


def read_submitted(events: Iterable[dict[str, Any]]) -> Submitted:
    jobs: dict[str, SubmittedJob] = {}
    last = cancelled = 0.0
    for event in events:
        kind = event["event"]
        if kind not in CHANGES:
            continue
        last = event["time"]
        if kind == "cancelled":
            cancelled = event["time"]
        elif kind == "job_intent":
            jobs[event["name"]] = SubmittedJob(event["name"], event["stage"], event["offset"], tuple(event["shards"]), event["time"])
        elif kind == "job_submitted" and (job := jobs.get(event["name"]) or _without_intent(event)) is not None:
            jobs[job.name] = replace(job, time=event["time"], numbers=(*job.numbers, event["job_id"]))
    return Submitted(jobs, {(job.stage, shard): job for job in jobs.values() for shard in job.shards}, last, cancelled)


def _without_intent(event: dict[str, Any]) -> SubmittedJob | None:
    """What its name alone tells, where that line of the events is damaged."""
    name = parse_job_name(event["name"])
    return SubmittedJob(event["name"], name.stage, name.offset, (name.offset,), event["time"]) if name is not None else None


@dataclass(frozen=True)
class Jobs:
    """What Slurm's queue holds of one run: `live` has not ended, `over` ended a few minutes ago."""

    live: dict[TaskKey, QueueRow]
    over: dict[TaskKey, QueueRow]


def jobs_of(run: RunDir, queue_text: str, submitted: Submitted) -> Jobs:
    """Sort squeue's rows by task; of several jobs of one task the one that is furthest counts."""
    live: dict[TaskKey, QueueRow] = {}
    over: dict[TaskKey, QueueRow] = {}
    for row in slurm.parse_queue(queue_text, f"medgen.{run.run_id}."):
        name = parse_job_name(row.name)
        job = submitted.jobs.get(row.name)
        if name is None or not name.is_of(run) or (job is not None and job.numbers and row.job_id not in job.numbers):
            continue  # of a run with the same id in another folder
        task = name.stage, name.offset + (row.array_task or 0)
        rows = over if row.state in slurm.TERMINAL_STATES else live
        if task not in rows or _rank(row) > _rank(rows[task]):
            rows[task] = row
    return Jobs(live, over)


def _rank(row: QueueRow) -> tuple[int, int, int]:
    """Running before suspended before waiting; of a chain the first, else the newest."""
    name = parse_job_name(row.name)
    return (0 if row.state in WAITING_STATES else 1 if row.state in SUSPENDED_STATES else 2), -name.segment if name is not None else 0, row.job_id


def expected_start(row: QueueRow, now: float) -> float | None:
    """When Slurm expects a waiting job to start, unix seconds; None where it does not say, or where that time has passed."""
    return row.start if row.state in WAITING_STATES and row.start is not None and row.start > now else None


def over_in_accounting(rows: dict[Key, AccountingRow], key: Key | None) -> AccountingRow | None:
    row = rows.get(key) if key is not None else None
    return row if row is not None and row.state in slurm.TERMINAL_STATES else None
