"""Whether this process was asked to stop. Used by task.py; __main__.py listens from its first line on.

A job script starts ranks with USR2 ignored: until somebody listens, the warning would be forgotten."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

_heard: list[str] = []  # names of signals, in order


def listen_early() -> None:
    """Remember the warning, where it is ignored: imports from a shared file system, and the lock of a task, take seconds."""
    if signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN:
        signal.signal(signal.SIGUSR2, _hear)


def _hear(number: int, frame: FrameType | None) -> None:
    _heard.append(signal.Signals(number).name)


class StopFlag:
    """Set by TERM, INT or USR2; work looks at it between steps. Handlers do nothing else."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def install(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        self.signal_name = self.signal_name or next(iter(_heard), None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name

    @property
    def is_set(self) -> bool:
        return self.signal_name is not None
