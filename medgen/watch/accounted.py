"""What the accounting keeps of the jobs that a run had. Used by why and usage; a cluster without accounting is no failure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from medgen.launch import slurm
from medgen.launch.slurm import AccountingRow, SlurmError
from medgen.launch.tries import Key, Try
from medgen.watch.slurm_jobs import Submitted

CLOCK_SECONDS = 60.0  # how far the clocks of a node and of the accounting may be apart
ROUNDING_SECONDS = 1.0  # the accounting knows whole seconds
NOT_COMPLETE = ("", "allocation")  # names in rows that the accounting has only begun to write


@dataclass(frozen=True)
class Accounting:
    """Rows by task, in order of their start. `problem`: why there are none, None if the accounting answered."""

    rows: dict[Key, list[AccountingRow]] = field(default_factory=dict)
    problem: str | None = None


def read_accounting(submitted: Submitted) -> Accounting:
    """One look at the accounting for all jobs, earlier lives of requeued ones included. Never raises."""
    known = {number: job for job in submitted.jobs.values() for number in job.numbers}
    if not known:
        return Accounting(problem="nothing of this run was given to Slurm")
    try:
        rows = slurm.accounting(sorted(known), min(job.time for job in known.values()) - CLOCK_SECONDS, duplicates=True)
    except SlurmError as error:
        return Accounting(problem=str(error))
    by_task: dict[Key, list[AccountingRow]] = {}
    for row in rows:
        job = known.get(row.job_id)
        if job is None or (row.name != job.name and row.name not in NOT_COMPLETE):
            continue  # numbers are given out anew on a cluster that was set up again
        by_task.setdefault((job.stage, job.offset + (row.array_task or 0)), []).append(row)
    for own in by_task.values():
        own.sort(key=lambda row: (row.start or float("inf"), row.submitted or 0))
    return Accounting(by_task)


def rows_of(tries: list[Try], rows: list[AccountingRow]) -> dict[int, AccountingRow]:
    """Attempt -> the life of a job in which it took place. A life holds one attempt: what the accounting has not written yet
    must not be taken for the life before it."""
    found: dict[int, AccountingRow] = {}
    for item in tries:
        row = _row_of(item, [row for row in rows if not any(row is taken for taken in found.values())])
        if row is not None:
            found[item.attempt] = row
    return found


def _row_of(item: Try, rows: list[AccountingRow]) -> AccountingRow | None:
    """The last life that had begun when the attempt did."""
    mine = [row for row in rows if row.start is not None and item.job_id in ("", slurm.element_text(row.job_id, row.array_task))]
    begun = [row for row in mine if (row.start or 0) <= item.started + ROUNDING_SECONDS] or [row for row in mine if (row.start or 0) <= item.started + CLOCK_SECONDS]
    last = begun[-1] if begun else None
    return last if last is not None and (last.end is None or last.end >= item.started - CLOCK_SECONDS) else None


def was_cancelled(times: Iterable[float], item: Try) -> bool:
    """True if a person ended the run with `medgen cancel`, at one of these times, while this attempt was at work."""
    end = item.ended if item.ended is not None else float("inf")
    return any(item.started <= time <= end + CLOCK_SECONDS for time in times)
