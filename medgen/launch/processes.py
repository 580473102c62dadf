"""Processes that leave no orphans: die with the parent, be found again by a mark. Used by the local backend and watch.

Linux only in its stronger half: elsewhere nothing dies with its parent and nothing marked is found."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

MARK = "MEDGEN_SUPERVISED"  # in the environment of everything a supervisor starts: the run folder
PROC = Path("/proc")
PR_SET_PDEATHSIG = 1
LINUX = sys.platform == "linux"
LIBC = ctypes.CDLL(None) if LINUX else None


def die_with_parent() -> Callable[[], None]:
    """A `preexec_fn`: the kernel kills the child when this process ends, even by kill -9. USR2 starts out ignored."""
    parent = os.getpid()

    def in_child() -> None:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        if LIBC is not None:
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before prctl was called
            os._exit(137)

    return in_child


def end_with_parent() -> None:
    """The same for a process that its parent started in the ordinary way: here the script that calls srun."""
    parent = os.getppid()
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent == 1 or os.getppid() != parent:  # it ended before prctl was called
        os._exit(137)


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot: with the pid it names one process for good.

    None if there is no such process (a zombie counts as ended). 0 where there is no /proc."""
    if not LINUX:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return 0
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def marked(run_root: Path) -> list[int]:
    """The processes that a supervisor of this run started and that still live; never this process."""
    wanted = f"{MARK}={run_root.resolve()}".encode()
    found = []
    for folder in PROC.iterdir() if LINUX else ():
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted in environment and start_ticks(int(folder.name)) is not None:
            found.append(int(folder.name))
    return found


def kill_marked(run_root: Path, timeout_seconds: float = 5) -> int:
    """SIGKILL to everything `marked`, until nothing is left or the time is up; returns how many there were at first."""
    first = victims = marked(run_root)
    deadline = time.monotonic() + timeout_seconds
    while victims and time.monotonic() < deadline:
        for pid in victims:
            signal_process(pid, signal.SIGKILL)
        time.sleep(0.02)
        victims = marked(run_root)
    return len(first)


def signal_process(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def signal_group(leader: int, number: signal.Signals) -> None:
    """Signal every process of the group that `leader` started."""
    try:
        os.killpg(leader, number)
    except (ProcessLookupError, PermissionError):  # macOS answers EPERM for a group of zombies
        return
