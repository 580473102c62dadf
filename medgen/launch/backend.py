"""What a backend offers, the contract of local.py and slurm_backend.py; and what logs say of the end of an attempt. Used by launch/ and watch/."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from medgen import redact
from medgen.errors import Exit
from medgen.launch.queue import Ending
from medgen.plan import Plan, Task
from medgen.rundir import Outcome, RunDir

RANK_ERROR = re.compile(r"^srun: error: .*?: tasks? (\d+).*?: (?!Terminated)(.+)$", re.MULTILINE)
ATTEMPT_LINE = re.compile(r"^medgen: \S+ shard \d+ attempt (\d+) on ", re.MULTILINE)
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07?|[\x00-\x08\x0b-\x1f\x7f]")  # a log must not steer the terminal
TAIL_BYTES = 64 * 1024
KILLED = 137


@dataclass(frozen=True)
class Poll:
    """What a backend knows without looking at outcomes: is anything of the run queued or running, and where."""

    alive: bool
    where: str


class Backend(Protocol):
    """Everything a backend writes is in the run folder: events, scripts under submissions/, logs."""

    def submit(self, run: RunDir, planned: Plan) -> Exit:
        """Start what is not done; n calls start it once."""

    def poll(self, run: RunDir) -> Poll:
        """Cheap and harmless: never a reason to call a task done."""

    def cancel(self, run: RunDir, planned: Plan) -> str:
        """Stop everything of the run, let it save first; returns what happened in words."""


def fresh_outcome(run: RunDir, task: Task, attempt: int) -> Outcome | None:
    """The outcome of exactly this attempt at this work."""
    outcome = run.read_outcome(task.stage, task.shard)
    return outcome if outcome is not None and outcome.attempt == attempt and outcome.task_hash == task.hash else None


def ending_of(run: RunDir, task: Task, attempt: int, exit_code: int, events: list[dict[str, Any]]) -> tuple[Ending, str | None]:
    """How an attempt ended, and why. The outcome counts, the exit code only where there is none."""
    if run.is_done(task.stage, task.shard, task.hash):
        return "done", None
    fresh = fresh_outcome(run, task, attempt)
    cause = fresh.cause if fresh is not None else _told_by_another_rank(task, attempt, exit_code, events)
    if exit_code == Exit.INTERRUPTED or (fresh is not None and fresh.status == "interrupted"):
        return "interrupted", cause or "stopped by a signal after saving"
    cause = cause or cause_of(exit_code, guilty_log(run, task.stage, task.shard, attempt))
    if exit_code == 0:
        cause = f"exit code 0, but no outcome that verifies: {cause}"
    return ("refused" if exit_code == Exit.BAD_INPUT else "failed"), cause


def _told_by_another_rank(task: Task, attempt: int, exit_code: int, events: list[dict[str, Any]]) -> str | None:
    """Why a rank has ended the attempt: it gave up one that was silent, or one has died. That it was killed, as the exit code may say, tells more."""
    kinds = ("rank_lost",) if exit_code == KILLED else ("rank_lost", "rank_ended")
    key = (task.stage, task.shard, attempt)
    told = [event for event in events if event["event"] in kinds and (event["stage"], event["shard"], event["attempt"]) == key]
    return next((str(event["cause"]) for kind in kinds for event in told if event["event"] == kind), None)


def next_attempt(run: RunDir, stage: str, shard: int) -> int:
    """The number the job script will give to the next start: the first without a log."""
    attempt = 0
    while run.log(stage, shard, 0, attempt).exists():
        attempt += 1
    return attempt


def tail(path: Path, lines: int) -> list[str]:
    """The last non-empty lines of a text file; none if it cannot be read."""
    try:
        with path.open("rb") as handle:
            handle.seek(0, 2)
            handle.seek(max(0, handle.tell() - TAIL_BYTES))
            text = handle.read().decode(errors="replace")
    except OSError:
        return []
    return last_lines(text, lines)


def last_lines(text: str, lines: int) -> list[str]:
    """The last non-empty ones; a progress bar rewrites its line with carriage returns: what was last on screen counts."""
    found = [line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in text.split("\n") if line.strip()][-lines:]
    return [redact.text(CONTROL.sub("", line)) for line in found]


def guilty_log(run: RunDir, stage: str, shard: int, attempt: int) -> Path:
    """The log to read after a failure: of the rank srun named first, else of rank 0; the batch log if that is empty."""
    batch = run.batch_log(stage, shard)
    try:
        text = batch.read_text(errors="replace")
    except OSError:
        text = ""
    starts = [match.start() for match in ATTEMPT_LINE.finditer(text) if int(match.group(1)) == attempt]
    named = RANK_ERROR.search(text, starts[-1]) if starts else None
    log = run.log(stage, shard, int(named.group(1)) if named else 0, attempt)
    return log if log.exists() and log.stat().st_size else batch


def cause_of(code: int, log: Path) -> str:
    """One line in words for an exit code and the last words of a log."""
    last = next(reversed([line for line in tail(log, 20) if not line.startswith("medgen: ended with")]), "")
    if code == KILLED:
        why = "killed by SIGKILL: often too little memory"
    elif code > 128:
        why = f"killed by signal {code - 128}"
    else:
        why = f"exit code {code}"
    return f"{why}: {last.strip()[:300]}" if last else why


