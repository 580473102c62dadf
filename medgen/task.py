"""What every stage shares around its work: the plan, heartbeats, signals, and an outcome however it ends.

cli.py calls `perform` for train, generate, collect, evaluate and report; the work itself is in those modules."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from medgen import fault, watchdog
from medgen import plan as planning
from medgen.activity import LEAVING, Activity
from medgen.errors import Exit, InputError, Interrupted, MedgenError
from medgen.plan import Plan, PlannedStage
from medgen.plan import Task as PlannedTask
from medgen.rundir import Heartbeat, Outcome, RankBeat, RunDir, Status
from medgen.stop import StopFlag
from medgen.watchdog import Seat, Watchdog
from medgen.world import rank_from_environment

LAST_WORDS_SECONDS = 5.0  # for the error of a collective, or for a save that is nearly done, after another rank has died
NEWS_SECONDS = 0.5  # a collective may fail a moment before it is known that a rank has died
LOCK_SECONDS = 20.0
AWAITED_SECONDS = 60.0  # a shared file system may show on this node that much later what another has written
# what the machine, not medgen, is to blame for: told in one line
SYSTEM_FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write or read here",
    errno.EPERM: "no permission to write or read here",
}


@dataclass
class Work:
    """Handed to a stage: where it is, what it must do, and how it tells its progress."""

    run: RunDir
    plan: Plan
    stage: PlannedStage
    task: PlannedTask
    attempt: int
    stop: StopFlag
    is_main: bool
    device_name: str = "cpu"
    rank: int = 0
    world_size: int = 1
    activity: Activity = field(default_factory=Activity)
    slow: list[tuple[int, float]] = field(default_factory=list)  # ranks and how many times slower than the others they are
    skipped: dict[str, int] | None = None  # that too many steps were skipped: `steps` of the last `of`
    ended_rank: int | None = None  # another rank whose process has ended before the work
    ended_rank_known: threading.Event = field(default_factory=threading.Event)
    _progress: dict[str, Any] = field(default_factory=lambda: {"step": 0, "total": 0, "unit": "", "loss": None, "advanced": time.time()})

    def say(self, text: str) -> None:
        """One line for the log, from rank 0 only."""
        if self.is_main:
            print(text, flush=True)

    def progress(self, step: int, total: int, unit: str, loss: float | None = None) -> None:
        advanced = self._progress["advanced"] if step == self._progress["step"] else time.time()
        self._progress = {"step": step, "total": total, "unit": unit, "loss": loss, "advanced": advanced}

    def require(self, stage_name: str) -> None:
        """Raise InputError unless every task of another stage is done: nothing is made from half of something."""
        needed = self.plan.stage(stage_name)
        waiting = self.await_done(needed)
        if waiting:
            raise InputError(f"{self.stage.name} needs {stage_name}, where {len(waiting)} of {len(needed.tasks)} tasks are not done; "
                             f"submit the spec again, or run `medgen {needed.kind} {self.run.run_id} --stage {stage_name}` first")

    @property
    def step(self) -> int:
        return int(self._progress["step"])

    @property
    def seat(self) -> Seat:
        lost_seconds = self.plan.place.lost_seconds
        return Seat(self.run, self.stage.name, self.task.shard, self.attempt, self.rank, self.world_size, lost_seconds)

    def await_done(self, needed: PlannedStage) -> list[PlannedTask]:
        """What of a stage is not done. In a job of a cluster, which was started because it is, it is waited for a while."""
        deadline = time.monotonic() + (AWAITED_SECONDS if "SLURM_JOB_ID" in os.environ and "MEDGEN_SUPERVISED" not in os.environ else 0)
        told = False
        while True:
            waiting = [task for task in needed.tasks if not self.run.is_done(task.stage, task.shard, task.hash)]
            if not waiting or time.monotonic() >= deadline or self.stop.is_set:
                return waiting
            if not told:
                self.say(f"{len(waiting)} of {len(needed.tasks)} outcomes of {needed.name} are not to be seen here yet: waiting up to {AWAITED_SECONDS:.0f} s for the file system")
                told = True
            time.sleep(1)

    def heartbeat(self) -> None:
        """Raises OSError if it cannot be written."""
        now, host, pid, progress, doing = time.time(), socket.gethostname(), os.getpid(), self._progress, self.activity.doing
        if self.is_main:
            beat = Heartbeat(self.stage.name, self.task.shard, self.attempt, **progress, time=now, host=host, pid=pid, doing=doing, slow=self.slow, skipped=self.skipped)
            self.run.write_heartbeat(beat)
        else:
            rank_beat = RankBeat(self.rank, self.attempt, progress["step"], progress["advanced"], doing, now, host, pid)
            self.run.write_rank_beat(self.stage.name, self.task.shard, rank_beat)

    def rank_is_slow(self, rank: int, factor: float) -> None:
        """Tell it; `slow` says it as long as it lasts."""
        beat = self.seat.read(rank)
        with contextlib.suppress(OSError):
            self.run.event("slow_rank", stage=self.stage.name, shard=self.task.shard, attempt=self.attempt, rank=rank,
                           node=beat.host if beat is not None else "", factor=factor)  # fmt: skip

    def rank_has_ended(self, rank: int) -> None:
        """From the thread that holds the line to the others: end this process too if it does not come to its own end in time."""
        if self.activity.doing in LEAVING or self.ended_rank is not None:
            return
        self.ended_rank = rank
        self.ended_rank_known.set()
        time.sleep(LAST_WORDS_SECONDS)
        beat, cause = self.seat.read(rank), self.ended_in_words(rank)
        with contextlib.suppress(OSError):
            if beat is not None:
                self.seat.tell("rank_ended", beat, cause=cause)
        watchdog.end(self.seat, cause)

    def ended_in_words(self, rank: int) -> str:
        """The cause is another if that rank has ended itself, because it had given up a third one."""
        lost = self.seat.lost_cause()
        if lost is not None:
            return lost
        beat = self.seat.read(rank)
        return f"{self.seat.describe(rank)} ended before its work" + (f"; {watchdog.stood_at(beat)}" if beat is not None else "")


@dataclass(frozen=True)
class Done:
    """What finished work returns: files (relative to nothing: absolute paths) and facts for people."""

    files: list[Path]
    facts: dict[str, Any] = field(default_factory=dict)


def work_of(kind: str) -> Callable[[Work], Done]:
    """The function that does a kind of stage: one word is the module, the function and the verb."""
    function: Callable[[Work], Done] = getattr(importlib.import_module(f"medgen.{kind}"), kind)
    return function


def perform(run: RunDir, kind: str, stage_name: str | None, shard: int, attempt: int, again: bool = False) -> Exit:
    """Run one task and write its outcome; one that is done already only `again`. Returns the exit code.

    Whatever goes wrong in the work is told and written down, never raised; a wrong stage or shard raises InputError."""
    rank, world_size, _ = rank_from_environment()
    plan = planning.read(run)
    stage = plan.only_stage(kind, stage_name)
    task = _task(stage, shard)
    work = Work(run, plan, stage, task, attempt, StopFlag(), is_main=rank == 0, rank=rank, world_size=world_size)
    fault.here = fault.Here(stage.name, shard, attempt)
    if run.is_done(stage.name, shard, task.hash) and not again:
        work.say(f"{stage.name}: already done")
        return Exit.DONE
    if not work.is_main:
        return _work_and_tell(work, kind)
    lock = FileLock(run.task_lock(stage.name, shard))
    try:
        lock.acquire(timeout=LOCK_SECONDS)  # an earlier attempt may be about to die
    except Timeout:
        raise InputError(f"{stage.name}: another process is working on shard {shard} of {run.run_id} right now; see `medgen watch {run.run_id}`") from None
    except OSError as error:
        raise InputError(f"{run.root}: {explain_os_error(error)}") from None
    try:
        if run.is_done(stage.name, shard, task.hash) and not again:  # by that other process
            return Exit.DONE
        return _work_and_tell(work, kind)
    finally:
        lock.release()


@dataclass(frozen=True)
class _Ending:
    """How work ended; `cause` in words unless it is done."""

    status: Status
    code: Exit
    cause: str | None = None
    done: Done = Done([])


def _work_and_tell(work: Work, kind: str) -> Exit:
    """Do the work between heartbeats and write its outcome, however it ends."""
    work.stop.install()
    if fault.ARMED:
        fault.at("start")
    started, began = time.time(), time.monotonic()
    finished = threading.Event()
    beats = threading.Thread(target=_beat_until, args=(work, finished), daemon=True)
    beats.start()
    try:
        ending = _ending_of(work, kind)
    finally:
        finished.set()
        beats.join()
    if ending.cause is not None:
        print(f"{work.stage.name}: {ending.status}: {ending.cause}", file=sys.stderr, flush=True)
    return _write_outcome(work, ending, started, started + time.monotonic() - began)


def _ending_of(work: Work, kind: str) -> _Ending:
    try:
        return _Ending("done", Exit.DONE, done=work_of(kind)(work))
    except Interrupted as error:
        return _Ending("interrupted", Exit.INTERRUPTED, str(error))
    except MedgenError as error:
        return _Ending("failed", error.exit_code, str(error))
    except OSError as error:
        if error.errno in SYSTEM_FAULTS:
            return _Ending("failed", Exit.BAD_INPUT, explain_os_error(error))
        traceback.print_exc()
        return _Ending("failed", Exit.FAILED, f"{type(error).__name__}: {error}")
    except Exception as error:  # a defect of medgen or a library: the traceback belongs in the log
        traceback.print_exc()
        return _Ending("failed", Exit.FAILED, _blame(work, f"{type(error).__name__}: {error}"))


def _blame(work: Work, error: str) -> str:
    """The cause of an error nobody expected: among several ranks most often that another has died, or has not come."""
    if work.world_size == 1:
        return error
    if work.ended_rank_known.wait(NEWS_SECONDS) and work.ended_rank is not None:
        return work.ended_in_words(work.ended_rank)
    behind = work.seat.behind() if "timed out" in error.lower() else ""
    return f"{behind}: {error}" if behind else error


def explain_os_error(error: OSError) -> str:
    reason = SYSTEM_FAULTS.get(error.errno or 0, error.strerror or str(error))
    return f"{error.filename or 'a file'}: {reason}; mend that and run the same command again"


def _task(stage: PlannedStage, shard: int) -> PlannedTask:
    if not 0 <= shard < len(stage.tasks):
        raise InputError(f"--shard {shard}: stage {stage.name} has shards 0 to {len(stage.tasks) - 1}")
    return stage.tasks[shard]


def _beat_until(work: Work, finished: threading.Event) -> None:
    """Heartbeats from a thread, so that a long step is not taken for a dead one; watch compares the steps."""
    dog = Watchdog(work.seat) if work.world_size > 1 else None
    while True:
        written = _beat(work)
        if finished.wait(watchdog.LOOK_SECONDS):
            return
        if dog is not None and work.activity.doing not in LEAVING:
            dog.look(work.step, written)


def _beat(work: Work) -> bool:
    """A heartbeat is a courtesy: the outcome will tell."""
    try:
        work.heartbeat()
    except OSError:
        return False
    return True


def _write_outcome(work: Work, ending: _Ending, started: float, ended: float) -> Exit:
    if not work.is_main:
        work.activity.now("ended")
        _beat(work)
        if ending.status == "failed":
            work.run.event("rank_failed", stage=work.stage.name, shard=work.task.shard, attempt=work.attempt, cause=ending.cause, node=os.environ.get("SLURMD_NODENAME", socket.gethostname()))
        return ending.code
    try:
        work.heartbeat()
        if fault.ARMED:
            fault.at("outcome.write")
        work.run.write_outcome(
            Outcome(
                run_id=work.run.run_id, stage=work.stage.name, shard=work.task.shard, task_hash=work.task.hash,
                attempt=work.attempt, status=ending.status, cause=ending.cause, host=socket.gethostname(), device=work.device_name,
                devices=work.stage.ranks, started=started, ended=ended,  # not by a clock that may have been set meanwhile
                files=[work.run.produced(path) for path in ending.done.files], facts=ending.done.facts,
            )
        )
    except OSError as error:
        print(f"{work.stage.name}: the outcome could not be written: {explain_os_error(error)}", file=sys.stderr, flush=True)
        return Exit.BAD_INPUT
    return ending.code
