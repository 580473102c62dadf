"""What a job script on a cluster tells and asks: that an attempt begins, how it ended, whether to start again.

Called as `medgen attempt begin|end` from the scripts of launch/script.py; locally the supervisor does this itself."""

from __future__ import annotations

import os
import re
import socket
import sys
import time

from medgen import plan as planning
from medgen.errors import Exit, InputError
from medgen.launch import after, nodes
from medgen.launch.after import GOES_ON, Circumstances, Taken, Verdict
from medgen.launch.backend import fresh_outcome
from medgen.launch.causes import TIME_LIMIT, was_ended
from medgen.launch.notify import tell_people
from medgen.launch.script import ENOUGH, REQUEUE, parse_job_name
from medgen.launch.tries import Try, batch_section, last_seen, read_tries
from medgen.plan import Plan, PlannedStage, Task
from medgen.rundir import RunDir

CANCELLED = "submit again to go on"


def begin(run: RunDir, stage_name: str, shard: int, attempt: int) -> int:
    """Tell that an attempt begins; an earlier one that nobody saw the end of is ended first.

    Returns ENOUGH if the task is done already (an earlier job of its chain did it), FAILED if it was given up, else 0."""
    plan = planning.read(run)
    stage, task = _find(plan, stage_name, shard)
    tries = read_tries(run.events()).get((stage_name, shard), [])
    if segment() and run.is_done(stage_name, shard, task.hash):
        return ENOUGH
    if tries and tries[-1].gave_up_before(segment()):
        print(f"medgen: {stage_name}: the chain was given up after attempt {tries[-1].attempt}: {tries[-1].next}")
        return Exit.FAILED
    if tries and tries[-1].status is None and not _goes_on_after(run, plan, stage, task, tries[-1]):
        return Exit.FAILED
    run.event(
        "task_started", stage=stage_name, shard=shard, attempt=attempt, task_hash=task.hash, devices=stage.devices,
        from_step=run.saved_step(stage_name, shard) if stage.saves else 0, job_id=job_id(), node=node(), segment=segment(),
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    )  # fmt: skip
    return Exit.DONE


def _goes_on_after(run: RunDir, plan: Plan, stage: PlannedStage, task: Task, lost: Try) -> bool:
    """Tell of an attempt that nobody saw the end of. False if this very job, which Slurm starts again and again, is given up."""
    verdict = after.judge_lost(run, plan, stage, task, lost)
    after.tell(run, stage, task.shard, lost.attempt, verdict, None, last_seen(run, lost) - lost.started, job_id=lost.job_id, node=lost.node)
    if verdict.status == "done" or verdict.again or lost.job_id != job_id():
        return True
    print(f"medgen: {stage.name}: given up after attempt {lost.attempt}: {verdict.words}")
    tell_people(run, plan, stage, task.shard, verdict)
    return False


def end(run: RunDir, stage_name: str, shard: int, attempt: int, exit_code: int, started: float, job: str) -> int:
    """Tell how an attempt ended. Returns 0 if the task is done, REQUEUE if the same job is to be started again, else 1.

    `job`: one line of `scontrol show job`, or nothing. With REQUEUE it prints what `scontrol update` is to change before that."""
    plan = planning.read(run)
    stage, task = _find(plan, stage_name, shard)
    seconds = max(0.0, time.time() - started)  # the clock may have been set back
    facts = job_facts(job)
    later_segments = _later_segments(stage)
    taken = _taken_by_slurm(run, stage, facts, seconds)
    if taken is not None and taken.kind == "TIMEOUT" and not later_segments and _saved_at_limit(run, task, attempt):
        taken = None  # for as long as its script lives, Slurm takes back a job that has met its limit
    around = Circumstances(True, _is_preempted(facts), later_segments, taken)
    verdict = after.judge(run, plan, stage, task, attempt, exit_code, seconds, around)
    after.tell(run, stage, shard, attempt, verdict, exit_code, seconds, job_id=job_id(), node=node())
    if verdict.elsewhere:
        _remember_node(run, nodes.guilty(run, stage_name, shard, attempt, node()), str(verdict.cause))
    if verdict.again:
        for change in _changes(run, verdict, facts):
            print(change)
        return Exit.FAILED if taken is not None else REQUEUE
    handed_on = verdict.kind == "TIMEOUT" and later_segments > 0  # to the next job of its chain
    if verdict.kind != "CANCELLED" and not handed_on:
        tell_people(run, plan, stage, shard, verdict)
    return Exit.DONE if verdict.status == "done" else Exit.FAILED


