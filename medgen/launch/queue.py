"""Which task may start now: order, CPU and GPU slots, repairs. Starts nothing itself; used by local.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from medgen.plan import Plan, PlannedStage, Task

Ending = Literal["done", "interrupted", "failed", "refused"]  # refused: exit code 2, the input is wrong
JobState = Literal["waiting", "running", "done", "failed"]

REPAIRS = 2  # times that collect may send shards back
FAILED_SHARDS = 3  # then the rest of the stage is not even tried


@dataclass
class Job:
    """One task in the queue and the slots it holds while it runs."""

    stage: PlannedStage
    task: Task
    state: JobState = "waiting"
    gpus: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return self.stage.name if len(self.stage.tasks) == 1 else f"{self.stage.name} shard {self.task.shard}"


class Queue:
    """All tasks of a plan on a machine with `cpus` cores and the GPUs called `gpus`."""

    def __init__(self, plan: Plan, is_done: Callable[[Task], bool], cpus: int, gpus: Sequence[str]):
        self.plan = plan
        self.is_done = is_done
        self.cpus = cpus
        self.free_cpus = cpus
        self.free_gpus = list(gpus)
        self.repairs = 0
        self.refused: set[str] = set()
        self.jobs = [Job(stage, task) for stage in plan.stages for task in stage.tasks]
        for job in self.jobs:
            if is_done(job.task):
                job.state = "done"

    def of(self, stage: str) -> list[Job]:
        return [job for job in self.jobs if job.stage.name == stage]

    def running(self) -> list[Job]:
        return [job for job in self.jobs if job.state == "running"]

    def cpus_of(self, stage: PlannedStage) -> int:
        return min(stage.ranks * stage.threads, self.cpus)

    def stage_done(self, stage: str) -> bool:
        return all(job.state == "done" for job in self.of(stage))

    def gave_up(self, stage: str) -> bool:
        """True if no further task of the stage is to be started."""
        failed = sum(job.state == "failed" for job in self.of(stage))
        return stage in self.refused or failed >= FAILED_SHARDS

    def start_next(self) -> Job | None:
        """Take the slots for the first task that may start, or return None."""
        for job in self.jobs:
            if job.state == "waiting" and self._may_start(job):
                job.state = "running"
                self.free_cpus -= self.cpus_of(job.stage)
                job.gpus, self.free_gpus = self.free_gpus[: job.stage.gpus_per_node], self.free_gpus[job.stage.gpus_per_node :]
                return job
        return None

    def _may_start(self, job: Job) -> bool:
        stage = job.stage
        return (
            self.cpus_of(stage) <= self.free_cpus
            and stage.gpus_per_node <= len(self.free_gpus)
            and sum(other.state == "running" for other in self.of(stage.name)) < stage.parallel
            and all(self.stage_done(needed) for needed in stage.needs)
            and not self.gave_up(stage.name)
        )

    def end(self, job: Job, ending: Ending, again: bool) -> None:
        """Give the slots back; `again`: it waits for its next start."""
        self.free_cpus += self.cpus_of(job.stage)
        self.free_gpus = sorted([*self.free_gpus, *job.gpus])
        job.gpus = []
        job.state = "done" if ending == "done" else "waiting" if again else "failed"
        if ending == "refused":
            self.refused.add(job.stage.name)

    def repair(self, job: Job) -> str | None:
        """After collect took back bad shards: draw exactly those again, then collect again. What is done about it in words."""
        if job.stage.kind != "collect":
            return None
        lost = [other for other in self.of(job.stage.settings["of"]) if not self.is_done(other.task)]
        if not lost or self.repairs >= REPAIRS:
            return None
        self.repairs += 1
        for other in lost:
            other.state = "waiting"
        return f"{len(lost)} shards of {job.stage.settings['of']} are made again, then collected again"

    def blocked(self) -> dict[str, list[str]]:
        """Stages that cannot start -> the failed stages at the root of it. Ask when nothing runs."""
        stuck: dict[str, list[str]] = {}
        for stage in self.plan.stages:
            guilty: list[str] = []
            for name in stage.needs:
                guilty += stuck[name] if name in stuck else [name] if any(job.state == "failed" for job in self.of(name)) else []
            if guilty and not self.stage_done(stage.name):
                stuck[stage.name] = list(dict.fromkeys(guilty))
        return stuck

    def failed(self) -> list[Job]:
        return [job for job in self.jobs if job.state == "failed"]

    def all_done(self) -> bool:
        return all(job.state == "done" for job in self.jobs)
