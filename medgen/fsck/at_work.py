"""Who works on a run now: a supervisor, a submit, a task, jobs in Slurm's queue. Used by fsck, which then calls nothing safe to delete."""

from __future__ import annotations

import fcntl
import os
import time
from dataclasses import dataclass
from pathlib import Path

from medgen.launch.life import may_live
from medgen.launch.processes import marked
from medgen.launch.queued import queued_tasks, was_queued
from medgen.launch.slurm import SlurmError
from medgen.launch.supervisor import living_supervisor
from medgen.plan import Plan
from medgen.rundir import RunDir


@dataclass(frozen=True)
class AtWork:
    """`words`: None if nobody is. `is_certain`: False where it only cannot be told that nobody is.

    `tasks`: (stage, shard) of what is being worked on, as far as that can be seen from here."""

    words: str | None
    tasks: frozenset[tuple[str, int]]
    is_certain: bool = True


def look(run: RunDir, plan: Plan | None) -> AtWork:
    """Reads only; asks Slurm if the run was ever given to it."""
    found = tasks(run, plan)
    if not (found.words and found.is_certain) and (is_held(run.lock) or is_held(run.prepare_lock)):
        return AtWork("a submit of it is at work", found.tasks)
    return found


def tasks(run: RunDir, plan: Plan | None) -> AtWork:
    """The same for whoever holds the locks of submit."""
    known = [(task.stage, task.shard) for stage in plan.stages for task in stage.tasks] if plan is not None else []
    busy = {task for task in known if is_held(run.task_lock(*task)) or _beats(run, *task)}
    words, doubts = list[str](), list[str]()
    if (supervisor := living_supervisor(run)) is not None:
        words.append(f"it is supervised by {supervisor}")
    try:
        queued = queued_tasks(run) if was_queued(run) else []
    except SlurmError as error:
        doubts.append(f"it was queued on Slurm, and whether jobs of it are left cannot be seen from here ({error})")
    except OSError as error:
        doubts.append(f"whether jobs of it are left in Slurm's queue cannot be told ({error.filename}: {error.strerror})")
    else:
        busy |= {(task.stage, task.shard) for task in queued if not task.is_pending}
        words += [f"{len(queued)} of its tasks are in Slurm's queue"] if queued else []
    if busy and not words:
        words.append("a task of it runs: " + ", ".join(f"{stage} shard {shard}" for stage, shard in sorted(busy)[:3]))
    if not words and marked(run.root):
        words.append("processes that a supervisor of it started are still there")
    return AtWork("; ".join([*words, *doubts]) or None, frozenset(busy), is_certain=bool(words) or not doubts)


def is_held(lock: Path) -> bool:
    """True if a process holds this lock now; a lock file that a dead one left does not count."""
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that only look do not see each other
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def _beats(run: RunDir, stage: str, shard: int) -> bool:
    """True if a task may live on another machine, where its lock may not be seen from here."""
    beat = run.read_heartbeat(stage, shard)
    if beat is None or not may_live(beat, time.time()):
        return False
    outcome = run.read_outcome(stage, shard)
    return outcome is None or outcome.attempt != beat.attempt or outcome.ended < beat.time
