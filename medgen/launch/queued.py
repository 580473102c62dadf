"""The jobs of one run in Slurm's queue, and which task each one is. Used by slurm_backend.py."""

from __future__ import annotations

from dataclasses import dataclass

from medgen.launch import slurm
from medgen.launch.script import parse_job_name
from medgen.launch.slurm import QueueRow
from medgen.rundir import RunDir

HELD = "JobHeldUser"


@dataclass(frozen=True)
class QueuedTask:
    """One task of the run that Slurm still has; `job_id` is that of the whole array."""

    stage: str
    shard: int
    job_id: int
    name: str
    row: QueueRow
    segment: int = 0  # its place in a chain of jobs, from 1 on

    @property
    def element(self) -> str:
        """What scancel and --dependency call it."""
        return slurm.element_text(self.job_id, self.row.array_task)

    @property
    def is_pending(self) -> bool:
        return self.row.state == "PENDING"

    @property
    def is_held(self) -> bool:
        return self.is_pending and self.row.reason == HELD


def queued_tasks(run: RunDir) -> list[QueuedTask]:
    """Everything of the run that has not ended, in the order of job numbers. Raises SlurmError if Slurm does not answer."""
    found = []
    for row in slurm.queue(f"medgen.{run.run_id}."):
        name = parse_job_name(row.name)
        if name is None or not name.is_of(run) or row.state in slurm.TERMINAL_STATES:
            continue
        found.append(QueuedTask(name.stage, name.offset + (row.array_task or 0), row.job_id, row.name, row, name.segment))
    return sorted(found, key=lambda task: (task.job_id, task.shard))


def was_queued(run: RunDir) -> bool:
    """True if jobs of this run were ever given to Slurm: its events say so, or, where they are lost, the scripts that were submitted."""
    return any(event["event"] == "job_intent" for event in run.events()) or any(run.root.glob("submissions/*/*_submission.sh"))
