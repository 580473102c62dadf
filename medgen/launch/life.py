"""Whether the process of a task may still live, from what was last heard of it. Used by watch, why, usage, logs and fsck."""

from __future__ import annotations

import socket

from medgen.launch.processes import start_ticks
from medgen.rundir import Heartbeat

SILENT_SECONDS = 90.0  # a heartbeat is written every few seconds; a shared file system may show it a minute late


def is_gone(beat: Heartbeat) -> bool:
    """Proof that it ended: it ran on this machine, and is there no more."""
    return beat.host == socket.gethostname() and start_ticks(beat.pid) is None


def may_live(beat: Heartbeat | None, now: float) -> bool:
    return beat is not None and now - beat.heard <= SILENT_SECONDS and not is_gone(beat)
