"""What a job script on a cluster tells and asks: that an attempt begins, how it ended, whether to start again.

Called as `medgen attempt begin|end` from the scripts of launch/script.py; locally the supervisor does this itself."""

from __future__ import annotations

import os
import re
import socket
import time
from dataclasses import dataclass
from typing import Any

from medgen import plan as planning
from medgen.errors import Exit, InputError
from medgen.launch.backend import ending_of, fresh_outcome, guilty_log
from medgen.launch.history import COMES_BACK, Attempt, read_history
from medgen.launch.notify import tell_people
from medgen.launch.queue import TRIES
from medgen.launch.script import REQUEUE
from medgen.plan import Plan, PlannedStage, Task
from medgen.rundir import RunDir

TRIES_WITHOUT_A_WORD = 2  # of whatever was killed before it could tell why: another node may do better
WITHOUT_PROGRESS = 3  # attempts in a row that end where they began: then the job is not started again
AGAIN, GOES_ON = COMES_BACK
CANCELLED = "submit again to go on"
OVER_TIME = "not tried again: write more segments: or a longer time:, and submit again"
LIMIT_SECONDS = 30  # Slurm may end a job a little before or after its limit
INTERRUPTIONS = 5  # of what cannot show progress


def begin(run: RunDir, stage_name: str, shard: int, attempt: int) -> Exit:
    """Tell that an attempt begins; an earlier one that nobody saw the end of is ended first."""
    plan = planning.read(run)
    stage, task = _find(plan, stage_name, shard)
    last = _attempts(run, stage_name, shard)[-1:]
    beat = run.read_heartbeat(stage_name, shard)
    if last and last[0].status is None:
        seen = beat.time if beat is not None and beat.attempt == last[0].attempt else last[0].started
        _tell_end(run, stage, shard, last[0].attempt, "interrupted", None, "Slurm took the job away: preempted, or its node failed",
                  max(0.0, seen - last[0].started), GOES_ON, job_id())  # fmt: skip
    run.event(
        "task_started", stage=stage_name, shard=shard, attempt=attempt, task_hash=task.hash, devices=stage.devices,
        from_step=run.saved_step(stage_name) if stage.kind == "train" else 0, job_id=job_id(), node=os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    )  # fmt: skip
    return Exit.DONE


def end(run: RunDir, stage_name: str, shard: int, attempt: int, exit_code: int, started: float, job: str) -> int:
    """Tell how an attempt ended. Returns 0 if the task is done, REQUEUE if the same job is to be started again, else 1.

    `job`: one line of `scontrol show job`, or nothing."""
    plan = planning.read(run)
    stage, task = _find(plan, stage_name, shard)
    seconds = time.time() - started
    status: str
    status, cause = ending_of(run, task, attempt, exit_code)
    taken = _taken_by_slurm(run, job, at_limit=seconds >= stage.time_minutes * 60 - LIMIT_SECONDS)
    if status == "done":
        action = "done"
    elif taken is not None:
        status, cause, action = "interrupted", taken.cause, taken.action
    else:
        earlier = [item for item in _attempts_since_submit(run, stage_name, shard) if item.attempt != attempt]
        action = _next(run, stage, shard, attempt, status, seconds, plan.place.grace_seconds, earlier)
    _tell_end(run, stage, shard, attempt, status, exit_code, cause, seconds, action, job_id())
    if action.startswith(COMES_BACK):
        return Exit.FAILED if taken is not None else REQUEUE
    tell_people(run, plan, stage, shard, status, cause)
    return Exit.DONE if status == "done" else Exit.FAILED


@dataclass(frozen=True)
class Taken:
    """What Slurm has decided about a job that is ending."""

    cause: str
    action: str


def _taken_by_slurm(run: RunDir, job: str, at_limit: bool) -> Taken | None:
    """None if the job just runs: what comes next is ours to decide."""
    facts = dict(reversed(re.findall(r"(\w+)=(\S*)", job)))  # the first of a name: a job's own words come later
    if run.cancel_mark.exists():
        return Taken("cancelled with medgen cancel", CANCELLED)
    if facts.get("JobState", "RUNNING") == "RUNNING":
        return None
    if int(re.sub(r"\D", "", facts.get("Restarts", "")) or 0) > int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        return Taken("Slurm took the job back to start it again", GOES_ON)
    if at_limit:
        return Taken("it met its time limit", OVER_TIME)
    return Taken("cancelled with scancel", CANCELLED)


