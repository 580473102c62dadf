"""What Slurm tells about the tasks of one run at one moment. Called by state.py.

Asks squeue, and sacct only about jobs that are gone without an outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medgen.launch.after import TRIES
from medgen.launch.script import is_array
from medgen.launch.slurm import element_text
from medgen.launch.tries import Tries
from medgen.plan import Plan, PlannedStage
from medgen.rundir import RunDir
from medgen.watch.judge import Facts, Judgement, Seen, Word, gone_at, on_slurm, proof_of_absence
from medgen.watch.outcomes import Left, Outcomes
from medgen.watch.poll import AccountingAnswer, Key, QueueAnswer, Source
from medgen.watch.reasons import WAITING_STATES, Ending, ending_in_accounting, ending_in_queue, reason_in_words
from medgen.watch.slurm_jobs import (
    Jobs,
    Submitted,
    TaskKey,
    expected_start,
    jobs_of,
    over_in_accounting,
    read_submitted,
)
from medgen.watch.words import duration


@dataclass(frozen=True)
class QueueView:
    """Made by `read_queue_view`."""

    answer: QueueAnswer
    submitted: Submitted
    jobs: Jobs
    accounting: AccountingAnswer
    keys: dict[TaskKey, Key]
    tries: dict[TaskKey, int]  # failed attempts since the last submit

    def judge(self, task: TaskKey, facts: Facts) -> Judgement:
        return on_slurm(facts, self._seen(task, facts))

    def about(self, task: TaskKey, facts: Facts, word: Word, stage: PlannedStage) -> dict[str, Any]:
        """The fields of a TaskState that only a job of Slurm has."""
        row = self.jobs.live.get(task)
        waits = word in ("queued", "requeued", "held") and row is not None
        failures = self.tries.get(task, 0)
        return {
            "job": self._job(task) if task in self.keys or row is not None else None,
            "reason": reason_in_words(row.reason) or None if waits and row is not None else None,
            "starts": expected_start(row, facts.now) if waits and row is not None else None,
            "node": row.nodes or None if row is not None else None,
            "last_cause": facts.last.cause if facts.last is not None and facts.last.status == "failed" else None,
            "tries_left": max(0, TRIES[stage.kind] - failures) if failures and row is not None else None,
        }

    def gone_at(self, task: TaskKey, facts: Facts) -> float:
        return gone_at(facts, self._ending(task))

    def silence(self, now: float) -> str | None:
        """That Slurm does not answer, in words; None while it does."""
        if self.answer.trouble is None:
            return None
        since = self.answer.asked if self.answer.asked is not None else self.answer.failing_since
        return f"Slurm has not answered for {duration(now - since)}" if since is not None else "Slurm does not answer"

    def where(self, now: float) -> str | None:
        if not self.jobs.live:
            return None
        waiting = sum(row.state in WAITING_STATES for row in self.jobs.live.values())
        return f"Slurm: {len(self.jobs.live) - waiting} running, {waiting} queued"

    def _seen(self, task: TaskKey, facts: Facts) -> Seen:
        when = self.submitted.when(task)
        return Seen(
            asked=self.answer.asked,
            row=self.jobs.live.get(task),
            ending=self._ending(task),
            absent=task not in self.jobs.live and proof_of_absence(facts, self.answer.asked, when),
            silence=self.silence(facts.now),
            submitted=when,
            cancelled=when is not None and self.submitted.cancelled > when,
            job=self._job(task),
        )

    def _ending(self, task: TaskKey) -> Ending | None:
        """Of its last job, as the accounting tells it; else as the queue did."""
        key = self.keys.get(task)
        row = over_in_accounting(self.accounting.rows, key)
        if row is not None:
            return ending_in_accounting(row)
        over = self.jobs.over.get(task)
        return ending_in_queue(over) if over is not None and (key is None or over.job_id == key[0]) else None

    def _job(self, task: TaskKey) -> str:
        row = self.jobs.live.get(task)
        if row is not None:
            return element_text(row.job_id, row.array_task)
        return element_text(*self.keys[task]) if task in self.keys else "of Slurm"


def read_queue_view(
    run: RunDir, plan: Plan, events: Sequence[dict[str, Any]], told: Tries, outcomes: Outcomes, done: dict[TaskKey, Left], source: Source
) -> QueueView | None:
    """None for a run whose last submit was not to Slurm: then Slurm is not asked either."""
    last = next((event for event in reversed(events) if event["event"] == "submitted"), None)
    if last is None or last.get("backend") != "slurm":
        return None
    submitted = read_submitted(events)
    answer = source.queue(submitted.last)
    jobs = jobs_of(run, answer.text, submitted)
    keys = {}
    for stage in plan.stages:
        for task in stage.tasks:
            key = submitted.key((stage.name, task.shard), is_array(stage)) if (stage.name, task.shard) not in done else None
            if key is not None:
                keys[stage.name, task.shard] = key
    since = last["time"]
    tries = {key: failed for key, items in told.items() if (failed := sum(item.status == "failed" and item.started >= since for item in items))}
    view = QueueView(answer, submitted, jobs, AccountingAnswer({}), keys, tries)
    wanted = _unexplained(view, plan, told, outcomes)
    if not wanted:
        return view
    accounting = source.accounting(run.run_id, wanted, min([since, *(job.time for job in submitted.jobs.values())]) - 60)
    return QueueView(answer, submitted, jobs, accounting, keys, tries)


def _unexplained(view: QueueView, plan: Plan, told: Tries, outcomes: Outcomes) -> set[Key]:
    """Jobs that are gone from the queue and have not told why."""
    wanted = set()
    hashes = {(task.stage, task.shard): task.hash for stage in plan.stages for task in stage.tasks}
    for task, key in view.keys.items():
        if task in view.jobs.live:
            continue
        attempts = told.get(task)
        stage, shard = task
        facts = Facts(outcomes.of(stage, shard, hashes[task]), attempts[-1] if attempts else None, outcomes.beat(stage, shard), False, 0.0)
        cancelled = view.submitted.cancelled > (view.submitted.when(task) or 0.0)
        if not facts.ended and not facts.told and not (facts.last is None and cancelled) and proof_of_absence(facts, view.answer.asked, view.submitted.when(task)):
            wanted.add(key)
    return wanted
