"""Who supervises a local run, if anybody: one process per run, known by host, pid and start. Used by local.py and watch."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import asdict, dataclass

from medgen import files
from medgen.launch.processes import start_ticks
from medgen.rundir import RunDir

BEAT_SECONDS = 5
LOST_SECONDS = 60  # on another host only the age of the last beat can tell


@dataclass(frozen=True)
class Supervisor:
    host: str
    pid: int
    start_ticks: int
    started: float  # unix seconds
    detached: bool

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {time.strftime('%H:%M:%S', time.localtime(self.started))}"


def register(run: RunDir, detached: bool) -> None:
    """Called by the process that holds the run's lock."""
    me = Supervisor(socket.gethostname(), os.getpid(), start_ticks(os.getpid()) or 0, time.time(), detached)
    files.write_json(run.supervisor, asdict(me))


def beat(run: RunDir) -> None:
    os.utime(run.supervisor)


def retire(run: RunDir) -> None:
    run.supervisor.unlink(missing_ok=True)


def living_supervisor(run: RunDir) -> Supervisor | None:
    """The process that runs this run now. Reads only; a record left by kill -9 or a reboot does not count."""
    try:
        known = Supervisor(**files.read_json(run.supervisor))
        age_seconds = time.time() - run.supervisor.stat().st_mtime
    except (OSError, ValueError, TypeError):
        return None
    if known.host == socket.gethostname():
        return known if start_ticks(known.pid) == known.start_ticks else None
    return known if age_seconds < LOST_SECONDS else None
