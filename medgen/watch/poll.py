"""What Slurm says, asked once for all watches of a user on this machine. Called by state.py.

Answers are kept in ~/.cache/medgen. A Slurm that is slow or away gives the last answer and its age, never an error."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Protocol

from filelock import FileLock, Timeout

from medgen import files
from medgen.launch import slurm
from medgen.launch.slurm import AccountingRow, SlurmError

INTERVAL_SECONDS, SLOWEST_SECONDS = 15.0, 60.0
SLOWER = 1.5  # times the interval after an answer that is like the one before
PATIENCE_SECONDS, ACCOUNTING_PATIENCE_SECONDS = 20.0, 10.0  # for one answer
SHARE = 0.1  # of the time at most is spent waiting for Slurm
SOON_SECONDS = 2.0  # when something was submitted after the last answer
ACCOUNTING_SECONDS, WITHOUT_ACCOUNTING_SECONDS = 60.0, 600.0
KEPT_DAYS = 30
STATE_FIELDS = 4  # of a line of squeue: job, element, state, reason; the others change with the clock

Key = tuple[int, int | None]  # job, array element


@dataclass(frozen=True)
class QueueAnswer:
    """The last answer of squeue. `asked`: unix seconds, None if there never was one; `trouble`: why the last try failed."""

    text: str = ""
    asked: float | None = None
    tried: float = 0.0
    interval_seconds: float = INTERVAL_SECONDS
    failing_since: float | None = None
    trouble: str | None = None

    def is_due(self, now: float, newer_than: float) -> bool:
        """Time to ask again: after the interval, or soon if what was submitted since then cannot be in it."""
        outdated = self.asked is None or self.asked <= newer_than
        wait_seconds = SOON_SECONDS if outdated and self.trouble is None else self.interval_seconds
        return not 0 <= now - self.tried < wait_seconds  # a clock that was set back counts as due


@dataclass(frozen=True)
class AccountingAnswer:
    """What sacct said about the jobs of one run, by job and element."""

    rows: dict[Key, AccountingRow]
    tried: float = 0.0
    trouble: str | None = None

    def is_due(self, wanted: Set[Key], now: float) -> bool:
        """What has ended stays as it is: only for others is it worth asking."""
        open_ones = any(key not in self.rows or self.rows[key].state not in slurm.TERMINAL_STATES for key in wanted)
        return open_ones and not 0 <= now - self.tried < (ACCOUNTING_SECONDS if self.trouble is None else WITHOUT_ACCOUNTING_SECONDS)


class Source(Protocol):
    """Where state.py gets what Slurm says."""

    def queue(self, newer_than: float) -> QueueAnswer:
        """An answer that is fresh enough; one after `newer_than` (unix seconds) if there can be."""

    def accounting(self, run_id: str, wanted: Set[Key], since: float) -> AccountingAnswer:
        """What became of jobs of a run that was first submitted at `since`."""


class Patient:
    """Waits for Slurm when it is time to ask: for `watch --once` and for scripts."""

    def __init__(self) -> None:
        self._last = QueueAnswer()  # what counts where the cache cannot be written

    def queue(self, newer_than: float) -> QueueAnswer:
        path = _path("queue")
        kept = self._newest(path)
        if not kept.is_due(time.time(), newer_than):
            return kept
        with _only_one(path, 0 if kept.asked is not None else PATIENCE_SECONDS) as mine:
            kept = self._newest(path)  # another watch may have asked meanwhile
            if not mine or not kept.is_due(time.time(), newer_than):
                return kept
            self._last = _ask_queue(kept)
            write_private(path, json.dumps(asdict(self._last)))
            _sweep(path.parent)
            return self._last

    def _newest(self, path: Path) -> QueueAnswer:
        return max(self._last, _kept_queue(path), key=lambda answer: answer.tried)

    def accounting(self, run_id: str, wanted: Set[Key], since: float) -> AccountingAnswer:
        path = _path(f"accounting-{run_id}")
        kept = _kept_accounting(path)
        if not kept.is_due(wanted, time.time()):
            return kept
        with _only_one(path, 0) as mine:
            if not mine:
                return kept
            answer = _ask_accounting(kept, run_id, {job for job, _ in wanted}, since)
            write_private(path, json.dumps({"rows": [asdict(row) for row in answer.rows.values()], "tried": answer.tried, "trouble": answer.trouble}))
            return answer


class Sparing(Patient):
    """For a list of many runs: one squeue for all of them, and of the accounting what is known already."""

    def accounting(self, run_id: str, wanted: Set[Key], since: float) -> AccountingAnswer:
        return _kept_accounting(_path(f"accounting-{run_id}"))


class Impatient:
    """For a live screen: answers at once with what is known, and asks Slurm in a thread meanwhile."""

    def __init__(self) -> None:
        self._patient = Patient()
        self._answers: dict[str, Any] = {}
        self._threads: dict[str, threading.Thread] = {}

    def queue(self, newer_than: float) -> QueueAnswer:
        known = self._answers.get("queue") or _kept_queue(_path("queue"))
        if known.is_due(time.time(), newer_than):
            self._ask("queue", lambda: self._patient.queue(newer_than))
        return known

    def accounting(self, run_id: str, wanted: Set[Key], since: float) -> AccountingAnswer:
        known = self._answers.get("accounting") or _kept_accounting(_path(f"accounting-{run_id}"))
        if known.is_due(wanted, time.time()):
            self._ask("accounting", lambda: self._patient.accounting(run_id, set(wanted), since))
        return known

    def _ask(self, what: str, question: Callable[[], Any]) -> None:
        if what in self._threads and self._threads[what].is_alive():
            return

        def ask() -> None:
            self._answers[what] = question()

        self._threads[what] = threading.Thread(target=ask, daemon=True)
        self._threads[what].start()


def _ask_queue(kept: QueueAnswer) -> QueueAnswer:
    began = time.time()
    try:
        text = slurm.queue_text(PATIENCE_SECONDS)
    except SlurmError as error:
        interval = min(SLOWEST_SECONDS, max(INTERVAL_SECONDS, kept.interval_seconds * 2))
        return replace(kept, tried=time.time(), interval_seconds=interval, failing_since=kept.failing_since or began, trouble=str(error))
    same = _states(text) == _states(kept.text)
    interval = kept.interval_seconds * SLOWER if same else INTERVAL_SECONDS
    took_seconds = time.time() - began
    return QueueAnswer(text, began, time.time(), min(SLOWEST_SECONDS, max(INTERVAL_SECONDS, interval, took_seconds / SHARE)))


def _states(text: str) -> list[list[str]]:
    return sorted(line.split("|", STATE_FIELDS)[:STATE_FIELDS] for line in text.splitlines())


def _ask_accounting(kept: AccountingAnswer, run_id: str, jobs: Set[int], since: float) -> AccountingAnswer:
    try:
        rows = slurm.accounting(sorted(jobs), since, timeout_seconds=ACCOUNTING_PATIENCE_SECONDS)
    except SlurmError as error:
        return AccountingAnswer(kept.rows, time.time(), str(error))
    mine = {(row.job_id, row.array_task): row for row in rows if row.name.startswith(f"medgen.{run_id}.")}  # job numbers are used again
    return AccountingAnswer({**kept.rows, **mine}, time.time())


# --- the files -------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or f"{os.environ.get('HOME', gettempdir())}/.cache") / "medgen"


def _path(what: str) -> Path:
    """One for each user and cluster. A home folder may be shared by clusters, whose machines have different names."""
    cluster = files.sha256_bytes(f"{os.environ.get('SLURM_CONF', '')} {socket.gethostname()} {os.getuid()}".encode())[:12]
    return cache_folder() / f"{what}-{cluster}.json"


def _kept_queue(path: Path) -> QueueAnswer:
    try:
        record = json.loads(path.read_text())
        answer = QueueAnswer(**record)
        asked, numbers = answer.asked or 0.0, (answer.tried, answer.interval_seconds, answer.failing_since or 0.0)
        sound = isinstance(answer.text, str) and all(isinstance(number, int | float) for number in (asked, *numbers))
    except (OSError, ValueError, TypeError):
        return QueueAnswer()
    return answer if sound else QueueAnswer()


def _kept_accounting(path: Path) -> AccountingAnswer:
    try:
        record = json.loads(path.read_text())
        rows = [AccountingRow(**row) for row in record["rows"]]
        return AccountingAnswer({(row.job_id, row.array_task): row for row in rows}, float(record["tried"]), record["trouble"])
    except (OSError, ValueError, TypeError, KeyError):
        return AccountingAnswer({})


def write_private(path: Path, text: str) -> None:
    """Replace a file of the cache, for this user's eyes only. A home that is full or read-only costs the sharing, nothing else."""
    temporary = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "w") as handle:
                handle.write(text)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove what is kept of runs that nobody has watched for a month."""
    with contextlib.suppress(OSError):
        for path in folder.glob("*-*.*"):
            if path.stat().st_mtime < time.time() - KEPT_DAYS * 86400:
                path.unlink()


@contextlib.contextmanager
def _only_one(path: Path, timeout_seconds: float) -> Iterator[bool]:
    """Yield True if this process may ask Slurm now, False if another is asking. Where files cannot be locked everybody may."""
    lock = FileLock(path.with_suffix(".lock"), mode=0o600)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock.acquire(timeout=timeout_seconds)
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError):
        yield True
        return
    try:
        yield True
    finally:
        lock.release()
