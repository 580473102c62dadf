"""Work that is no task of a run: find-lr and find-steps, which a person waits for. What is told goes to stderr."""

from __future__ import annotations

import sys
import time

from medgen.plan import Plan, PlannedStage, Task
from medgen.rundir import RunDir
from medgen.stop import StopFlag
from medgen.task import Work

TELL_SECONDS = 15.0


class AloneWork(Work):
    """Writes no heartbeat and no outcome; hears signals."""

    _told = 0.0  # monotonic seconds of the last line of progress

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def progress(self, step: int, total: int, unit: str, loss: float | None = None) -> None:
        if time.monotonic() - self._told > TELL_SECONDS:
            self._told = time.monotonic()
            self.say(f"{step} of {total} {unit}")


def alone(run: RunDir, plan: Plan, stage: PlannedStage, task: Task) -> AloneWork:
    """The work of this process alone, whatever ranks the plan has."""
    work = AloneWork(run, plan, stage, task, 0, StopFlag(), is_main=True)
    work.stop.install()
    work._told = time.monotonic()
    return work
