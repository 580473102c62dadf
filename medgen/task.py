"""What every stage shares around its work: the plan, heartbeats, signals, and an outcome however it ends.

cli.py calls `perform` for train, generate, collect, evaluate and report; the work itself is in those modules."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from medgen import plan as planning
from medgen.errors import Exit, InputError, Interrupted, MedgenError
from medgen.plan import Plan, PlannedStage
from medgen.plan import Task as PlannedTask
from medgen.rundir import Heartbeat, Outcome, Produced, RunDir, Status

HEARTBEAT_SECONDS = 5.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
# what the machine, not medgen, is to blame for: told in one line
SYSTEM_FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write or read here",
    errno.EPERM: "no permission to write or read here",
}


class StopFlag:
    """Set by TERM, INT or USR2; work looks at it between steps. Handlers do nothing else."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def install(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    @property
    def is_set(self) -> bool:
        return self.signal_name is not None


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
    _progress: dict[str, Any] = field(default_factory=lambda: {"step": 0, "total": 0, "unit": "", "loss": None})

    def say(self, text: str) -> None:
        """One line for the log, from rank 0 only."""
        if self.is_main:
            print(text, flush=True)

    def progress(self, step: int, total: int, unit: str, loss: float | None = None) -> None:
        self._progress = {"step": step, "total": total, "unit": unit, "loss": loss}

    def heartbeat(self) -> None:
        if self.is_main:
            self.run.write_heartbeat(
                Heartbeat(self.stage.name, self.task.shard, self.attempt, **self._progress,
                          time=time.time(), host=socket.gethostname(), pid=os.getpid())
            )


@dataclass(frozen=True)
class Done:
    """What finished work returns: files (relative to nothing: absolute paths) and facts for people."""

    files: list[Path]
    facts: dict[str, Any] = field(default_factory=dict)


def work_of(kind: str) -> Callable[[Work], Done]:
    """The function that does a kind of stage: one word is the module, the function and the verb."""
    function: Callable[[Work], Done] = getattr(importlib.import_module(f"medgen.{kind}"), kind)
    return function


def perform(run: RunDir, kind: str, stage_name: str | None, shard: int, attempt: int) -> Exit:
    """Run one task and write its outcome. Returns the exit code; errors of any kind are told, never raised."""
    rank = int(os.environ.get("SLURM_PROCID", os.environ.get("RANK", "0")))
    plan = planning.read(run)
    stage = plan.only_stage(kind, stage_name)
    task = _task(stage, shard)
    work = Work(run, plan, stage, task, attempt, StopFlag(), is_main=rank == 0)
    if run.is_done(stage.name, shard, task.hash):
        work.say(f"{stage.name}: already done")
        return Exit.DONE
    work.stop.install()
    started = time.time()
    beating = threading.Event()
    beats = threading.Thread(target=_beat_until, args=(work, beating), daemon=True)
    beats.start()
    try:
        done = work_of(kind)(work)
        status, cause, code = "done", None, Exit.DONE
    except Interrupted as error:
        done, status, cause, code = Done([]), "interrupted", str(error), Exit.INTERRUPTED
    except MedgenError as error:
        done, status, cause, code = Done([]), "failed", str(error), error.exit_code
    except OSError as error:
        if error.errno not in SYSTEM_FAULTS:
            traceback.print_exc()
        done, status, cause, code = Done([]), "failed", explain_os_error(error), Exit.BAD_INPUT
    except Exception as error:  # a defect of medgen or a library: the traceback belongs in the log
        traceback.print_exc()
        done, status, cause, code = Done([]), "failed", f"{type(error).__name__}: {error}", Exit.FAILED
    finally:
        beating.set()
        beats.join()
    if cause is not None:
        print(f"{stage.name}: {status}: {cause}", file=sys.stderr, flush=True)
    return _write_outcome(work, done, status, cause, code, started)  # type: ignore[arg-type]


def explain_os_error(error: OSError) -> str:
    reason = SYSTEM_FAULTS.get(error.errno or 0, error.strerror or str(error))
    return f"{error.filename or 'a file'}: {reason}; mend that and run the same command again"


def _task(stage: PlannedStage, shard: int) -> PlannedTask:
    if not 0 <= shard < len(stage.tasks):
        raise InputError(f"--shard {shard}: stage {stage.name} has shards 0 to {len(stage.tasks) - 1}")
    return stage.tasks[shard]


def _beat_until(work: Work, finished: threading.Event) -> None:
    """Heartbeats from a thread, so that a long step is not taken for a dead one; watch compares the steps."""
    while True:
        try:
            work.heartbeat()
        except OSError:
            pass  # the outcome will tell: a heartbeat is a courtesy
        if finished.wait(HEARTBEAT_SECONDS):
            return


def _write_outcome(work: Work, done: Done, status: Status, cause: str | None, code: Exit, started: float) -> Exit:
    if not work.is_main:
        if status == "failed":
            work.run.event("rank_failed", stage=work.stage.name, shard=work.task.shard, attempt=work.attempt, cause=cause)
        return code
    try:
        produced: list[Produced] = [work.run.produced(path) for path in done.files]
        work.heartbeat()
        work.run.write_outcome(
            Outcome(
                run_id=work.run.run_id, stage=work.stage.name, shard=work.task.shard, task_hash=work.task.hash,
                attempt=work.attempt, status=status, cause=cause, host=socket.gethostname(), device=work.device_name,
                devices=work.stage.ranks, started=started, ended=time.time(), files=produced, facts=done.facts,
            )
        )
    except OSError as error:
        print(f"{work.stage.name}: the outcome could not be written: {explain_os_error(error)}", file=sys.stderr, flush=True)
        return Exit.BAD_INPUT
    return code
