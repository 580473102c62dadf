"""Which Slurm job is which task of a run. Called by queue_view.py.

A job's name tells run, stage and first shard; events tell its number, so that nobody else's job is taken for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from medgen.launch import slurm
from medgen.launch.script import parse_job_name
from medgen.launch.slurm import AccountingRow, QueueRow
from medgen.rundir import RunDir
from medgen.watch.poll import Key
from medgen.watch.reasons import SUSPENDED_STATES, WAITING_STATES

TaskKey = tuple[str, int]  # stage, shard
CHANGES = ("job_intent", "job_submitted", "jobs_released", "jobs_cancelled", "submission_rolled_back", "cancelled")


@dataclass
class Submitted:
    """What was ever given to Slurm, from the events. Times in unix seconds; `last`: when medgen changed the queue last."""

    numbers: dict[str, set[int]] = field(default_factory=dict)  # of the jobs called so
    tasks: dict[TaskKey, tuple[str, int]] = field(default_factory=dict)  # name and offset of the last job of each task
    times: dict[str, float] = field(default_factory=dict)
    first: float | None = None
    last: float = 0.0
    cancelled: float = 0.0

    def add(self, event: dict[str, Any]) -> None:
        """Take note of one event; damaged ones are left out."""
        kind, name = event["event"], event.get("name")
        if kind in CHANGES:
            self.last = event["time"]
        if kind == "cancelled":
            self.cancelled = event["time"]
        elif kind == "job_intent" and isinstance(name, str) and {"stage", "offset", "shards"} <= event.keys():
            self.numbers.setdefault(name, set())
            self.times[name] = event["time"]
            self.first = event["time"] if self.first is None else self.first
            self.tasks.update(((event["stage"], shard), (name, event["offset"])) for shard in event["shards"])
        elif kind == "job_submitted" and isinstance(name, str) and isinstance(event.get("job_id"), int):
            self.numbers.setdefault(name, set()).add(event["job_id"])
            self.times[name] = event["time"]

    def when(self, task: TaskKey) -> float | None:
        """When a task was given to Slurm last; None if never."""
        return self.times[self.tasks[task][0]] if task in self.tasks else None

    def key(self, task: TaskKey, is_array: bool) -> Key | None:
        """Job and element of a task, if the number of its job is known."""
        if task not in self.tasks:
            return None
        name, offset = self.tasks[task]
        numbers = self.numbers[name]
        return (max(numbers), task[1] - offset if is_array else None) if numbers else None


def read_submitted(events: Iterable[dict[str, Any]]) -> Submitted:
    submitted = Submitted()
    for event in events:
        submitted.add(event)
    return submitted


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
        numbers = submitted.numbers.get(row.name)
        if name is None or not name.is_of(run) or (numbers and row.job_id not in numbers):
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