def _saved_at_limit(run: RunDir, task: Task, attempt: int) -> bool:
    """It had saved when Slurm ended it at its time limit, by Slurm's own words."""
    outcome = fresh_outcome(run, task, attempt)
    return outcome is not None and outcome.status == "interrupted" and TIME_LIMIT.search(batch_section(run, task.stage, task.shard, attempt)) is not None


def job_facts(line: str) -> dict[str, str]:
    """One line of `scontrol show job`; the first of a name counts: the job's own words (folder, comment) come later."""
    return dict(reversed(re.findall(r"(\w+)=(\S*)", line)))


def _remember_node(run: RunDir, name: str, cause: str) -> None:
    """A courtesy to later jobs: what was decided about this one is told already, and must happen."""
    try:
        nodes.remember(run.cache, name, cause, run.run_id)
    except (OSError, InputError) as error:
        print(f"medgen: {name} could not be remembered as broken: {error}", file=sys.stderr)


def _changes(run: RunDir, verdict: Verdict, facts: dict[str, str]) -> list[str]:
    """What is to be different at the next start, in the words of `scontrol update`."""
    changes = []
    if verdict.relief is not None and verdict.relief.mem_mebibytes is not None:
        changes.append(f"MinMemoryNode={verdict.relief.mem_mebibytes}")
    if verdict.elsewhere:
        before = facts.get("ExcNodeList", "(null)")
        bad = [entry.node for entry in nodes.believed(run.cache)]
        changes.append(f"ExcNodeList={','.join(dict.fromkeys([*([] if before == '(null)' else [before]), *bad]))}")
    return changes


def _is_preempted(facts: dict[str, str]) -> bool:
    return facts.get("PreemptTime", "None") not in ("None", "")


def _later_segments(stage: PlannedStage) -> int:
    """How many jobs of its chain wait behind this one."""
    return max(0, stage.chain - segment()) if segment() else 0


def segment() -> int:
    """The place of this job in its chain, from 1 on; 0 if it is not part of one."""
    name = parse_job_name(os.environ.get("SLURM_JOB_NAME", ""))
    return name.segment if name is not None else 0


def node() -> str:
    return os.environ.get("SLURMD_NODENAME", socket.gethostname())


def _taken_by_slurm(run: RunDir, stage: PlannedStage, facts: dict[str, str], seconds: float) -> Taken | None:
    """What Slurm has decided about a job that is ending; None if it just runs: what comes next is ours to decide."""
    if run.cancel_mark.exists():
        return Taken("cancelled with medgen cancel", "CANCELLED", CANCELLED, comes_back=False)
    if facts.get("JobState", "RUNNING") == "RUNNING":
        return None
    if int(re.sub(r"\D", "", facts.get("Restarts", "")) or 0) > int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        return Taken("Slurm took the job back to start it again", "PREEMPTED", GOES_ON, comes_back=True)
    if facts["JobState"] == "PENDING":  # a slurmctld that was killed may forget that it started this job
        return Taken("Slurm put the job back into its queue", "PREEMPTED", GOES_ON, comes_back=True)
    if was_ended(seconds, stage.limit_seconds):
        later_segments = _later_segments(stage)
        return Taken("it met its time limit", "TIMEOUT", after.goes_on_in_chain(later_segments) if later_segments else after.over_time(stage), comes_back=False)
    return Taken("cancelled with scancel", "CANCELLED", CANCELLED, comes_back=False)


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