def refused(run: RunDir, stage_name: str, shard: int, attempt: int) -> Exit:
    """Tell that Slurm did not take the job back: the site allows no requeue."""
    run.event("requeue_refused", stage=stage_name, shard=shard, attempt=attempt, job_id=job_id(), next="submit again to go on")
    return Exit.DONE


def job_id() -> str:
    """`123`, or `123_4` for an element of an array."""
    environment = os.environ
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID", "")


def _find(plan: Plan, stage_name: str, shard: int) -> tuple[PlannedStage, Task]:
    stage = plan.stage(stage_name)
    if not 0 <= shard < len(stage.tasks):
        raise InputError(f"{plan.run_id}: {stage_name} has no shard {shard}")
    return stage, stage.tasks[shard]


def _attempts(run: RunDir, stage: str, shard: int) -> list[Attempt]:
    return read_history(run.events()).get((stage, shard), [])


def _attempts_since_submit(run: RunDir, stage: str, shard: int) -> list[Attempt]:
    """Each submit brings new tries. By place in the events, not by time: the clocks of login node and nodes may differ."""
    events = run.events()
    last = max((number for number, event in enumerate(events) if event["event"] == "submitted"), default=0)
    return read_history(events[last:]).get((stage, shard), [])


def _next(
    run: RunDir, stage: PlannedStage, shard: int, attempt: int, status: str, seconds: float, grace_seconds: int, earlier: list[Attempt]
) -> str:
    """What to do after an attempt that is not done, in words; those in COMES_BACK mean: start the job again."""
    if status == "refused":
        return "not tried again: the input is wrong"
    if status == "interrupted":
        if _without_progress(run, stage, shard, earlier):
            return f"not tried again: no progress in {WITHOUT_PROGRESS} attempts"
        if stage.kind != "train" and sum(item.status == "interrupted" for item in earlier) >= INTERRUPTIONS:
            return f"not tried again: stopped {INTERRUPTIONS + 1} times; submit again to go on"
        at_limit = seconds >= stage.time_minutes * 60 - grace_seconds - 60
        limits = sum(item.seconds(0) >= stage.time_minutes * 60 - grace_seconds - 60 for item in earlier if item.ended is not None) + at_limit
        if at_limit and limits >= stage.segments:
            return f"{OVER_TIME} (it met its limit {limits} times)"
        return GOES_ON
    told = fresh_outcome(run, stage.tasks[shard], attempt) is not None
    tries = TRIES[stage.kind] if told else max(TRIES[stage.kind], TRIES_WITHOUT_A_WORD)
    crashes = 1 + sum(item.status == "failed" for item in earlier)
    return AGAIN if crashes < tries else "not tried again"


def _without_progress(run: RunDir, stage: PlannedStage, shard: int, earlier: list[Attempt]) -> bool:
    """True if this attempt and those just before it all began at the step where this one has ended."""
    beat = run.read_heartbeat(stage.name, shard)
    if stage.kind != "train" or beat is None or len(earlier) < WITHOUT_PROGRESS:
        return False
    return all(item.from_step >= beat.step for item in earlier[-WITHOUT_PROGRESS + 1 :])


def _tell_end(
    run: RunDir, stage: PlannedStage, shard: int, attempt: int, status: str, exit_code: int | None, cause: str | None,
    seconds: float, action: str, job: str,
) -> None:  # fmt: skip
    facts: dict[str, Any] = {"job_id": job, "node": os.environ.get("SLURMD_NODENAME", socket.gethostname())}
    run.event(
        "task_ended", stage=stage.name, shard=shard, attempt=attempt, status=status, rc=exit_code, cause=cause, seconds=round(seconds, 3),
        devices=stage.devices, next=action, log=str(guilty_log(run, stage.name, shard, attempt).relative_to(run.root)), **facts,
    )  # fmt: skip
